// The element types of tensors as a run-time value. Host code only, no CUDA: the CPU's C++ types for
// them are in common/cpu/dtype.h, the GPU's in common/dtype.cuh.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/check.h"

namespace fastkernels {

enum class DType : int8_t { f32, f16, bf16, i32, i64, e4m3, e5m2, i8 };

inline const char* name(DType dtype) {
    switch (dtype) {
        case DType::f32: return "fp32";
        case DType::f16: return "fp16";
        case DType::bf16: return "bf16";
        case DType::i32: return "int32";
        case DType::i64: return "int64";
        case DType::e4m3: return "e4m3";
        case DType::e5m2: return "e5m2";
        case DType::i8: return "int8";
    }
    fail("unknown dtype ", static_cast<int>(dtype));
}

inline size_t size_bytes(DType dtype) {
    switch (dtype) {
        case DType::f16:
        case DType::bf16: return 2;
        case DType::f32:
        case DType::i32: return 4;
        case DType::i64: return 8;
        case DType::e4m3:
        case DType::e5m2:
        case DType::i8: return 1;
    }
    fail("unknown dtype ", static_cast<int>(dtype));
}

}  // namespace fastkernels
