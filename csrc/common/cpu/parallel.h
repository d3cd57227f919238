// Work shared among the CPU's threads. Whoever loads the library gives it a thread pool (the bindings give
// torch's, so that there is one pool in the process and torch.set_num_threads counts); without one it runs serially.
#pragma once

#include <cstdint>

namespace fastkernels::cpu {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
using ParallelForFn = void (*)(int64_t count, int64_t grain, RangeFn fn, void* context);

void set_parallel_for(ParallelForFn parallel_for);
ParallelForFn get_parallel_for();

// body(i) for every i in [0, count); at least `grain` consecutive i run on one thread. body must not throw.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
    const auto range = [](int64_t begin, int64_t end, void* context) {
        const Body& run = *static_cast<const Body*>(context);
        for (int64_t i = begin; i < end; ++i) {
            run(i);
        }
    };
    if (count <= grain) {
        range(0, count, const_cast<Body*>(&body));
        return;
    }
    get_parallel_for()(count, grain, range, const_cast<Body*>(&body));
}

}  // namespace fastkernels::cpu
