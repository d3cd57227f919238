// On the CPU: every lane's operands as the kernel makes them, put into the matrices that mma.sync's documentation says
// they are, multiplied in double and compared with W x; and every weight compared bit for bit.
//   check_fragments FORMAT FILE   FILE: int32 tiles, chunks; packed; per operand the weight as double [rows][K]
//   (int4: code - zero; else scale * value, without the row's factor), sums' scale of it as double [rows][K]
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <vector>

#include "gemm/weight_only.cuh"

using namespace fastkernels;

template <typename T>
double value(uint32_t pair, int i) {
    const uint16_t bits = i == 0 ? pair & 0xffff : pair >> 16;
    T v;
    memcpy(&v, &bits, 2);
    return static_cast<double>(static_cast<float>(v));
}

template <typename T, typename F>
int check_format(const char* path, int unit_bytes) {
    std::ifstream in(path, std::ios::binary);
    int32_t size[2];
    in.read(reinterpret_cast<char*>(size), 8);
    const int tiles = size[0], chunks = size[1], rows = tiles * 16, columns = chunks * 128;
    std::vector<char> packed(static_cast<size_t>(tiles) * chunks * unit_bytes);
    std::vector<double> weight(static_cast<size_t>(rows) * columns), scale(weight.size());
    in.read(packed.data(), packed.size());
    in.read(reinterpret_cast<char*>(weight.data()), weight.size() * 8);
    in.read(reinterpret_cast<char*>(scale.data()), scale.size() * 8);
    if (!in || F::kPieces * 512 + F::kScaleBytes != unit_bytes) {
        std::printf("bad file or unit\n");
        return 1;
    }
    std::vector<double> x(8 * static_cast<size_t>(columns));
    for (auto& v : x) {
        v = std::rand() % 17 - 8;
    }
    std::vector<double> y(rows * 8, 0.0);
    int wrong = 0;
    std::vector<int> seen(weight.size(), 0);
    for (int tile = 0; tile < tiles; ++tile) {
        for (int chunk = 0; chunk < chunks; ++chunk) {
            const char* unit = packed.data() + (static_cast<size_t>(tile) * chunks + chunk) * unit_bytes;
            const char* scales = unit + F::kPieces * 512;
            double part[16][8] = {};
            for (int s = 0; s < 4; ++s) {
                for (int j = 0; j < 2; ++j) {
                    double a16[16][16], b16[16][8];
                    for (int lane = 0; lane < 32; ++lane) {
                        const int g = lane / 4, t = lane % 4;
                        uint4 piece;
                        memcpy(&piece, unit + s * F::kPieces / 4 * 512 + lane * 16, 16);
                        uint32_t row_pair[2], a[4];
                        F::template prepare<T>(row_pair, scales, s, g, t);
                        F::template unpack<T>(piece, s, j, row_pair, a);
                        for (int i = 0; i < 4; ++i) {
                            for (int e = 0; e < 2; ++e) {
                                const double v = value<T>(a[i], e) * F::template kLeftOut<T>;
                                a16[g + i % 2 * 8][2 * t + i / 2 * 8 + e] = v;
                                const size_t at = static_cast<size_t>(tile * 16 + g + i % 2 * 8) * columns +
                                                  chunk * 128 + s * 32 + t * 8 + j * 4 + i / 2 * 2 + e;
                                ++seen[at];
                                if (v != weight[at] && wrong++ < 5) {
                                    std::printf("row %d k %d: %g, not %g\n", static_cast<int>(at / columns),
                                                static_cast<int>(at % columns), v, weight[at]);
                                }
                            }
                        }
                        for (int i = 0; i < 2; ++i) {  // b0, b1: words of the 16 bytes at k = chunk * 128 + s * 32 + t * 8
                            for (int e = 0; e < 2; ++e) {
                                b16[2 * t + i * 8 + e][g] =
                                    x[g * static_cast<size_t>(columns) + chunk * 128 + s * 32 + t * 8 + (j * 2 + i) * 2 + e];
                            }
                        }
                    }
                    for (int r = 0; r < 16; ++r) {
                        for (int n = 0; n < 8; ++n) {
                            for (int k = 0; k < 16; ++k) {
                                part[r][n] += a16[r][k] * b16[k][n];
                            }
                        }
                    }
                }
                if constexpr (F::kScaleSteps > 0) {
                    if ((s + 1) % F::kScaleSteps == 0) {
                        for (int g = 0; g < 8; ++g) {
                            const float2 of = F::scale(scales, s / F::kScaleSteps, g);
                            for (int n = 0; n < 8; ++n) {
                                y[(tile * 16 + g) * 8 + n] += part[g][n] * of.x;
                                y[(tile * 16 + g + 8) * 8 + n] += part[g + 8][n] * of.y;
                                part[g][n] = part[g + 8][n] = 0;
                            }
                        }
                    }
                }
            }
            if constexpr (F::kScaleSteps == 0) {
                for (int r = 0; r < 16; ++r) {
                    for (int n = 0; n < 8; ++n) {
                        y[(tile * 16 + r) * 8 + n] += part[r][n];
                    }
                }
            }
        }
    }
    for (int count : seen) {
        wrong += count != 1;
    }
    double worst = 0;
    for (int r = 0; r < rows; ++r) {
        for (int n = 0; n < 8; ++n) {
            double exact = 0, size = 0;
            for (int k = 0; k < columns; ++k) {
                const double w = weight[static_cast<size_t>(r) * columns + k] * scale[static_cast<size_t>(r) * columns + k];
                exact += w * x[n * static_cast<size_t>(columns) + k];
                size += std::abs(w * x[n * static_cast<size_t>(columns) + k]);
            }
            const double off = std::abs(exact - y[r * 8 + n]) / (size + 1e-30);
            worst = off <= worst ? worst : off;  // NaN too
        }
    }
    std::printf("%d of %zu weights wrong, products off by %.1e\n", wrong, weight.size(), worst);
    return wrong != 0 || !(worst <= 1e-12);
}

template <typename F>
int both(const char* path, PackedFormat format) {
    const int bf = check_format<bf16, F>(path, unit_bytes(format));
    const int half = check_format<fp16, F>(path, unit_bytes(format));
    return bf + half;
}

int main(int, char** argv) {
    const std::string f = argv[1];
    if (f == "int4-g128") return both<Int4<128, false>>(argv[2], PackedFormat::int4_g128);
    if (f == "int4-g64") return both<Int4<64, false>>(argv[2], PackedFormat::int4_g64);
    if (f == "int4-g32") return both<Int4<32, false>>(argv[2], PackedFormat::int4_g32);
    if (f == "int4-g128-zeros") return both<Int4<128, true>>(argv[2], PackedFormat::int4_g128_zeros);
    if (f == "int4-g64-zeros") return both<Int4<64, true>>(argv[2], PackedFormat::int4_g64_zeros);
    if (f == "int4-g32-zeros") return both<Int4<32, true>>(argv[2], PackedFormat::int4_g32_zeros);
    if (f == "int8") return both<Byte<true>>(argv[2], PackedFormat::int8);
    if (f == "e4m3") return both<Byte<false>>(argv[2], PackedFormat::e4m3);
    if (f == "e4m3-block") return both<Byte<false, true>>(argv[2], PackedFormat::e4m3_block);
    if (f == "nvfp4") return both<E2m1<16>>(argv[2], PackedFormat::nvfp4);
    if (f == "mxfp4") return both<E2m1<32>>(argv[2], PackedFormat::mxfp4);
    std::printf("no such format\n");
    return 1;
}
