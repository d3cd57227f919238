// What the current device holds, by which the launchers of weight-only products choose.
#pragma once

#include "common/launch.h"

namespace fastkernels {

struct Room {
    int num_sms, capability, block_bytes, sm_bytes;
};

inline Room room_of_device() {
    return {num_sms(), compute_capability(), device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
}

}  // namespace fastkernels
