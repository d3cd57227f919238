#include "common/cpu/parallel.h"

namespace fastkernels::cpu {
namespace {

ParallelForFn pool = [](int64_t count, int64_t, RangeFn fn, void* context) { fn(0, count, context); };

}  // namespace

void set_parallel_for(ParallelForFn parallel_for) {
    pool = parallel_for;
}

ParallelForFn get_parallel_for() {
    return pool;
}

}  // namespace fastkernels::cpu
