// Checks and times every tactic of weight_only_linear at Llama-3.1-8B's shapes: cold weights (rotated past L2), graphs of
// launches with PDL, the median of 9 replays; beside them bf16 linear_kernel and a copy's bandwidth of the same run.
//   nvcc -std=c++20 -gencode=arch=compute_90a,code=sm_90a -O3 --expt-relaxed-constexpr -Icsrc -Icsrc/include
//        scratch/weight_only_bench.cu csrc/gemm/weight_only*.cu csrc/gemm/linear.cu -o weight_only_bench
//   weight_only_bench [quick|all]
// The check reads random bytes as units, as gemm/weight_only.h says, with a kernel of one thread a weight row.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "common/dtype.cuh"
#include "common/launch.h"
#include "gemm/weight_only.h"

using namespace fastkernels;

#define CK(x)                                                                              \
    do {                                                                                   \
        cudaError_t e = (x);                                                               \
        if (e) {                                                                           \
            std::printf("%s line %d\n", cudaGetErrorString(e), __LINE__);                  \
            std::exit(1);                                                                  \
        }                                                                                  \
    } while (0)

__device__ unsigned mix(unsigned h) {
    h *= 2654435761u;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    return h;
}

// Random codes; scales of a sensible size. unit: bytes, data: those before the scales.
__global__ void fill_units(uint8_t* p, size_t n, int unit, int data, int format, unsigned seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        const int at = i % unit;
        unsigned h = mix((unsigned)i * 3u + seed);
        uint8_t byte = h >> 8;
        const PackedFormat f = (PackedFormat)format;
        if (at < data) {
            if ((f == PackedFormat::e4m3 || f == PackedFormat::e4m3_block) && (byte & 127) == 127) {
                byte ^= 1;
            }
        } else {
            const int s = at - data;
            if (f == PackedFormat::nvfp4) {
                byte = 56 + h % 40;
            } else if (f == PackedFormat::mxfp4) {
                byte = 242 + h % 4;
            } else if (f == PackedFormat::e4m3_block) {
                const float v = s / 4 ? 0.0f : 0.5f + (mix((unsigned)(i / unit) + seed) & 255) / 256.0f;
                byte = __float_as_uint(v) >> s % 4 * 8;
            } else {
                const int groups = f == PackedFormat::int4_g128 || f == PackedFormat::int4_g128_zeros   ? 1
                                   : f == PackedFormat::int4_g64 || f == PackedFormat::int4_g64_zeros ? 2
                                                                                                      : 4;
                byte = s >= groups * 32 ? h % 16 : s % 2 ? 0x38 : byte;  // fp16 of 0.5 to 1, or a zero point
            }
        }
        p[i] = byte;
    }
}

__global__ void fill_x(bf16* p, size_t n, unsigned seed) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        p[i] = __float2bfloat16((int)(mix((unsigned)i + seed) & 0xffff) / 32768.0f - 1.0f);
    }
}

__global__ void fill_floats(float* p, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        p[i] = 0.5f + (mix((unsigned)i) & 255) / 256.0f;
    }
}

__device__ double half_at(const uint8_t* p) {
    __half h;
    memcpy(&h, p, 2);
    return (double)__half2float(h);
}

