#include "common/cpu/isa.h"

#include <cstdlib>
#include <cstring>

namespace fastkernels::cpu {
namespace {

Isa detect() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    Isa best = Isa::baseline;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2")) {
        best = Isa::avx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            best = Isa::avx512;
        }
    }
    if (const char* wanted = std::getenv("FASTKERNELS_CPU_ISA")) {
        if (std::strcmp(wanted, "baseline") == 0) {
            return Isa::baseline;
        }
        if (std::strcmp(wanted, "avx2") == 0 && best == Isa::avx512) {
            return Isa::avx2;
        }
    }
    return best;
#else
    return Isa::baseline;
#endif
}

}  // namespace

Isa isa() {
    static const Isa best = detect();
    return best;
}

const char* isa_name() {
    switch (isa()) {
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::baseline: break;
    }
    return "baseline";
}

}  // namespace fastkernels::cpu
