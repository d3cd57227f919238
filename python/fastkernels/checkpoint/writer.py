"""Writes a checkpoint folder in Hugging Face's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from fastkernels.checkpoint.reader import INDEX_FILE, SINGLE_FILE


def write_checkpoint(
    path: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes config.json and model.safetensors, or shards and their index.

    config:  what config.json is to hold, in Hugging Face's words
    tensors: name -> tensor, in the order to be written; of those that are the same memory (tied embeddings)
             only the first is, and none may overlap otherwise
    max_shard_bytes: how large one file may become; a larger tensor gets a shard of its own
    The weights of an earlier checkpoint in the folder are removed.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split(_without_aliases(tensors), max_shard_bytes)
    names = (
        [SINGLE_FILE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for stale in [folder / INDEX_FILE, *folder.glob("model*.safetensors")]:
        stale.unlink(missing_ok=True)
    for name, shard in zip(names, shards, strict=True):
        # contiguous() copies nothing where nothing is needed
        dense = {key: value.contiguous() for key, value in shard.items()}
        save_file(dense, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(value.nbytes for shard in shards for value in shard.values())
        index = {
            "metadata": {"total_size": total},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        write_json(folder / INDEX_FILE, index)
    write_json(folder / "config.json", config)


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    seen: set[tuple[int, tuple[int, ...], tuple[int, ...]]] = set()
    kept = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        kept[name] = tensor.detach()
    return kept


def _split(tensors: Mapping[str, Tensor], max_shard_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
