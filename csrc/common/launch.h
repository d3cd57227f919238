// The one way a kernel is launched: on the caller's stream, optionally as a programmatic dependent of the
// kernel before it (PDL, sm_90 and later), with the launch error turned into an exception.
#pragma once

#include <cuda_runtime.h>

#include "common/check.h"

namespace fastkernels {

inline void check_cuda(cudaError_t error, const char* what) {
    if (error != cudaSuccess) [[unlikely]] {
        fail(what, ": ", cudaGetErrorString(error));
    }
}

inline int device_attribute(cudaDeviceAttr attribute) {
    int device = 0, value = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
    return value;
}

inline int num_sms() {
    return device_attribute(cudaDevAttrMultiProcessorCount);
}

// 80, 90, ... of the current device
inline int compute_capability() {
    return device_attribute(cudaDevAttrComputeCapabilityMajor) * 10 +
           device_attribute(cudaDevAttrComputeCapabilityMinor);
}

struct LaunchConfig {
    dim3 grid;
    dim3 block;
    size_t shared_bytes = 0;
    // The kernel calls pdl_wait() before it touches what an earlier kernel writes (common/ptx/pdl.cuh).
    bool pdl = false;
    unsigned cluster = 1;  // blocks of a cluster along x (sm_90 and later), a divisor of the grid's; up to 16
};

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& config, void* stream, Args&&... args) {
    if (config.shared_bytes > 48 * 1024) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(config.shared_bytes)),
                   "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
    }
    if (config.cluster > 8) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                   "cudaFuncSetAttribute(NonPortableClusterSizeAllowed)");
    }
    cudaLaunchAttribute attributes[2]{};
    cudaLaunchConfig_t launch_config{};
    launch_config.gridDim = config.grid;
    launch_config.blockDim = config.block;
    launch_config.dynamicSmemBytes = config.shared_bytes;
    launch_config.stream = static_cast<cudaStream_t>(stream);
    launch_config.attrs = attributes;
    if (config.pdl && compute_capability() >= 90) {
        cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
    }
    if (config.cluster > 1) {
        cudaLaunchAttribute& attribute = attributes[launch_config.numAttrs++];
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim = {config.cluster, 1, 1};
    }
    check_cuda(cudaLaunchKernelEx(&launch_config, kernel, std::forward<Args>(args)...), "kernel launch");
}

}  // namespace fastkernels
