#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "host/page_pool.h"

namespace py = pybind11;

void bind_page_pool(py::module_& m) {
    using fastkernels::host::PagePool;
    py::class_<PagePool>(m, "PagePool", "The pages of a KV cache by number: which are free, who holds the others.")
        .def(py::init<int32_t>(), py::arg("num_pages"))
        .def("allocate", &PagePool::allocate, py::arg("num_pages"),
             "num_pages free pages with one reference each; an empty list when fewer are free.")
        .def("retain", &PagePool::retain, py::arg("pages"), "One reference more on each page.")
        .def("release", &PagePool::release, py::arg("pages"),
             "One reference less on each page; a page without references is free again.")
        .def("references", &PagePool::references, py::arg("page"))
        .def_property_readonly("num_pages", &PagePool::num_pages)
        .def_property_readonly("num_free", &PagePool::num_free);
}
