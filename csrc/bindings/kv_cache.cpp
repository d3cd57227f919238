#include "fastkernels/kv_cache.h"

#include <vector>

#include "bindings/tensor.h"

namespace fastkernels {
namespace {

void append_kv(Tensor k, Tensor v, Tensor kv_cache, Tensor slot_mapping, std::optional<Tensor> k_scale,
               std::optional<Tensor> v_scale) {
    check(k.dim() == 3 && v.dim() == 3 && kv_cache.dim() == 5, "append_kv: k and v must have 3 dimensions, kv_cache 5");
    AppendKvParams p{};
    p.k = in(k);
    p.v = in(v);
    p.kv_cache = out(kv_cache);
    p.num_tokens = k.size(0);
    p.num_pages = kv_cache.size(0);
    p.k_token_stride = k.stride(0);
    p.k_head_stride = k.stride(1);
    p.v_token_stride = v.stride(0);
    p.v_head_stride = v.stride(1);
    p.num_kv_heads = static_cast<int32_t>(k.size(1));
    p.head_dim = static_cast<int32_t>(k.size(2));
    p.page_size = static_cast<int32_t>(kv_cache.size(3));
    p.dtype = dtype_of(k, "k");
    check(v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2), "append_kv: v must be like k");
    check(kv_cache.size(1) == 2 && kv_cache.size(2) == k.size(1) && kv_cache.size(4) == k.size(2) &&
              kv_cache.is_contiguous(),
          "append_kv: kv_cache must be contiguous [num_pages, 2, num_kv_heads, page_size, head_dim]");
    p.kv_dtype = dtype_of(kv_cache, "kv_cache");
    check(dtype_of(v, "v") == p.dtype && (p.kv_dtype == p.dtype || size_bytes(p.kv_dtype) == 1),
          "append_kv: v must have the dtype of k, kv_cache that or e4m3, e5m2 or int8");
    p.k_scale = scales_of("append_kv", "k_scale", k_scale, p.num_kv_heads);
    p.v_scale = scales_of("append_kv", "v_scale", v_scale, p.num_kv_heads);
    check(dtype_of(slot_mapping, "slot_mapping") == DType::i64 && slot_mapping.numel() == p.num_tokens &&
              slot_mapping.is_contiguous(),
          "append_kv: slot_mapping must be contiguous int64 [num_tokens]");
    p.slot_mapping = static_cast<const int64_t*>(in(slot_mapping));
    FK_LAUNCH(append_kv, k, p);
}

void copy_pages(std::vector<Tensor> caches, Tensor from_pages, Tensor to_pages,
                std::optional<std::vector<Tensor>> from_caches) {
    const std::vector<Tensor>& sources = from_caches ? *from_caches : caches;
    check(!caches.empty() && caches.size() <= kCopyPagesMaxLayers && sources.size() == caches.size(),
          "copy_pages: caches and from_caches must be 1 to ", kCopyPagesMaxLayers, " tensors, as many of both");
    CopyPagesParams p{};
    p.num_layers = static_cast<int32_t>(caches.size());
    const auto page_bytes = [](const Tensor& cache) {
        check(cache.dim() >= 1 && cache.is_contiguous(), "copy_pages: a cache must be contiguous [num_pages, ...]");
        int64_t bytes = static_cast<int64_t>(size_bytes(dtype_of(cache, "a cache")));
        for (int64_t i = 1; i < cache.dim(); ++i) {
            bytes *= cache.size(i);
        }
        return bytes;
    };
    p.num_to_pages = caches[0].size(0);
    p.num_from_pages = sources[0].size(0);
    p.page_bytes = page_bytes(caches[0]);
    for (size_t layer = 0; layer < caches.size(); ++layer) {
        check(page_bytes(caches[layer]) == p.page_bytes && page_bytes(sources[layer]) == p.page_bytes &&
                  caches[layer].size(0) == p.num_to_pages && sources[layer].size(0) == p.num_from_pages,
              "copy_pages: the caches must be alike, and their pages as large as those of from_caches");
        p.from[layer] = in(sources[layer]);
        p.to[layer] = out(caches[layer]);
        for (const Tensor& cache : {caches[layer], sources[layer]}) {
            check(cache.is_cpu() || cache.get_device_index() == from_pages.get_device_index(),
                  "copy_pages: the caches must be on the device of from_pages, or in pinned host memory");
            p.has_host |= cache.is_cpu();
        }
    }
    p.num_pairs = from_pages.numel();
    check(dtype_of(from_pages, "from_pages") == DType::i32 && from_pages.is_contiguous() &&
              dtype_of(to_pages, "to_pages") == DType::i32 && to_pages.is_contiguous() &&
              to_pages.numel() == p.num_pairs,
          "copy_pages: from_pages and to_pages must be contiguous int32 [num_pairs]");
    p.from_pages = static_cast<const int32_t*>(in(from_pages));
    p.to_pages = static_cast<const int32_t*>(in(to_pages));
    FK_LAUNCH(copy_pages, from_pages, p);
}

void register_kv_cache(torch::stable::detail::StableLibrary& m) {
    m.impl("append_kv", TORCH_BOX(&append_kv));
    m.impl("copy_pages", TORCH_BOX(&copy_pages));
}

}  // namespace
}  // namespace fastkernels

STABLE_TORCH_LIBRARY_FRAGMENT(fastkernels, m) {
    m.def(
        "append_kv(Tensor k, Tensor v, Tensor(a!) kv_cache, Tensor slot_mapping, Tensor? k_scale=None, "
        "Tensor? v_scale=None) -> ()");
    m.def("copy_pages(Tensor(a!)[] caches, Tensor from_pages, Tensor to_pages, Tensor[]? from_caches=None) -> ()");
}

FK_REGISTER_IMPLS(fastkernels::register_kv_cache)
