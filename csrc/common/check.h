// Errors of launchers and CPU kernels: one sentence that names what is supported.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastkernels {

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
    std::ostringstream message;
    (message << ... << args);
    throw std::invalid_argument(message.str());
}

template <typename... Args>
void check(bool condition, const Args&... args) {
    if (!condition) [[unlikely]] {
        fail(args...);
    }
}

}  // namespace fastkernels
