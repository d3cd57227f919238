#pragma once
#include "emu.h"
namespace fastkernels{
inline int cluster_rank(){return emu::me.block->rank;} inline int cluster_size(){return emu::me.block->cluster->size;}
inline void cluster_sync(){emu::me.block->cluster->all->arrive_and_wait();}
template<class T> T* in_block(T*p,int r){return (T*)(emu::me.block->cluster->blocks[r]->shared+((char*)p-emu::me.block->shared));}}
