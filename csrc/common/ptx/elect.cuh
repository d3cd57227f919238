// One lane of a warp (sm_90). Of a branch on this the compiler knows that a single lane takes it, and so puts no loop
// over lanes around the instructions that take their operands from uniform registers, which TMA's do.
#pragma once

#include <cstdint>

namespace fastkernels {

// True for one lane; all of the warp call it.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}"
        : "=r"(elected));
    return elected != 0;
}

}  // namespace fastkernels
