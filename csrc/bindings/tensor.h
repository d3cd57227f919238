// What every bindings file needs to hand a torch tensor to a launcher.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "common/byte_scales.h"
#include "common/check.h"
#include "common/dtype.h"

namespace fastkernels {

using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* name);

// The current CUDA stream of the tensor's device.
void* stream_of(const Tensor& tensor);

// The type of out and the scales of a *_quant op; kind: 0 tensor, 1 token, 2 block.
ByteScales byte_scales(const char* op, const Tensor& y, int64_t kind, const Tensor& scales, bool takes_e5m2 = false);

inline const void* in(const Tensor& tensor) {
    return tensor.const_data_ptr();
}
// The scales of a cache of one-byte elements, fp32 [num_kv_heads]; null where none are given.
const float* scales_of(const char* op, const char* name, const std::optional<Tensor>& scales, int64_t num_kv_heads);

inline void* out(const Tensor& tensor) {
    return tensor.mutable_data_ptr();
}

}  // namespace fastkernels

// FK_LAUNCH(op, tensor, params): op_cuda on the tensor's device and stream, or op_cpu.
#if FASTKERNELS_WITH_CUDA
#define FK_LAUNCH(op, tensor, params)                                                   \
    do {                                                                                \
        if ((tensor).is_cuda()) {                                                       \
            torch::stable::accelerator::DeviceGuard guard((tensor).get_device_index()); \
            op##_cuda(params, ::fastkernels::stream_of(tensor));                        \
        } else {                                                                        \
            op##_cpu(params);                                                           \
        }                                                                               \
    } while (false)
#else
#define FK_LAUNCH(op, tensor, params) op##_cpu(params)
#endif

// FK_REGISTER_IMPLS(register_impls): register_impls(m) is a list of m.impl(...) lines, registered for the CPU and, when
// built in, CUDA.
#if FASTKERNELS_WITH_CUDA
#define FK_REGISTER_IMPLS(register_impls)             \
    STABLE_TORCH_LIBRARY_IMPL(fastkernels, CPU, m) {  \
        register_impls(m);                            \
    }                                                 \
    STABLE_TORCH_LIBRARY_IMPL(fastkernels, CUDA, m) { \
        register_impls(m);                            \
    }
#else
#define FK_REGISTER_IMPLS(register_impls)            \
    STABLE_TORCH_LIBRARY_IMPL(fastkernels, CPU, m) { \
        register_impls(m);                           \
    }
#endif
