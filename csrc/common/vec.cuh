// Loads and stores of 16 bytes a thread.
#pragma once

#include "common/dtype.cuh"

namespace fastkernels {

// N consecutive elements, moved as one access when N * sizeof(T) is 4, 8 or 16.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
    T data[N];

    __device__ __forceinline__ T& operator[](int i) {
        return data[i];
    }
    __device__ __forceinline__ const T& operator[](int i) const {
        return data[i];
    }
};

template <typename T>
inline constexpr int kVecElements = 16 / sizeof(T);

template <int N, typename T>
__device__ __forceinline__ Vec<T, N> load_vec(const T* p) {
    return *reinterpret_cast<const Vec<T, N>*>(p);
}

template <int N, typename T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T, N>& v) {
    *reinterpret_cast<Vec<T, N>*>(p) = v;
}

}  // namespace fastkernels
