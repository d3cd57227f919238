// matmul: what all its kernels ask for, and which of them a product goes to.
#include <algorithm>

#include "common/hopper.cuh"
#include "common/launch.h"
#include "gemm/linear_bytes.h"
#include "gemm/matmul_sm80.h"
#include "gemm/matmul_sm90.h"
#include "gemm/matmul_types.h"

namespace fastkernels {
namespace {

constexpr int kFirstSm80Tactic = kLinearTactic + 1;
static_assert(kFirstFewTactic == kFirstSm80Tactic + kNumMatmulSm80Tiles);
static_assert(kNumMatmulTactics == kFirstFewTactic + kNumMatmulFewTiles);

// Where Hopper's tensor cores are not: a tile of 128 x 128 if there is one for every SM.
int default_tactic(const MatmulParams& p) {
    if (fits_linear_bytes(p)) {
        return kLinearTactic;
    }
    const auto tiles = [](int64_t size) { return (size + 127) / 128; };
    return kFirstSm80Tactic + (tiles(p.num_tokens) * tiles(weight_rows(p)) >= num_sms() ? 0 : 1);
}

void matmul_sm80(const MatmulParams& p, int size, void* stream) {
    check(p.scales != MatmulScales::none, "matmul: bf16 and fp16 have tiles for Hopper GPUs alone");
    check(p.in_size % 16 == 0, "matmul: in_size is ", p.in_size, "; with this tactic it must be a multiple of 16");
    const auto run = [&]<typename T, MatmulScales kScales>() {
        check(p.scales == kScales, "matmul: ", name(p.dtype), " does not go with these scales");
        matmul_sm80_tile<T, kScales>(p, size, stream);
    };
    switch (p.dtype) {
        case DType::i8: return run.template operator()<int8_t, MatmulScales::channel>();
        case DType::e5m2: return run.template operator()<__nv_fp8_e5m2, MatmulScales::channel>();
        case DType::e4m3:
            return p.scales == MatmulScales::block ? run.template operator()<__nv_fp8_e4m3, MatmulScales::block>()
                                                   : run.template operator()<__nv_fp8_e4m3, MatmulScales::channel>();
        default:
            fail("matmul: dtype ", name(p.dtype), " is not supported: e4m3, e5m2 and int8 are, and bf16 and fp16 ",
                 "on Hopper");
    }
}

}  // namespace

int64_t matmul_needs_bytes() {
    return on_hopper() ? matmul_workspace_bytes(num_sms()) : 0;
}

void matmul_cuda(const MatmulParams& p, void* stream) {
    if (p.num_tokens == 0 || p.out_size == 0) {
        return;
    }
    const auto address = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight) |
                         reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(p.residual);
    const int64_t bytes = static_cast<int64_t>(size_bytes(p.dtype));
    const int64_t x_stride = p.num_tokens > 1 ? p.x_token_stride * bytes : 0;
    const int64_t weight_stride = weight_rows(p) > 1 ? p.weight_row_stride * bytes : 0;
    const int64_t out_stride =
        p.num_tokens > 1 ? p.out_token_stride * static_cast<int64_t>(size_bytes(p.out_dtype)) : 0;
    const int64_t residual_stride = p.num_tokens > 1 && p.residual != nullptr ? p.residual_token_stride * 2 : 0;
    check(address % 16 == 0 && (x_stride | weight_stride | out_stride | residual_stride) % 16 == 0,
          "matmul: x, weight, residual, out and their rows must be aligned to 16 bytes");
    const bool out_is_bytes = p.out_dtype == DType::e4m3 || p.out_dtype == DType::i8;
    check(out_is_bytes == (p.out_scale != nullptr) &&
              (out_is_bytes || p.out_dtype == DType::bf16 || p.out_dtype == DType::f16),
          "matmul: out is ", name(p.out_dtype),
          ", but the op gives bf16 and fp16, and e4m3 and int8 with an out_scale");
    check((p.bias_dtype == DType::bf16 || p.bias_dtype == DType::f16) && (out_is_bytes || p.bias_dtype == p.out_dtype),
          "matmul: bias and residual must be bf16 or fp16, and where out is no bytes have its type");
    check(!p.gated || (p.bias == nullptr && p.residual == nullptr),
          "matmul: a product with a gate takes no bias and no residual");
    const int64_t multiple = p.gated && p.scales == MatmulScales::block ? 128 : out_is_bytes ? 16 : 8;
    check(is_plain(p) || p.out_size % multiple == 0, "matmul: out_size is ", p.out_size,
          "; with a gate, a residual or out in bytes it must here be a multiple of ", multiple);
    check(p.scales != MatmulScales::block || p.in_size % 128 == 0, "matmul: in_size is ", p.in_size,
          "; with scales of blocks it must be a multiple of 128");
    check(p.in_size > 0 && p.tactic >= -1 && p.tactic < kNumMatmulTactics, "matmul: tactic is ", p.tactic,
          ", but there are 0 to ", kNumMatmulTactics - 1, ", and -1");
    check((p.x_zeros == nullptr) == (p.weight_sums == nullptr) &&
              (p.x_zeros == nullptr || (p.dtype == DType::i8 && p.in_size <= kMaxInSizeWithZeros)),
          "matmul: zero points of x are for int8 and an in_size up to ", kMaxInSizeWithZeros,
          ", and go with the sums of the weight's rows");
    MatmulParams params = p;
    if (p.tactic < 0 && p.scales != MatmulScales::none && !on_hopper()) {
        params.tactic = default_tactic(p);
    }
    if (params.tactic < kLinearTactic || params.tactic >= kFirstFewTactic) {
        matmul_sm90(params, stream);
    } else if (params.tactic == kLinearTactic) {
        linear_bytes(params, stream);
    } else {
        matmul_sm80(params, kMatmulSm80Tiles[params.tactic - kFirstSm80Tactic], stream);
    }
}

}  // namespace fastkernels
