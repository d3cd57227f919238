"""What every op's face checks before it calls its kernel: one sentence, naming what is taken."""

from __future__ import annotations

from typing import Any

import torch

from fastkernels.config import debug

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
BYTE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)  # of a KV cache

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def dtype_name(dtype: torch.dtype) -> str:
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def as_tensor(x: Any) -> torch.Tensor:
    """x itself when it is a tensor, else a tensor over the memory of anything that speaks DLPack."""
    if isinstance(x, torch.Tensor):
        return x
    if hasattr(x, "__dlpack__"):
        return torch.from_dlpack(x)
    raise ValueError(f"expected a tensor or an array that speaks DLPack, got {type(x).__name__}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_dtype(op: str, name: str, x: torch.Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in allowed:
        takes = ", ".join(dtype_name(d) for d in allowed)
        raise ValueError(f"{op}: {name} is {dtype_name(x.dtype)}, but the op takes {takes}")


def check_shape(op: str, name: str, x: torch.Tensor, expected: tuple[int | None, ...], words: str) -> None:
    """expected: a size per dimension, None for any; words: the shape in the docstring's words."""
    fits = x.dim() == len(expected) and all(
        e is None or s == e for s, e in zip(x.shape, expected, strict=True)
    )
    if not fits:
        raise ValueError(f"{op}: {name} has shape {list(x.shape)}, but the op takes {words}")


def check_device(op: str, **tensors: torch.Tensor | None) -> None:
    """All tensors lie on one device, the CPU or a CUDA GPU."""
    given = {name: x.device for name, x in tensors.items() if x is not None}
    first_name, first = next(iter(given.items()))
    if first.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{op}: {first_name} is on {first}, but the op runs on cpu and cuda")
    for name, device in given.items():
        if device != first:
            raise ValueError(
                f"{op}: {name} is on {device}, but {first_name} is on {first}; they must share a device"
            )


def check_last_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"{op}: the last dimension of {name} must be contiguous, its stride is {x.stride(-1)}"
            )


def check_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{op}: {name} must be contiguous, its strides are {list(x.stride())}")


def _require_bytes(op: str, kv_cache: torch.Tensor, name: str, it_is: str) -> None:
    require(
        kv_cache.dtype in BYTE_DTYPES,
        f"{op}: {name} is given, but kv_cache is {dtype_name(kv_cache.dtype)}; {it_is} for caches of "
        + ", ".join(map(dtype_name, BYTE_DTYPES)),
    )


def check_scales(
    op: str, kv_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    """The scales of a KV cache: given only where its elements are bytes, one for each KV head."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        _require_bytes(op, kv_cache, name, "scales are")
        check_dtype(op, name, scale, (torch.float32,))
        check_shape(op, name, scale, (kv_cache.shape[2],), "[num_kv_heads]")
        check_device(op, kv_cache=kv_cache, **{name: scale})
        check_contiguous(op, **{name: scale})


def check_key_offset(op: str, kv_cache: torch.Tensor, k_offset: torch.Tensor | None) -> None:
    """What a cache of bytes holds its keys without."""
    if k_offset is None:
        return
    _require_bytes(op, kv_cache, "k_offset", "it is")
    check_dtype(op, "k_offset", k_offset, (torch.float32,))
    check_shape(op, "k_offset", k_offset, (kv_cache.shape[2], kv_cache.shape[4]), "[num_kv_heads, head_dim]")
    check_device(op, kv_cache=kv_cache, k_offset=k_offset)
    check_contiguous(op, k_offset=k_offset)


def check_range_in_debug(op: str, name: str, x: torch.Tensor, low: int, high: int, words: str) -> None:
    """With FASTKERNELS_DEBUG set: every element of x is in [low, high). It reads x, so it waits for the GPU.

    words: what the range is. Nothing is checked while torch.compile traces or a CUDA graph is captured.
    """
    if torch.compiler.is_compiling() or not debug() or x.device.type == "meta" or x.numel() == 0:
        return
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    outside = x[(x < low) | (x > high - 1)]  # high itself may not fit the dtype of x
    if outside.numel():
        raise ValueError(f"{op}: {name} holds {int(outside[0])}, but {words} lie in [{low}, {high})")


def register_mutating_fake(*names: str) -> None:
    """Fake kernels of ops that only write into tensors they are given: nothing to compute or return."""
    for name in names:
        if not hasattr(torch.ops.fastkernels, name):
            raise ImportError(
                f"the C++ library of fastkernels has no op {name}: it is older than the Python files; "
                "build it with 'make build' or 'pip install .'"
            )
        torch.library.register_fake(f"fastkernels::{name}", lambda *args, **kwargs: None)
