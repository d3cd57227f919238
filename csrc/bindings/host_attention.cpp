#include <pybind11/pybind11.h>

#include <utility>

#include "fastkernels/attention.h"

namespace py = pybind11;

void bind_attention(py::module_& m) {
    m.def(
        "attention_sizes",
        [](int64_t num_tokens, int64_t num_seqs, int32_t num_q_heads, int32_t num_kv_heads, int32_t head_dim,
           int32_t num_sms) {
            const fastkernels::AttentionSizes sizes =
                fastkernels::attention_sizes(num_tokens, num_seqs, num_q_heads, num_kv_heads, head_dim, num_sms);
            return std::pair(sizes.work_map_ints, sizes.workspace_floats);
        },
        py::arg("num_tokens"), py::arg("num_seqs"), py::arg("num_q_heads"), py::arg("num_kv_heads"),
        py::arg("head_dim"), py::arg("num_sms"),
        "(work_map_ints, workspace_floats) that attention on a GPU with num_sms multiprocessors needs.");
}
