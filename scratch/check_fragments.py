"""Writes random weights of every format for check_fragments.cu, and runs it: its binary is the argument."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from fastkernels.ops import reference
from tests.ops.test_weight_only import FORMATS, operands, repack

bad = 0
for name in FORMATS:
    for out_size, in_size in ((32, 256), (48, 1024)):
        given = operands(FORMATS[name], 1, out_size, in_size, torch.bfloat16)
        weight = repack(given)
        full = {k: v for k, v in given.items() if k not in ("x", "bias", "activation")}
        exact = reference.dequantize_weight(**full)
        fmt = weight.packed_format
        rows, size = given["block"]
        factors = weight.row_factors.double()[:, None]
        if fmt.startswith("int4"):
            ones = dict(full, scales=torch.ones_like(full["scales"]))
            value = reference.dequantize_weight(**ones)
            scale = torch.where(value != 0, exact / value / factors, 1)
        elif fmt == "e4m3-block":
            value = full["weight"].double()
            scale = torch.where(value != 0, exact / value, 1)
        elif fmt in ("int8", "e4m3"):
            value, scale = full["weight"].double(), torch.ones_like(exact)
        else:  # the row's factor is a power of two, or the fp32 of the global scale
            value = exact / factors
            if "global_scale" in full:
                value = reference.dequantize_weight(**{k: v for k, v in full.items() if k != "global_scale"})
            scale = torch.ones_like(exact)
        with Path("/tmp/fragments.bin").open("wb") as f:
            f.write(np.array(weight.packed.shape[:2], dtype=np.int32).tobytes())
            f.write(weight.packed.numpy().tobytes())
            f.write(value.numpy().tobytes())
            f.write(scale.numpy().tobytes())
        result = subprocess.run([sys.argv[1], fmt, "/tmp/fragments.bin"], capture_output=True, text=True)
        print(
            name,
            out_size,
            in_size,
            "OK" if result.returncode == 0 else "BAD",
            result.stdout.replace("\n", "; "),
        )
        bad += result.returncode != 0
sys.exit(bad)
