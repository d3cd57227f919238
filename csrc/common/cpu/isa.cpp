#include "common/cpu/isa.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace fastkernels::cpu {
namespace {

const char* name(Isa isa) {
    switch (isa) {
        case Isa::avx512vnni: return "avx512vnni";
        case Isa::avx512: return "avx512";
        case Isa::avx2: return "avx2";
        case Isa::baseline: break;
    }
    return "baseline";
}

Isa detect() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    Isa best = Isa::baseline;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2")) {
        best = Isa::avx2;
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            best = __builtin_cpu_supports("avx512vnni") ? Isa::avx512vnni : Isa::avx512;
        }
    }
    if (const char* wanted = std::getenv("FASTKERNELS_CPU_ISA")) {
        for (const Isa lower : {Isa::baseline, Isa::avx2, Isa::avx512}) {
            if (std::strcmp(wanted, name(lower)) == 0) {
                return std::min(lower, best);
            }
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
    return name(isa());
}

}  // namespace fastkernels::cpu
