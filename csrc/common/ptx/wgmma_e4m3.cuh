// wgmma of e4m3 (sm_90a), beside wgmma.cuh, whose rules and layout of D hold: products are exact, but of a sum only the
// leading 13 or so bits are kept, cut off and not rounded, so that long sums belong into several D.
//
// Both matrices are K-major: B in shared memory in rows of 128 elements of K, swizzled, K steps of 32 elements 32 bytes
// apart (wgmma_k_major). Of A [64, 32] a lane holds, with g = lane / 4 and t = lane % 4, four bytes each of
//   a[0] A[16w + g][4t ...]   a[1] A[16w + g + 8][4t ...]   a[2] A[16w + g][16 + 4t ...]   a[3] A[16w + g + 8][16 + 4t
//   ...]
#pragma once

#include "common/ptx/wgmma.cuh"

namespace fastkernels {

// Descriptor of a K-major matrix in rows of 64 elements of K: the 16-byte piece c of row r lies at piece c ^ (r / 2 %
// 4).
__device__ __forceinline__ uint64_t wgmma_k_major_64(uint32_t address) {
    constexpr uint64_t kSwizzle64 = 2ull << 62;
    return kSwizzle64 | static_cast<uint64_t>(512 >> 4) << 32 | 1ull << 16 | (address & 0x3ffff) >> 4;
}

// D [64, 64] (+)= A [64, 32] B [64, 32]^T, A in registers.
__device__ __forceinline__ void wgmma_e4m3_n64(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
        "{%32, %33, %34, %35}, %36, p, 1, 1;\n"
        "}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]),
          "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]),
          "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]),
          "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}

}  // namespace fastkernels
