"""Which device a name stands for."""

from __future__ import annotations

import torch

from fastkernels._library import _C
from fastkernels.errors import DeviceError


def choose_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is a GPU and this build has kernels for it.

    Raises DeviceError for another name, and for a GPU that is not there or that this build has no kernels
    for.
    """
    if name == "cpu":
        return torch.device("cpu")
    usable = torch.cuda.is_available() and _C.with_cuda
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if usable else torch.device("cpu")
    if name != "cuda" and not name.removeprefix("cuda:").isdigit():
        raise DeviceError(f"device is {name!r}; it must be auto, cuda, cuda:<index> or cpu")
    if not torch.cuda.is_available():
        raise DeviceError(f"device {name} was asked for, but torch sees no CUDA GPU; use cpu or auto")
    if not _C.with_cuda:
        raise DeviceError(
            f"device {name} was asked for, but fastkernels was built without CUDA kernels; use cpu or auto"
        )
    device = torch.device(name)
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise DeviceError(f"device {name} was asked for, but torch sees {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", index)
