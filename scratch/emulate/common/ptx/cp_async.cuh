#pragma once
#include "emu.h"
namespace fastkernels{
inline uint32_t shared_address(const void*p){return (const char*)p-emu::me.block->shared;}
inline void cp_async_16(uint32_t d,const void*s,bool){ if(d%16||(uintptr_t)s%16||d+16>emu::me.block->bytes||(const char*)s<emu::w_low||(const char*)s+16>emu::w_high){printf("bad copy %u of %d\n",d,emu::me.block->bytes);abort();}
 if(emu::early) memcpy(emu::me.block->shared+d,s,16); else emu::open_group.push_back({d,s}); }
inline void cp_async_commit(){emu::groups.push_back(std::move(emu::open_group));emu::open_group.clear();}
template<int k> void cp_async_wait(){while((int)emu::groups.size()>k){for(auto&c:emu::groups.front())memcpy(emu::me.block->shared+c.d,c.s,16);emu::groups.pop_front();}}}
