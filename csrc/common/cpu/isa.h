// CPU kernels are compiled once for each instruction set below and picked at run time.
//
// A kernel file csrc/<family>/<op>.cpp defines its entry inside `namespace fastkernels::cpu::FK_ISA` and ends
// with FK_CPU_ENTRY(op, Params), which makes `fastkernels::op(const Params&)` call the best variant that this
// processor runs. The build compiles the file with FK_ISA set to baseline (and avx2, avx512 on x86-64). A file that
// multiplies bytes ends with FK_CPU_ENTRY_VNNI instead and is compiled for avx512vnni in place of avx512: without
// VNNI, AVX-512 does such products no better than AVX2.
// Everything a kernel file defines lives in that namespace, so that no variant's code is linked into another.
#pragma once

#ifndef FK_ISA
#define FK_ISA baseline
#define FK_ISA_IS_BASELINE 1
#endif

namespace fastkernels::cpu {

enum class Isa { baseline, avx2, avx512, avx512vnni };

// The best that was built in and this processor runs; FASTKERNELS_CPU_ISA=baseline|avx2|avx512|avx512vnni lowers it.
Isa isa();
const char* isa_name();

}  // namespace fastkernels::cpu

#if defined(FK_ISA_IS_BASELINE) && defined(__x86_64__)
#define FK_CPU_ENTRY(op, Params)                                       \
    namespace fastkernels::cpu {                                       \
    namespace avx2 {                                                   \
    void op(const Params&);                                            \
    }                                                                  \
    namespace avx512 {                                                 \
    void op(const Params&);                                            \
    }                                                                  \
    }                                                                  \
    void fastkernels::op(const Params& params) {                       \
        switch (cpu::isa()) {                                          \
            case cpu::Isa::avx512vnni:                                 \
            case cpu::Isa::avx512: return cpu::avx512::op(params);     \
            case cpu::Isa::avx2: return cpu::avx2::op(params);         \
            case cpu::Isa::baseline: return cpu::baseline::op(params); \
        }                                                              \
    }
#define FK_CPU_ENTRY_VNNI(op, Params)                                      \
    namespace fastkernels::cpu {                                           \
    namespace avx2 {                                                       \
    void op(const Params&);                                                \
    }                                                                      \
    namespace avx512vnni {                                                 \
    void op(const Params&);                                                \
    }                                                                      \
    }                                                                      \
    void fastkernels::op(const Params& params) {                           \
        switch (cpu::isa()) {                                              \
            case cpu::Isa::avx512vnni: return cpu::avx512vnni::op(params); \
            case cpu::Isa::avx512:                                         \
            case cpu::Isa::avx2: return cpu::avx2::op(params);             \
            case cpu::Isa::baseline: return cpu::baseline::op(params);     \
        }                                                                  \
    }
#elif defined(FK_ISA_IS_BASELINE)
#define FK_CPU_ENTRY(op, Params)                 \
    void fastkernels::op(const Params& params) { \
        cpu::baseline::op(params);               \
    }
#define FK_CPU_ENTRY_VNNI FK_CPU_ENTRY
#else
#define FK_CPU_ENTRY(op, Params)
#define FK_CPU_ENTRY_VNNI(op, Params)
#endif
