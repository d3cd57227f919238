// A 16-byte load of data that is read once: past L1, the rest of its 128 bytes fetched into L2 with it.
#pragma once

#include <cstdint>

namespace fastkernels {

__device__ __forceinline__ uint4 load_stream_16(const void* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}

}  // namespace fastkernels
