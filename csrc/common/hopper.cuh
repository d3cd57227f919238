// Whether kernels for sm_90a can run: the current device is a Hopper GPU, and this build has code for it.
#pragma once

#include "common/launch.h"

namespace fastkernels {
namespace {

// A build for other GPUs alone leaves this kernel empty.
__global__ void hopper_code(int* built) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    *built = 1;
#endif
}

bool on_hopper() {
    static const bool built = [] {
        cudaFuncAttributes attributes{};
        return cudaFuncGetAttributes(&attributes, hopper_code) == cudaSuccess && attributes.ptxVersion >= 90;
    }();
    return compute_capability() == 90 && built;
}

}  // namespace
}  // namespace fastkernels
