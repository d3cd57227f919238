"""Ops for any torch model: one function a kernel, each also torch.ops.fastkernels.<name>."""

from fastkernels import _library  # noqa: F401  (loads the kernels before any op is named)
from fastkernels.ops.norm import rms_norm

__all__ = ["rms_norm"]