__device__ double e2m1(int code) {
    const double m[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    return code & 8 ? -m[code & 7] : m[code & 7];
}

// The weight at (row, k) of a unit, by the words of gemm/weight_only.h.
__device__ double weight_at(const uint8_t* unit, PackedFormat f, int row, int k) {
    const int g = row % 8, half = row / 8;
    const bool byte = f == PackedFormat::int8 || f == PackedFormat::e4m3 || f == PackedFormat::e4m3_block;
    if (byte) {
        const int u = k / 32, t = k % 32 / 8, j = k % 8 / 4, h = k % 4 / 2, low = k % 2;
        const uint8_t code = unit[u * 512 + (g * 4 + t) * 16 + j * 8 + h * 4 + low * 2 + half];
        if (f == PackedFormat::int8) {
            return (double)(int8_t)code;
        }
        const int e = code >> 3 & 15, m = code & 7;
        double v = e ? ldexp(1.0 + m / 8.0, e - 7) : ldexp(m / 8.0, -6);
        v = code & 128 ? -v : v;
        float s = 1;
        if (f == PackedFormat::e4m3_block) {
            memcpy(&s, unit + 2048, 4);
        }
        return v * s;
    }
    const int u = k / 64, s = k % 64 / 32, t = k % 32 / 8, j = k % 8 / 4, p = k % 4 / 2, low = k % 2, i = 2 * p + half;
    uint32_t word;
    memcpy(&word, unit + u * 512 + (g * 4 + t) * 16 + (2 * s + j) * 4, 4);
    const unsigned bits = word >> 16 * low & 0xffff;
    const uint8_t* scales = unit + 1024;
    if (f == PackedFormat::nvfp4 || f == PackedFormat::mxfp4) {
        const int place[4][4] = {{15, 8, 7, 6}, {12, 5, 4, 3}, {9, 2, 1, 0}, {14, 13, 11, 10}};
        int code = 0;
        for (int n = 0; n < 4; ++n) {
            code |= (bits >> place[i][n] & 1) << (3 - n);
        }
        if (f == PackedFormat::nvfp4) {
            const int c = scales[((u * 2 + t / 2) * 8 + g) * 4 + s * 2 + half];
            return e2m1(code) * ldexp(1.0 + (c & 7) / 8.0, (c >> 3) - 10);
        }
        const int c = scales[(u * 8 + g) * 4 + s * 2 + half];
        return e2m1(code) * ldexp(1.0, c - 245);
    }
    const int groups = f == PackedFormat::int4_g128 || f == PackedFormat::int4_g128_zeros ? 1
                       : f == PackedFormat::int4_g64 || f == PackedFormat::int4_g64_zeros ? 2
                                                                                          : 4;
    const int group = k / (128 / groups);
    const bool zeros = f >= PackedFormat::int4_g128_zeros && f <= PackedFormat::int4_g32_zeros;
    const int zero = zeros ? scales[groups * 32 + group * 16 + g * 2 + half] : 8;
    return ((int)(bits >> 4 * i & 15) - zero) * half_at(scales + group * 32 + g * 4 + half * 2);
}

// A warp a (row, token) of every 61st row.
__global__ void compare(const bf16* x, const uint8_t* packed, const float* factors, const bf16* out, double* err,
                        int format, int unit, int tokens, int n, int k_size) {
    const int id = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    const int row = id / tokens * 61, token = id % tokens;
    if (row >= n) {
        return;
    }
    double sum = 0;
    const int chunks = (k_size + 127) / 128;
    for (int k = lane; k < k_size; k += 32) {
        const uint8_t* at = packed + ((size_t)(row / 16) * chunks + k / 128) * unit;
        sum += weight_at(at, (PackedFormat)format, row % 16, k % 128) *
               (double)__bfloat162float(x[(size_t)token * k_size + k]);
    }
    for (int o = 16; o; o /= 2) {
        sum += __shfl_xor_sync(~0u, sum, o);
    }
    if (lane == 0) {
        sum *= (double)factors[row];
        const double got = (double)__bfloat162float(out[(size_t)token * n + row]);
        const double d = got - sum;
        atomicAdd(&err[0], d == d ? d * d : 1e30);
        atomicAdd(&err[1], sum * sum);
    }
}

__global__ void copy_kernel(const uint4* from, uint4* to, size_t n) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += (size_t)gridDim.x * blockDim.x) {
        to[i] = from[i];
    }
}

cudaStream_t stream;
constexpr size_t kPool = 1ull << 31;
uint8_t* pool;
bf16 *x, *out;
float* factors;
double* err;

template <typename F>
float time_us(int calls, F&& call) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < calls; ++i) {
        call(i);
    }
    CK(cudaStreamEndCapture(stream, &graph));
    CK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t a, b;
    CK(cudaEventCreate(&a));
    CK(cudaEventCreate(&b));
    std::vector<float> times;
    for (int i = 0; i < 9; ++i) {
        CK(cudaEventRecord(a, stream));
        CK(cudaGraphLaunch(exec, stream));
        CK(cudaEventRecord(b, stream));
        CK(cudaStreamSynchronize(stream));
        float ms;
        CK(cudaEventElapsedTime(&ms, a, b));
        times.push_back(ms);
    }
    std::sort(times.begin(), times.end());
    CK(cudaGraphExecDestroy(exec));
    CK(cudaGraphDestroy(graph));
    return times[4] * 1e3f / calls;
}

struct Shape {
    const char* name;
    int n, k;
};
const Shape kShapes[] = {{"qkv", 6144, 4096}, {"o", 4096, 4096}, {"gate_up", 28672, 4096}, {"down", 4096, 14336}};
const char* kNames[] = {"int4-g128", "int4-g64", "int4-g32", "int4-g128z", "int4-g64z", "int4-g32z",
                        "int8",      "e4m3",     "e4m3-blk", "nvfp4",      "mxfp4"};
float copy_tb_s;
int failures = 0;

