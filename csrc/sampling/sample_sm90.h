// The sampling kernel for GPUs with thread block clusters (sm_90 and later).
#pragma once

#include "fastkernels/sampling.h"

namespace fastkernels {

// False, with nothing launched, where the GPU has no clusters, a row does not fit one, or addresses are odd.
bool sample_in_clusters(const SampleParams& p, void* stream);

}  // namespace fastkernels
