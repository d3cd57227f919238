// rope_append_kv into a cache whose kv_dtype is one byte.
#pragma once

#include "fastkernels/rope.h"

namespace fastkernels {

void rope_append_kv_bytes(const RopeParams& p, void* stream);

}  // namespace fastkernels
