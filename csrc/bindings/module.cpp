// fastkernels._C: the C++ host objects, through pybind11. Importing it loads libfastkernels, whose static
// initialisers register torch.ops.fastkernels.*; torch must be imported first.
#include <pybind11/pybind11.h>

#include "common/cpu/isa.h"

namespace py = pybind11;

void bind_attention(py::module_& m);
void bind_page_pool(py::module_& m);

PYBIND11_MODULE(_C, m) {
    m.doc() = "C++ host objects of fastkernels.";
    m.attr("with_cuda") = static_cast<bool>(FASTKERNELS_WITH_CUDA);
    m.attr("version") = FASTKERNELS_VERSION;
    m.def("cpu_isa", &fastkernels::cpu::isa_name, "The instruction set the CPU kernels use: baseline, avx2 or avx512.");
    bind_attention(m);
    bind_page_pool(m);
}
