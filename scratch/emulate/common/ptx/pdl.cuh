#pragma once
#include "emu.h"
namespace fastkernels{inline void pdl_wait(){} inline void pdl_launch_dependents(){}}
