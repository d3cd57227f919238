"""Weights for main.cpp: units and what they stand for, without the rows' factors. The argument is a folder."""

import sys
from pathlib import Path

import numpy as np
import torch

from fastkernels.ops import reference
from tests.ops.test_weight_only import FORMATS, operands, repack

SIZES = {"int4-g128": (96, 640), "int4-g32-zeros": (80, 384), "e4m3-block": (144, 640), "int8": (48, 384)}

for name, (out_size, in_size) in {**SIZES, "nvfp4": (80, 640)}.items():
    given = operands(FORMATS[name], 1, out_size, in_size, torch.bfloat16)
    weight = repack(given)
    full = {key: value for key, value in given.items() if key not in ("x", "bias", "activation")}
    exact = reference.dequantize_weight(**full) / weight.row_factors.double()[:, None]
    with Path(sys.argv[1], f"{name}.bin").open("wb") as file:
        file.write(np.array(weight.packed.shape[:2], dtype=np.int32).tobytes())
        for array in (weight.packed.numpy(), exact.contiguous().numpy(), np.ones(exact.shape)):
            file.write(array.tobytes())
