// wgmma (sm_90a): a warpgroup multiplies 64 rows of A by a matrix in shared memory, asynchronously; sums are fp32, of
// int8 int32.
//
// A warpgroup is 4 consecutive warps, the first a multiple of 4; warp w holds rows [16w, 16w + 16). With g = lane / 4
// and t = lane % 4, a lane holds of D [64, N]
//   d[4j], d[4j + 1]      D[16w + g][8j + 2t, 8j + 2t + 1]
//   d[4j + 2], d[4j + 3]  D[16w + g + 8][8j + 2t, 8j + 2t + 1]
// and of A [64, 16] in registers what mma.sync wants (mma.cuh), so two neighbouring column tiles of D are one A.
//
// From wgmma_fence() to the wgmma_wait() that covers an instruction, its registers may not be touched. The compiler
// does not know: wgmma_hold() after the wait keeps it from moving uses of them before it.
//
// Matrices in shared memory lie in 128-byte rows of 64 elements of 16 bits or 128 bytes, swizzled as TMA leaves them
// (tma.cuh); 8 rows are one tile of 1024 bytes, and a matrix of more columns is one such panel after the other.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "common/dtype.cuh"

namespace fastkernels {

// Descriptor of a matrix whose rows are the N (or M) dimension and whose columns are K. Only the columns of one panel:
// K steps within it are 32 bytes apart.
__device__ __forceinline__ uint64_t wgmma_k_major(uint32_t address) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    return kSwizzle128 | static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 16 | (address & 0x3ffff) >> 4;
}

// Descriptor of a matrix whose rows are the K dimension and whose columns, panel_bytes from panel to panel, are N.
// K steps of 16 rows are 2048 bytes apart.
__device__ __forceinline__ uint64_t wgmma_n_major(uint32_t address, uint32_t panel_bytes) {
    constexpr uint64_t kSwizzle128 = 1ull << 62;
    return kSwizzle128 | static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(panel_bytes >> 4) << 16 |
           (address & 0x3ffff) >> 4;
}

// Orders this warpgroup's earlier accesses of registers before its next wgmma.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Returns when at most kPending of the committed groups are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

template <typename T, int kCount>
__device__ __forceinline__ void wgmma_hold(T (&d)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if constexpr (std::is_same_v<T, float>) {
            asm volatile("" : "+f"(d[i])::"memory");
        } else {
            asm volatile("" : "+r"(d[i])::"memory");
        }
    }
}

// The registers of a thread, from this warpgroup to others: every warp of it calls these, where the branches of the
// warpgroups have parted.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// The operands of D: d[i], d[i + 1] ... as constraints, and their names in the text, %0 to %(n - 1).
#define FK_D8(c, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define FK_D16(c, i) FK_D8(c, i), FK_D8(c, i + 8)
#define FK_D32(c, i) FK_D16(c, i), FK_D16(c, i + 16)
#define FK_D48(c, i) FK_D32(c, i), FK_D16(c, i + 32)
#define FK_D64(c, i) FK_D32(c, i), FK_D32(c, i + 32)
#define FK_D96(c, i) FK_D64(c, i), FK_D32(c, i + 64)
#define FK_D128(c, i) FK_D64(c, i), FK_D64(c, i + 64)
#define FK_N8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define FK_N16 FK_N8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define FK_N32 FK_N16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FK_N48 FK_N32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FK_N64 FK_N48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FK_N96                                                                         \
    FK_N64                                                                             \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FK_N128                                                                                    \
    FK_N96                                                                                         \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FK_FLOAT(x) "+f"(x)
#define FK_INT(x) "+r"(x)

// D of `registers` a thread; the operands after it are called %A (and, of A in registers, the three next), %B and %P.
#define FK_WGMMA_SS(columns, registers, A, B, P, kind, tail, c)                                              \
    asm volatile(                                                                                            \
        "{\n.reg .pred p;\n"                                                                                 \
        "setp.ne.b32 p, %" #P                                                                                \
        ", 0;\n"                                                                                             \
        "wgmma.mma_async.sync.aligned.m64n" #columns kind " {" FK_N##registers "}, %" #A ", %" #B ", p" tail \
                                                                               ";\n"                         \
                                                                               "}"                           \
        : FK_D##registers(c, 0)                                                                              \
        : "l"(a), "l"(b), "r"(accumulate))
