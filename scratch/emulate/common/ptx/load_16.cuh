#pragma once
#include "emu.h"
namespace fastkernels{inline uint4 load_16_here(const void*p){if((uintptr_t)p%16||(const char*)p<emu::x_low||(const char*)p+16>emu::x_high){printf("bad x address\n");abort();}uint4 v;memcpy(&v,p,16);return v;}}
