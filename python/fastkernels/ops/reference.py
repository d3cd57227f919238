"""The oracle: every op in plain PyTorch, in the dtype of its inputs (give float64 for the exact answer).

A section a csrc family, a function an op, same names and arguments as in fastkernels.ops.
"""

from __future__ import annotations

import torch

# --- norm -------------------------------------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight
