// matmul_cuda alone: every tactic against a simple kernel at awkward sizes, then times at Llama-3.1-8B's shapes.
//   nvcc -std=c++20 -gencode=arch=compute_90a,code=sm_90a $(cat csrc/nvcc_flags.txt) -Icsrc -Icsrc/include \
//        scratch/matmul_bench.cu csrc/gemm/matmul_sm90*.cu -o matmul_bench
//   ./matmul_bench check | time [bf16|fp8|block|int8]... ; fails with 1 at a wrong result
// Times: calls in a CUDA graph, the weight (and x) rotated past L2, median of 7 replays. Peers: benchmarks/gemm.py.
#include <cuda_fp8.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "common/dtype.cuh"
#include "common/launch.h"
#include "gemm/matmul_sm90.h"

using namespace fastkernels;
using e4m3 = __nv_fp8_e4m3;

#define CK(x) do { cudaError_t e = (x); if (e != cudaSuccess) { std::printf("%s: %s, line %d\n", #x, cudaGetErrorString(e), __LINE__); std::exit(1); } } while (0)

__device__ float random_at(size_t i, unsigned seed) {
    unsigned h = static_cast<unsigned>(i) * 2654435761u + static_cast<unsigned>(i >> 32) * 97u + seed;
    h ^= h >> 15; h *= 2246822519u; h ^= h >> 13; h *= 3266489917u; h ^= h >> 16;
    return static_cast<int>(h & 0xffff) / 65536.0f - 0.5f;
}
template <typename T> __device__ T make(float r);
template <> __device__ float make<float>(float r) { return (r + 1.0f) * 0.01f; }
template <> __device__ bf16 make<bf16>(float r) { return __float2bfloat16(r); }
template <> __device__ fp16 make<fp16>(float r) { return __float2half(r); }
template <> __device__ e4m3 make<e4m3>(float r) { return e4m3(r * 32.0f); }
template <> __device__ int8_t make<int8_t>(float r) { return static_cast<int8_t>(r * 254.0f); }
template <typename T> __global__ void fill(T* p, size_t n, unsigned seed) {
    for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < n; i += size_t{gridDim.x} * blockDim.x) p[i] = make<T>(random_at(i, seed));
}
__device__ float as_float(bf16 x) { return __bfloat162float(x); }
__device__ float as_float(fp16 x) { return __half2float(x); }
__device__ float as_float(e4m3 x) { return static_cast<float>(x); }
__device__ float as_float(int8_t x) { return x; }

// A warp an element. error: sum of squares of the difference and of the exact value, count of elements off by much.
template <typename T> __global__ void reference(MatmulParams p, double* error) {
    const int64_t id = (blockIdx.x * int64_t{blockDim.x} + threadIdx.x) / 32;
    const int lane = threadIdx.x % 32;
    if (id >= p.num_tokens * p.out_size) return;
    const int64_t m = id / p.out_size, n = id % p.out_size;
    double sum = 0, size = 0;
    for (int64_t k = lane; k < p.in_size; k += 32) {
        double v = double(as_float(static_cast<const T*>(p.x)[m * p.x_token_stride + k])) * as_float(static_cast<const T*>(p.weight)[n * p.weight_row_stride + k]);
        if (p.scales == MatmulScales::block) v *= double(p.x_scales[m * (p.in_size / 128) + k / 128]) * p.weight_scales[n / 128 * (p.in_size / 128) + k / 128];
        sum += v; size += v * v;
    }
    for (int o = 16; o; o /= 2) { sum += __shfl_xor_sync(~0u, sum, o); size += __shfl_xor_sync(~0u, size, o); }
    if (lane) return;
    if (p.scales == MatmulScales::channel) { const double s = double(p.x_scales[m]) * p.weight_scales[p.num_weight_scales == 1 ? 0 : n]; sum *= s; size *= s * s; }
    if (p.bias) sum += p.out_dtype == DType::bf16 ? as_float(static_cast<const bf16*>(p.bias)[n]) : as_float(static_cast<const fp16*>(p.bias)[n]);
    const double y = p.out_dtype == DType::bf16 ? as_float(static_cast<const bf16*>(p.out)[m * p.out_token_stride + n]) : as_float(static_cast<const fp16*>(p.out)[m * p.out_token_stride + n]);
    const double d = y - sum;
    atomicAdd(&error[0], d * d); atomicAdd(&error[1], sum * sum);
    if (!(fabs(d) <= 0.02 * fabs(sum) + 0.05 * sqrt(size))) atomicAdd(&error[2], 1.0);  // NaN too
}
// Bytes that differ: of two outputs, and of what lies beside the columns of an output from 0xff.
__global__ void compare(const uint16_t* a, const uint16_t* b, int64_t rows, int64_t columns, int64_t stride, int* different) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * stride; i += int64_t{gridDim.x} * blockDim.x)
        if (i % stride < columns ? a[i] != b[i] : a[i] != 0xffff) atomicAdd(different, 1);
}