#define FK_WGMMA_RS(columns, registers, A0, A1, A2, A3, B, P, kind, c)                                         \
    asm volatile(                                                                                              \
        "{\n.reg .pred p;\n"                                                                                   \
        "setp.ne.b32 p, %" #P                                                                                  \
        ", 0;\n"                                                                                               \
        "wgmma.mma_async.sync.aligned.m64n" #columns kind " {" FK_N##registers "}, {%" #A0 ", %" #A1 ", %" #A2 \
                                                                               ", %" #A3 "}, %" #B             \
                                                                               ", p, 1, 1, 1;\n"               \
                                                                               "}"                             \
        : FK_D##registers(c, 0)                                                                                \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate))
#define FK_WGMMA_SS_ALL(kind, tail, c)                          \
    if constexpr (N == 32) {                                    \
        FK_WGMMA_SS(32, 16, 16, 17, 18, kind, tail, c);         \
    } else if constexpr (N == 64) {                             \
        FK_WGMMA_SS(64, 32, 32, 33, 34, kind, tail, c);         \
    } else if constexpr (N == 128) {                            \
        FK_WGMMA_SS(128, 64, 64, 65, 66, kind, tail, c);        \
    } else if constexpr (N == 192) {                            \
        FK_WGMMA_SS(192, 96, 96, 97, 98, kind, tail, c);        \
    } else {                                                    \
        static_assert(N == 256, "no such shape of wgmma here"); \
        FK_WGMMA_SS(256, 128, 128, 129, 130, kind, tail, c);    \
    }
#define FK_WGMMA_RS_ALL(kind, c)                                      \
    if constexpr (N == 64) {                                          \
        FK_WGMMA_RS(64, 32, 32, 33, 34, 35, 36, 37, kind, c);         \
    } else if constexpr (N == 96) {                                   \
        FK_WGMMA_RS(96, 48, 48, 49, 50, 51, 52, 53, kind, c);         \
    } else if constexpr (N == 128) {                                  \
        FK_WGMMA_RS(128, 64, 64, 65, 66, 67, 68, 69, kind, c);        \
    } else {                                                          \
        static_assert(N == 256, "no such shape of wgmma here");       \
        FK_WGMMA_RS(256, 128, 128, 129, 130, 131, 132, 133, kind, c); \
    }

// What wgmma_ss adds products of T up in.
template <typename T>
using WgmmaSum = std::conditional_t<std::is_same_v<T, int8_t>, int32_t, float>;

// D [64, N] (+)= A [64, K] B [N, K]^T, both K-major in shared memory; K is 32 bytes of a row. Products of fp8 are added
// up with about 14 bits of the largest. B is of another type where one of the two is e4m3 and the other e5m2.
template <typename T, int N, typename B = T>
__device__ __forceinline__ void wgmma_ss(WgmmaSum<T> (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    if constexpr (std::is_same_v<T, __nv_fp8_e5m2>) {
        static_assert(std::is_same_v<B, __nv_fp8_e4m3>, "no such types of wgmma here");
        FK_WGMMA_SS_ALL("k32.f32.e5m2.e4m3", ", 1, 1", FK_FLOAT)
    } else if constexpr (std::is_same_v<B, __nv_fp8_e5m2>) {
        static_assert(std::is_same_v<T, __nv_fp8_e4m3>, "no such types of wgmma here");
        FK_WGMMA_SS_ALL("k32.f32.e4m3.e5m2", ", 1, 1", FK_FLOAT)
    } else if constexpr (std::is_same_v<T, bf16>) {
        FK_WGMMA_SS_ALL("k16.f32.bf16.bf16", ", 1, 1, 0, 0", FK_FLOAT)
    } else if constexpr (std::is_same_v<T, fp16>) {
        FK_WGMMA_SS_ALL("k16.f32.f16.f16", ", 1, 1, 0, 0", FK_FLOAT)
    } else if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) {
        FK_WGMMA_SS_ALL("k32.f32.e4m3.e4m3", ", 1, 1", FK_FLOAT)
    } else {
        static_assert(std::is_same_v<T, int8_t>, "no such type of wgmma here");
        FK_WGMMA_SS_ALL("k32.s32.s8.s8", "", FK_INT)
    }
}

// D [64, N] (+)= A [64, 16] B [16, N], A in registers, B N-major in shared memory.
template <typename T, int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    if constexpr (std::is_same_v<T, bf16>) {
        FK_WGMMA_RS_ALL("k16.f32.bf16.bf16", FK_FLOAT)
    } else {
        static_assert(std::is_same_v<T, fp16>, "no such type of wgmma here");
        FK_WGMMA_RS_ALL("k16.f32.f16.f16", FK_FLOAT)
    }
}

#undef FK_D8
#undef FK_D16
#undef FK_D32
#undef FK_D48
#undef FK_D64
#undef FK_D96
#undef FK_D128
#undef FK_N8
#undef FK_N16
#undef FK_N32
#undef FK_N48
#undef FK_N64
#undef FK_N96
#undef FK_N128
#undef FK_FLOAT
#undef FK_INT
#undef FK_WGMMA_SS
#undef FK_WGMMA_RS
#undef FK_WGMMA_SS_ALL
#undef FK_WGMMA_RS_ALL

}  // namespace fastkernels