void bench(int format, const std::vector<int>& tokens, bool tactics, bool timed) {
    const PackedFormat f = (PackedFormat)format;
    const int unit = unit_bytes(f);
    const int data = f == PackedFormat::int8 || f == PackedFormat::e4m3 || f == PackedFormat::e4m3_block ? 2048 : 1024;
    fill_units<<<1024, 256, 0, stream>>>(pool, kPool, unit, data, format, 7);
    CK(cudaStreamSynchronize(stream));
    for (const Shape& s : kShapes) {
        const size_t bytes = packed_bytes(f, s.n, s.k);
        const int sets = std::max(2, std::min<int>(32, 400e6 / bytes)), calls = std::max(sets, 8);
        for (const int m : tokens) {
            std::printf("%-10s %-8s M%-3d floor %5.1f:", kNames[format], s.name, m, bytes / copy_tb_s / 1e6);
            float best = 1e9;
            for (int tactic = 0; tactic <= (tactics ? kWeightOnlyTactics : 0); ++tactic) {
                WeightOnlyParams p{};
                p.x = x;
                p.packed = pool;
                p.row_factors = factors;
                p.out = out;
                p.num_tokens = m;
                p.in_size = s.k;
                p.out_size = s.n;
                p.x_token_stride = s.k;
                p.out_token_stride = s.n;
                p.format = f;
                p.tactic = tactic;
                p.constant_weight = true;
                p.dtype = DType::bf16;
                CK(cudaMemsetAsync(out, 0xff, (size_t)m * s.n * 2, stream));
                CK(cudaMemsetAsync(err, 0, 16, stream));
                weight_only_linear_cuda(p, stream);
                const int warps = (s.n + 60) / 61 * m;
                compare<<<(warps * 32 + 255) / 256, 256, 0, stream>>>(x, pool, factors, out, err, format, unit, m, s.n,
                                                                     s.k);
                double h[2];
                CK(cudaMemcpyAsync(h, err, 16, cudaMemcpyDeviceToHost, stream));
                CK(cudaStreamSynchronize(stream));
                const double off = std::sqrt(h[0] / h[1]);
                const bool good = off < 3e-3;
                failures += !good;
                float us = 0;
                if (timed) {
                    us = time_us(calls, [&](int i) {
                        p.packed = pool + i % sets * bytes / unit * unit;
                        weight_only_linear_cuda(p, stream);
                    });
                    best = std::min(best, us);
                }
                std::printf(" %s%d %.2f%s", tactic ? "t" : "auto ", tactic, us, good ? "" : " WRONG");
                if (!good) {
                    std::printf("(%.1e)", off);
                }
            }
            std::printf("  best %.2f = %.2f TB/s, %.2f of copy\n", best, bytes / best / 1e6,
                        bytes / best / 1e6 / copy_tb_s);
        }
    }
}

int main(int argc, char** argv) {
    const bool all = argc > 1 && std::strcmp(argv[1], "all") == 0;
    CK(cudaStreamCreate(&stream));
    CK(cudaMalloc(&pool, kPool));
    CK(cudaMalloc(&x, 256 * 14336 * 2));
    CK(cudaMalloc(&out, 256 * 28672 * 2));
    CK(cudaMalloc(&factors, 28672 * 4));
    CK(cudaMalloc(&err, 16));
    fill_x<<<1024, 256, 0, stream>>>(x, 256 * 14336, 3);
    fill_floats<<<64, 256, 0, stream>>>(factors, 28672);
    copy_tb_s = kPool / time_us(2, [&](int) {
                    copy_kernel<<<132 * 16, 512, 0, stream>>>((uint4*)pool, (uint4*)(pool + kPool / 2), kPool / 32);
                }) / 1e6;
    std::printf("copy %.2f TB/s\n", copy_tb_s);
    // bf16 weights of the same run
    for (const Shape& s : kShapes) {
        for (const int m : {1, 16}) {
            LinearParams p{};
            p.x = x;
            p.out = out;
            p.num_tokens = m;
            p.in_size = s.k;
            p.out_size = s.n;
            p.x_token_stride = s.k;
            p.weight_row_stride = s.k;
            p.out_token_stride = s.n;
            p.constant_weight = true;
            p.dtype = DType::bf16;
            const size_t bytes = (size_t)s.n * s.k * 2;
            const int sets = std::max(2, std::min<int>(32, 400e6 / bytes));
            std::printf("bf16 %-8s M%-2d %.2f us\n", s.name, m, time_us(std::max(sets, 8), [&](int i) {
                            p.weight = pool + i % sets * bytes;
                            linear_cuda(p, stream);
                        }));
        }
    }
    const std::vector<int> few = {1, 4, 8, 16}, many = {1, 2, 4, 8, 12, 16, 24, 32, 64, 128};
    bench(0, all ? many : std::vector<int>{1, 8, 16, 64}, true, true);
    bench(7, all ? few : std::vector<int>{1, 16}, true, true);
    bench(6, all ? few : std::vector<int>{1, 16}, all, true);
    bench(9, all ? few : std::vector<int>{1, 16}, all, true);
    for (const int format : {1, 2, 3, 4, 5, 8, 10}) {
        bench(format, {1, 16, 33, 130}, false, all);
    }
    std::printf(failures ? "%d FAILED\n" : "all right, %d wrong\n", failures);
    return failures != 0;
}
