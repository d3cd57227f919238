"""Writes a quantised model as a compressed-tensors checkpoint, a few modules at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


class QuantizedWriter:
    """A folder in the compressed-tensors format, which vLLM and transformers load too, in the making.

    Until ``finish`` everything lies in ``<out_dir>.partial``; ``finish`` renames it, so ``out_dir`` is whole
    or not there. Each ``flush`` makes a shard of what was added since the last one and notes it in
    ``progress.json``; a writer made again with the same arguments goes on behind the last flush. It holds no
    more than what was added since, so flushing once a layer needs the memory of one layer.

    source_dir: the checkpoint that is being quantised: its config.json, tokenizer, chat template and
                generation files are taken over, and at the end every tensor that nobody added
    out_dir:    must not exist, or be an empty folder
    scheme_by_module: module name, "model.layers.0.mlp.up_proj" say -> scheme's name as
                ``fastkernels.quantize.find_scheme`` takes it, of every linear that will be added; those that
                are not named stay as they are
    kv_cache:   "fp8" or "int8" writes a kv_cache_scheme; its scales come through ``add_plain`` as
                ``model.layers.<n>.self_attn.k_scale`` and ``v_scale``, fp32 [1], value = code * scale
    settings:   whatever else must be the same to go on where an interrupted run was (JSON); kept in
                progress.json only
    Raises CheckpointError where out_dir is taken, where an interrupted run there had other arguments, for a
    scheme the format cannot hold and a module that the model has not, and, in every method, when writing
    fails (a full disk): what was flushed before is kept for the next run.
    """

    def __init__(
        self,
        source_dir: str | Path,
        out_dir: str | Path,
        scheme_by_module: Mapping[str, str],
        *,
        kv_cache: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        raise NotImplementedError

    @property
    def done(self) -> frozenset[str]:
        """Modules and plain tensors, by the names they were added under, that earlier flushes wrote."""
        raise NotImplementedError

    @property
    def notes(self) -> dict[str, Any]:
        """What the flushes so far were given as notes, earlier runs' included; later keys replace earlier."""
        raise NotImplementedError

    def stored(self, module: str) -> dict[str, Tensor]:
        """The parts of a module in ``done``, read back: what an interrupted run needs to go on behind it.

        Returns what ``add`` was given (nvfp4's global_scale to the last bit but one).
        """
        raise NotImplementedError

    def plain(self, name: str) -> Tensor:
        """A plain tensor in ``done``, read back."""
        raise NotImplementedError

    def add(self, module: str, scheme: str, parts: Mapping[str, Tensor]) -> None:
        """A quantised weight.

        scheme: as scheme_by_module says
        parts:  as ``find_scheme(scheme).quantize`` gives them, [out_size, ...], on any device
        Raises CheckpointError for parts that are missing, of the wrong shape or dtype, for a scale that is 0
        or not finite, and for a module that was added before.
        """
        raise NotImplementedError

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """A tensor by its name in the checkpoint, bias or a norm that an algorithm changed, in place of the
        source's. Raises CheckpointError for one that was added before."""
        raise NotImplementedError

    def flush(self, notes: Mapping[str, Any] | None = None) -> None:
        """Writes what was added since the last flush as one shard; from here a next run goes on.

        notes: JSON, kept with the shard: errors and times for the table at the end, say
        """
        raise NotImplementedError

    def finish(self) -> Path:
        """Flushes, copies what nobody added from the source, writes config.json, the index and the tokenizer's
        files, and renames the folder to out_dir, which is returned.

        Raises CheckpointError naming a module of scheme_by_module that was not added.
        """
        raise NotImplementedError

    def discard(self) -> None:
        """Removes everything written so far."""
        raise NotImplementedError