struct Type { const char* name; DType dtype; MatmulScales scales; int bytes; };
const Type kTypes[] = {{"bf16", DType::bf16, MatmulScales::none, 2}, {"fp16", DType::f16, MatmulScales::none, 2}, {"fp8", DType::e4m3, MatmulScales::channel, 1}, {"block", DType::e4m3, MatmulScales::block, 1}, {"int8", DType::i8, MatmulScales::channel, 1}};
cudaStream_t stream;
char *weights, *xs, *outs, *outs2, *workspace; float *x_scales, *weight_scales; void* bias; double* error; int* different;
const size_t kWeightBytes = 1200ull << 20, kXBytes = 1ull << 30, kOutBytes = 8192ull * 28672 * 2 + (1 << 20);
int failures = 0;

void fill_for(DType dtype) {
    const auto all = [&](auto* unit) { using T = std::remove_pointer_t<decltype(unit)>; fill<<<1024, 256, 0, stream>>>(reinterpret_cast<T*>(weights), kWeightBytes / sizeof(T), 1u); fill<<<1024, 256, 0, stream>>>(reinterpret_cast<T*>(xs), kXBytes / sizeof(T), 7u); };
    switch (dtype) { case DType::bf16: all((bf16*)0); break; case DType::f16: all((fp16*)0); break; case DType::e4m3: all((e4m3*)0); break; default: all((int8_t*)0); }
    CK(cudaStreamSynchronize(stream));
}
MatmulParams params(const Type& t, int64_t M, int64_t N, int64_t K, int64_t pad, bool with_bias, DType out_dtype) {
    const int64_t x_stride = (K + 15) / 16 * 16 + pad, out_stride = (N + 7) / 8 * 8 + pad;
    MatmulParams p{};
    p.x = xs; p.weight = weights; p.x_scales = x_scales; p.weight_scales = weight_scales; p.bias = with_bias ? bias : nullptr; p.out = outs; p.workspace = workspace;
    p.num_tokens = M; p.in_size = K; p.out_size = N; p.x_token_stride = x_stride; p.weight_row_stride = (K + 15) / 16 * 16; p.out_token_stride = out_stride;
    p.num_weight_scales = with_bias ? N : 1;
    p.constant_weight = true; p.scales = t.scales; p.dtype = t.dtype; p.out_dtype = out_dtype; p.tactic = -1;
    if (with_bias) { if (out_dtype == DType::bf16) fill<<<64, 256, 0, stream>>>((bf16*)bias, N, 3u); else fill<<<64, 256, 0, stream>>>((fp16*)bias, N, 3u); }
    return p;
}
double check_one(const Type& t, MatmulParams p) {
    const size_t bytes = p.num_tokens * p.out_token_stride * 2;
    CK(cudaMemsetAsync(outs, 0xff, bytes, stream)); CK(cudaMemsetAsync(outs2, 0xff, bytes, stream)); CK(cudaMemsetAsync(error, 0, 24, stream)); CK(cudaMemsetAsync(different, 0, 4, stream));
    p.out = outs2; matmul_cuda(p, stream); p.out = outs; matmul_cuda(p, stream);
    const unsigned grid = static_cast<unsigned>((p.num_tokens * p.out_size * 32 + 255) / 256);
    switch (t.dtype) { case DType::bf16: reference<bf16><<<grid, 256, 0, stream>>>(p, error); break; case DType::f16: reference<fp16><<<grid, 256, 0, stream>>>(p, error); break; case DType::e4m3: reference<e4m3><<<grid, 256, 0, stream>>>(p, error); break; default: reference<int8_t><<<grid, 256, 0, stream>>>(p, error); }
    compare<<<256, 256, 0, stream>>>((uint16_t*)outs, (uint16_t*)outs2, p.num_tokens, p.out_size, p.out_token_stride, different);
    double h[3]; int d; CK(cudaMemcpyAsync(h, error, 24, cudaMemcpyDeviceToHost, stream)); CK(cudaMemcpyAsync(&d, different, 4, cudaMemcpyDeviceToHost, stream)); CK(cudaStreamSynchronize(stream));
    const double e = std::sqrt(h[0] / h[1]);
    const bool fast = t.dtype == DType::e4m3 && p.tactic >= 0 && kMatmulTiles[p.tactic / 2].columns == 256;
    if (!(e < (fast ? 1e-2 : 3e-3)) || h[2] != 0 || d != 0) {
        ++failures;
        if (failures < 40) std::printf("WRONG %-5s tactic %2d M %lld N %lld K %lld bias %d fp16 out %d: error %.2e, %.0f far off, %d differ\n", t.name, p.tactic, (long long)p.num_tokens, (long long)p.out_size, (long long)p.in_size, p.bias != nullptr, p.out_dtype == DType::f16, e, h[2], d);
    }
    return e;
}
void check_type(const Type& t) {
    fill_for(t.dtype);
    const int64_t unit = t.scales == MatmulScales::block ? 128 : 16 / t.bytes;
    double worst[2] = {0, 0}; int cases = 0;
    for (int tactic = -1; tactic < kNumMatmulTactics; ++tactic) {
        if (tactic >= 0 && !has_matmul_tile(kMatmulTiles[tactic / 2], t.dtype == DType::e4m3, t.scales)) continue;
        double here = 0;
        for (int64_t M : {1, 17, 31, 64, 65, 127, 128, 129, 300}) for (int64_t N : {8, 72, 256, 264, 1000, 4096}) for (int64_t K : {unit, 3 * unit, int64_t{512}, 1024 + unit, int64_t{4096}}) {
            if ((M * N > 200000 && K > 2000) || (tactic % 3 && M == 31)) continue;
            MatmulParams p = params(t, M, N, K, M % 2 ? 16 : 0, (M + N / 8 + K / unit) % 2, t.bytes == 2 ? t.dtype : N % 16 ? DType::f16 : DType::bf16);
            p.tactic = tactic; here = std::max(here, check_one(t, p)); ++cases;
        }
        for (auto [M, N, K] : {std::array<int64_t, 3>{64, 4096, 14336}, {1000, 2056, 4096}}) { MatmulParams p = params(t, M, N, K, 0, true, DType::bf16); if (t.dtype == DType::f16) p.out_dtype = DType::f16; p.tactic = tactic; here = std::max(here, check_one(t, p)); ++cases; }
        const bool fast = t.dtype == DType::e4m3 && tactic >= 0 && kMatmulTiles[tactic / 2].columns == 256;
        worst[fast] = std::max(worst[fast], here);
    }
    std::printf("check %-5s %d cases, worst relative error %.2e, of 256 columns in fp8 %.2e, %d failures so far\n", t.name, cases, worst[0], worst[1], failures); std::fflush(stdout);
}
float time_one(MatmulParams p, int element_bytes) {
    const size_t weight = p.out_size * p.weight_row_stride * element_bytes, x = p.num_tokens * p.x_token_stride * element_bytes;
    const int sets = std::max<int>(1, std::min<size_t>(16, kWeightBytes / weight)), x_sets = std::max<int>(1, std::min<size_t>(4, kXBytes / x));
    const double guess = 2e-15 * p.num_tokens * p.out_size * p.in_size + weight / 4e12 * 1e0; const int calls = std::max(3, std::min<int>(sets * 2, static_cast<int>(0.004 / guess)));
    cudaGraph_t graph; cudaGraphExec_t exec;
    CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < calls; ++i) { p.weight = weights + i % sets * weight; p.x = xs + i % x_sets * x; matmul_cuda(p, stream); }
    CK(cudaStreamEndCapture(stream, &graph)); CK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b; CK(cudaEventCreate(&a)); CK(cudaEventCreate(&b)); std::vector<float> times;
    for (int i = 0; i < 8; ++i) { CK(cudaEventRecord(a, stream)); CK(cudaGraphLaunch(exec, stream)); CK(cudaEventRecord(b, stream)); CK(cudaStreamSynchronize(stream)); float ms; CK(cudaEventElapsedTime(&ms, a, b)); if (i) times.push_back(ms); }
    std::sort(times.begin(), times.end()); CK(cudaEventDestroy(a)); CK(cudaEventDestroy(b)); CK(cudaGraphExecDestroy(exec)); CK(cudaGraphDestroy(graph));
    return times[times.size() / 2] * 1e3f / calls;
}
void time_type(const Type& t) {
    fill_for(t.dtype);
    struct Shape { const char* name; int64_t N, K; };
    std::vector<Shape> shapes = {{"qkv", 6144, 4096}, {"o", 4096, 4096}, {"gate_up", 28672, 4096}, {"down", 4096, 14336}};
    for (int64_t M : {16, 32, 64, 128, 256, 512, 2048, 8192, 4096}) {
        std::vector<Shape> here = shapes; if (M == 4096) here = {{"deepseek", 7168, 16384}};
        for (const Shape& s : here) {
            const double bytes = double(s.N * s.K + M * s.K) * t.bytes + double(M) * s.N * 2, flops = 2.0 * M * s.N * s.K;
            std::string line; float best = 1e9f, chosen = 0; int best_tactic = -1;
            for (int tactic = -1; tactic < kNumMatmulTactics; ++tactic) {
                if (tactic >= 0) { const MatmulTile& tile = kMatmulTiles[tactic / 2]; if (!has_matmul_tile(tile, t.dtype == DType::e4m3, t.scales) || (tile.tokens_are_a ? M <= 64 : M > 2 * tile.columns && M > 128)) continue; }
                MatmulParams p = params(t, M, s.N, s.K, 0, false, t.dtype == DType::f16 ? DType::f16 : DType::bf16); p.tactic = tactic;
                const float us = time_one(p, t.bytes);
                if (tactic < 0) chosen = us; else { char buf[32]; std::snprintf(buf, sizeof buf, " %d:%.1f", tactic, us); line += buf; if (us < best) { best = us; best_tactic = tactic; } }
            }
            std::printf("%-5s %-8s M %-4lld default %.1f, best %.1f (tactic %d) us, %.2f TB/s, %.0f TFLOP/s |%s\n", t.name, s.name, (long long)M, chosen, best, best_tactic, bytes / best / 1e6, flops / best / 1e6, line.c_str()); std::fflush(stdout);
        }
    }
}
int main(int argc, char** argv) {
    const std::string what = argc > 1 ? argv[1] : "check";
    CK(cudaStreamCreate(&stream)); CK(cudaMalloc(&weights, kWeightBytes)); CK(cudaMalloc(&xs, kXBytes)); CK(cudaMalloc(&outs, kOutBytes)); CK(cudaMalloc(&outs2, kOutBytes));
    const size_t workspace_bytes = matmul_workspace_bytes(num_sms()); CK(cudaMalloc(&workspace, workspace_bytes)); CK(cudaMemset(workspace, 0, workspace_bytes));
    CK(cudaMalloc(&x_scales, 8192 * 128 * 4)); CK(cudaMalloc(&weight_scales, 128256 * 4)); CK(cudaMalloc(&bias, 128256 * 2)); CK(cudaMalloc(&error, 24)); CK(cudaMalloc(&different, 4));
    fill<<<256, 256>>>(x_scales, size_t{8192} * 128, 11u); fill<<<256, 256>>>(weight_scales, size_t{128256}, 13u); CK(cudaDeviceSynchronize());
    for (const Type& t : kTypes) {
        bool wanted = argc <= 2; for (int i = 2; i < argc; ++i) wanted |= std::strcmp(argv[i], t.name) == 0;
        if (wanted && what == "check") check_type(t); else if (wanted) time_type(t);
    }
    if (failures) std::printf("%d FAILURES\n", failures);
    return failures != 0;
}
