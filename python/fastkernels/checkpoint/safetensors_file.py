"""One safetensors file, memory-mapped: its header is read and checked, its tensors are views of the mapping.

Layout of the format: 8 bytes, the header's length as a little-endian integer; the header, a JSON object from
tensor name to dtype, shape and byte range; the data. Source: the format's specification in the safetensors
project.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastkernels.checkpoint.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: bytes [begin, end) of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFile:
    """A safetensors file. Opening it reads the header only; the data is mapped when the first tensor is asked
    for.

    path:    the file
    entries: tensor name -> TensorEntry
    Raises CheckpointError for a file that is missing, shorter or longer than its header says, or malformed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: Tensor | None = None
        try:
            self.size_bytes = path.stat().st_size
            with path.open("rb") as file:
                header_bytes = int.from_bytes(file.read(8), "little")
                if self.size_bytes < 8 or header_bytes > min(self.size_bytes - 8, _MAX_HEADER_BYTES):
                    raise CheckpointError(
                        f"{path} is truncated or no safetensors file: it has {self.size_bytes} bytes and "
                        "announces a "
                        f"header of {header_bytes}"
                    )
                header = _parse_header(path, file.read(header_bytes))
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        data_begin = 8 + header_bytes
        self.entries = {
            name: _entry(path, name, raw, data_begin)
            for name, raw in header.items()
            if name != "__metadata__"
        }
        expected = max((entry.end for entry in self.entries.values()), default=data_begin)
        if expected != self.size_bytes:
            state = "truncated" if self.size_bytes < expected else "too long"
            raise CheckpointError(
                f"{path} is {state}: its header describes {expected} bytes, the file has {self.size_bytes}"
            )

    def tensor(self, name: str) -> Tensor:
        """The tensor, on the CPU, sharing the mapped pages: nothing is read from disk until it is touched.

        The mapping is private: writing to the tensor does not change the file.
        """
        entry = self.entries[name]
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if self._bytes is None:
            self._bytes = torch.from_file(
                str(self.path), shared=False, size=self.size_bytes, dtype=torch.uint8
            )
        data = self._bytes[entry.begin : entry.end]
        if entry.begin % entry.dtype.itemsize:  # a view needs alignment; the format allows its absence
            data = data.clone()
        return data.view(entry.dtype).view(entry.shape)


def _parse_header(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is no safetensors file: its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is not a JSON object")
    return header


def _entry(path: Path, name: str, raw: Any, data_begin: int) -> TensorEntry:
    try:
        dtype_name, shape = raw["dtype"], tuple(raw["shape"])
        begin, end = raw["data_offsets"]
        numbers = (*shape, begin, end)
        well_formed = all(type(number) is int and number >= 0 for number in numbers) and begin <= end
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise CheckpointError(f"{path}: the header lacks a dtype, shape or byte range for tensor {name!r}")
    if dtype_name not in _DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name!r} has dtype {dtype_name!r}; fastkernels reads {', '.join(_DTYPES)}"
        )
    dtype = _DTYPES[dtype_name]
    expected = math.prod(shape) * dtype.itemsize
    if end - begin != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r} of {dtype_name} {list(shape)} needs {expected} bytes, its byte range "
            "has "
            f"{end - begin}"
        )
    return TensorEntry(dtype, shape, data_begin + begin, data_begin + end)
