// wgmma (sm_90a) with A in registers and few columns, beside wgmma.cuh, whose rules and layout of A and D hold.
//
// Both matrices are K-major: B in shared memory as wgmma_k_major describes it, K steps of 32 bytes (16 elements, 32 of
// e4m3) one behind the other. Of A in e4m3 a lane holds, of rows g and g + 8 in turn, the elements 4t to 4t + 3 and
// then 16 + 4t to 16 + 4t + 3.
#pragma once

#include "common/ptx/wgmma.cuh"

namespace fastkernels {

#define FK_D8(i)                                                                                                \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define FK_D16(i) FK_D8(i), FK_D8(i + 8)
#define FK_D32(i) FK_D16(i), FK_D16(i + 16)
#define FK_N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FK_N16 FK_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FK_N32 FK_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FK_N64                                                                                               \
    FK_N32                                                                                                   \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, " \
    "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FK_N128                                                                                         \
    FK_N64                                                                                              \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, " \
    "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, " \
    "%102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, "  \
    "%118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// The operands after D are A's four, B, and whether to add to D.
#define FK_WGMMA(columns, names, A0, A1, A2, A3, B, P, kind, tail, ...)                                          \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #columns kind \
                 " {" names "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p" tail ";\n}"                \
                 : __VA_ARGS__                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define FK_WGMMA_ALL(kind, tail)                                                                            \
    if constexpr (N == 16) {                                                                                \
        FK_WGMMA(16, FK_N8, 8, 9, 10, 11, 12, 13, kind, tail, FK_D8(0));                                    \
    } else if constexpr (N == 32) {                                                                         \
        FK_WGMMA(32, FK_N16, 16, 17, 18, 19, 20, 21, kind, tail, FK_D16(0));                                \
    } else if constexpr (N == 64) {                                                                         \
        FK_WGMMA(64, FK_N32, 32, 33, 34, 35, 36, 37, kind, tail, FK_D32(0));                                \
    } else if constexpr (N == 128) {                                                                        \
        FK_WGMMA(128, FK_N64, 64, 65, 66, 67, 68, 69, kind, tail, FK_D32(0), FK_D32(32));                   \
    } else {                                                                                                \
        static_assert(N == 256, "no such shape of wgmma here");                                             \
        FK_WGMMA(256, FK_N128, 128, 129, 130, 131, 132, 133, kind, tail, FK_D32(0), FK_D32(32), FK_D32(64), \
                 FK_D32(96));                                                                               \
    }

// D [64, N] (+)= A [64, K] B [N, K]^T, K of 32 bytes; of e4m3 added up with about 14 bits (wgmma.cuh).
template <typename T, int N>
__device__ __forceinline__ void wgmma_rs_k_major(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b,
                                                 int accumulate) {
    if constexpr (std::is_same_v<T, bf16>) {
        FK_WGMMA_ALL("k16.f32.bf16.bf16", ", 1, 1, 0")
    } else if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {
        FK_WGMMA_ALL("k32.f32.e4m3.e4m3", ", 1, 1")
    } else {
        static_assert(std::is_same_v<T, fp16>, "no such type of wgmma here");
        FK_WGMMA_ALL("k16.f32.f16.f16", ", 1, 1, 0")
    }
}

#undef FK_D8
#undef FK_D16
#undef FK_D32
#undef FK_N8
#undef FK_N16
#undef FK_N32
#undef FK_N64
#undef FK_N128
#undef FK_WGMMA
#undef FK_WGMMA_ALL

}  // namespace fastkernels
