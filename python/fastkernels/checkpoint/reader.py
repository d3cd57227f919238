"""A Hugging Face checkpoint folder: config.json and one or many safetensors files, opened lazily."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.json_file import read_json_object
from fastkernels.checkpoint.safetensors_file import SafetensorsFile
from fastkernels.config import ConfigError, ModelConfig, UnsupportedModelError

if TYPE_CHECKING:
    from fastkernels.checkpoint.quantized import QuantizedWeights, StoredKV

DEMO_FOLDER = Path(__file__).resolve().parents[1] / "demo"
"""Of the model that the package carries."""
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FINGERPRINT_SAMPLE_BYTES = 4096
_CONFIG_KEYS_WITHOUT_MEANING = ("_name_or_path", "transformers_version")


def model_folder(name: str | Path) -> Path:
    """The folder that ``name``, "demo" or a path, stands for."""
    return DEMO_FOLDER if name == "demo" else Path(name)


class Checkpoint:
    """Names, shapes and memory-mapped tensors of a checkpoint folder.

    Opening reads config.json, the index and the headers of the safetensors files; tensors stay on disk until
    they are touched. Raises CheckpointError for a missing, truncated or malformed file, and for pickled
    weights.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            if self.path.suffix in _PICKLE_SUFFIXES:
                raise CheckpointError(_pickle_refusal(self.path.parent, self.path.name))
            found = "is not a folder" if self.path.exists() else "does not exist"
            raise CheckpointError(
                f"the checkpoint {self.path} {found}; give the folder with config.json and safetensors files"
            )
        self.config_dict: dict[str, Any] = read_json_object(self.path / "config.json")
        self._file_of = self._locate()

    @cached_property
    def config(self) -> ModelConfig:
        """config.json as a ModelConfig.

        Raises UnsupportedModelError as ``ModelConfig.from_dict`` does, CheckpointError for an impossible
        value.
        """
        try:
            return ModelConfig.from_dict(self.config_dict)
        except UnsupportedModelError:
            raise
        except ConfigError as error:
            raise CheckpointError(f"{self.path / 'config.json'}: {error}") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path / 'config.json'} holds a value of the wrong type: {error}"
            ) from error

    @cached_property
    def quantized(self) -> QuantizedWeights | None:
        """Its quantised weights, None where it has none. Raises CheckpointError as ``open_quantized``."""
        from fastkernels.checkpoint.quantized import (
            open_quantized,
        )  # here: the writer beside it needs this file

        return open_quantized(self)

    @cached_property
    def kv(self) -> StoredKV:
        """What it says about a KV cache of 8 bits."""
        from fastkernels.checkpoint.quantized import open_kv, quantization_config

        return open_kv(self, quantization_config(self.path, self.config_dict))

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it. Raises CheckpointError when there is none of that name."""
        return self._file(name).entries[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading it. Raises CheckpointError when there is none of that name."""
        return self._file(name).entries[name].dtype

    def tensor(self, name: str, shape: tuple[int, ...] | torch.Size | None = None) -> Tensor:
        """The tensor, on the CPU, sharing the mapped file; slicing it reads the slice only.

        Raises CheckpointError when there is none of that name, or when ``shape`` is given and differs.
        """
        file = self._file(name)
        found = file.entries[name].shape
        if shape is not None and tuple(shape) != found:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has shape {list(found)}; config.json asks for {list(shape)}"
            )
        return file.tensor(name)

    @property
    def size_bytes(self) -> int:
        """Bytes of all tensors."""
        entries = (self._file_of[name].entries[name] for name in self._file_of)
        return sum(entry.end - entry.begin for entry in entries)

    @cached_property
    def fingerprint(self) -> str:
        """64 hexadecimal digits that change with the weights or the configuration, not with the sharding.

        Hashes config.json and of every tensor its name, dtype, shape and three samples of 4 KiB (first,
        middle, last): training or converting a model changes those; a change of single numbers elsewhere goes
        unseen, which is the price of not reading the whole checkpoint.
        """
        digest = hashlib.sha256()
        config = {k: v for k, v in self.config_dict.items() if k not in _CONFIG_KEYS_WITHOUT_MEANING}
        digest.update(json.dumps(config, sort_keys=True).encode())
        for name in self.names():
            digest.update(f"\n{name} {self.dtype(name)} {self.shape(name)} ".encode())
            data = self.tensor(name).reshape(-1).view(torch.uint8)
            last = max(data.numel() - _FINGERPRINT_SAMPLE_BYTES, 0)
            for begin in sorted({0, last // 2, last}):
                digest.update(data[begin : begin + _FINGERPRINT_SAMPLE_BYTES].numpy().tobytes())
        return digest.hexdigest()

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._file_of:
            raise CheckpointError(f"{self.path} has no tensor {name!r}; it holds {len(self._file_of)} others")
        return self._file_of[name]

    def _locate(self) -> dict[str, SafetensorsFile]:
        """Tensor name -> the file that holds it."""
        if (self.path / INDEX_FILE).exists():
            return self._locate_by_index(self.path / INDEX_FILE)
        if (self.path / SINGLE_FILE).exists():
            file = SafetensorsFile(self.path / SINGLE_FILE)
            return dict.fromkeys(file.entries, file)
        pickles = sorted(p.name for p in self.path.iterdir() if p.suffix in _PICKLE_SUFFIXES)
        if pickles:
            raise CheckpointError(_pickle_refusal(self.path, pickles[0]))
        raise CheckpointError(f"{self.path} has neither {SINGLE_FILE} nor {INDEX_FILE}")

    def _locate_by_index(self, index: Path) -> dict[str, SafetensorsFile]:
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map from tensor names to files")
        files: dict[str, SafetensorsFile] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index} places tensor {name!r} in {shard!r}; it must name a .safetensors file in the "
                    "same folder"
                )
            if shard not in files:
                if not (self.path / shard).exists():
                    raise CheckpointError(f"{index} places tensor {name!r} in {shard}, which does not exist")
                files[shard] = SafetensorsFile(self.path / shard)
            if name not in files[shard].entries:
                raise CheckpointError(f"{index} places tensor {name!r} in {shard}, which does not hold it")
        return {name: files[shard] for name, shard in weight_map.items()}


def _pickle_refusal(folder: Path, name: str) -> str:
    return (
        f"{folder} holds pickled weights ({name}), which run code when they are read; fastkernels reads "
        "safetensors "
        "only: convert them with transformers' save_pretrained"
    )
