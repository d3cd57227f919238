"""Writes a quantised model as a compressed-tensors checkpoint, a few modules at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.json_file import read_json_object
from fastkernels.checkpoint.quantized.compressed_tensors import read_compressed_tensors
from fastkernels.checkpoint.quantized.encode import encode, encoding_of
from fastkernels.checkpoint.quantized.kv_cache import OFFSETS_FILE, is_kv_scale
from fastkernels.checkpoint.quantized.stored import Module, StoredLinear
from fastkernels.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from fastkernels.checkpoint.safetensors_file import SafetensorsFile
from fastkernels.checkpoint.writer import write_json
from fastkernels.models import build

_PROGRESS = "progress.json"
_COPY_BYTES = 1 << 30  # of a shard of tensors that are taken over
_TAKEN_OVER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("chat_template*", "generation_config.json", "LICENSE*", "NOTICE*"),
)
_KV_CACHES = {"fp8": "float", "int8": "int"}


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
                ``model.layers.<n>.self_attn.k_scale`` and ``v_scale``, fp32 [1], value = code * scale;
                what keys are less by may come through ``add_key_offset``
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
        self._source, self._out = Checkpoint(source_dir), Path(out_dir)
        self._partial = self._out.with_name(self._out.name + ".partial")
        if self._source.quantized is not None:
            raise CheckpointError(f"{source_dir} is quantised already ({self._source.quantized.method})")
        if kv_cache is not None and kv_cache not in _KV_CACHES:
            raise CheckpointError(f"kv_cache is {kv_cache!r}; there are {', '.join(_KV_CACHES)}")
        self._kv_cache = kv_cache
        with torch.device("meta"):
            model = build(self._source.config)
        self._shapes = {
            name: (linear.out_features, linear.in_features)
            for name, linear in model.named_modules()
            if isinstance(linear, nn.Linear)
        }
        self._schemes = dict(scheme_by_module)
        for module, scheme in self._schemes.items():
            if module not in self._shapes:
                raise CheckpointError(
                    f"{source_dir} has no linear {module!r}; the last it has is {list(self._shapes)[-1]!r}"
                )
            encoding_of(scheme)
        self._added: dict[str, Tensor] = {}  # since the last flush, by the names they get
        self._names: list[str] = []  # the same by the names they were added under
        self._offsets: dict[str, Tensor] = {}  # all so far: they are small
        self._begin(settings)

    @property
    def done(self) -> frozenset[str]:
        """Modules and plain tensors, by the names they were added under, that earlier flushes wrote."""
        return frozenset(name for shard in self._progress["shards"] for name in shard)

    @property
    def notes(self) -> dict[str, Any]:
        """What the flushes so far were given as notes, earlier runs' included; later keys replace earlier."""
        return dict(self._progress["notes"])

    def stored(self, module: str) -> dict[str, Tensor]:
        """The parts of a module in ``done``, read back: what an interrupted run needs to go on behind it.

        Returns what ``add`` was given (nvfp4's global_scale to the last bit but one).
        """
        if module not in self.done or module not in self._schemes:
            raise CheckpointError(f"{self._partial} does not hold the module {module!r} yet")
        return self._read(module, self._flushed(module)).read()

    def plain(self, name: str) -> Tensor:
        """A plain tensor in ``done``, read back."""
        if name not in self.done or name in self._schemes:
            raise CheckpointError(f"{self._partial} does not hold the tensor {name!r} yet")
        return self._flushed(name).tensor(name)

    def add(self, module: str, scheme: str, parts: Mapping[str, Tensor]) -> None:
        """A quantised weight.

        scheme: as scheme_by_module says
        parts:  as ``find_scheme(scheme).quantize`` gives them, [out_size, ...], on any device
        Raises CheckpointError for parts that are missing, of the wrong shape or dtype, for a scale that is 0
        or not finite, and for a module that was added before.
        """
        self._claim(module)
        if self._schemes.get(module) != scheme:
            raise CheckpointError(
                f"{module} was added as {scheme}, but scheme_by_module has {self._schemes.get(module)} for it"
            )
        try:
            tensors = encode(
                scheme, {name: part.cpu() for name, part in parts.items()}, *self._shapes[module]
            )
        except KeyError as error:
            raise CheckpointError(f"{module} was added without {error}, a part of {scheme}") from None
        named = {f"{module}.{leaf}": tensor.contiguous() for leaf, tensor in tensors.items()}
        linear = self._read(module, _Tensors(self._partial, named))
        linear.read()
        if linear.scheme != scheme:
            raise CheckpointError(
                f"{module} was added as {scheme}, but its parts are those of {linear.scheme}"
            )
        self._added |= named
        self._names.append(module)

    def add_plain(self, name: str, tensor: Tensor) -> None:
        """A tensor by its name in the checkpoint, bias or a norm that an algorithm changed, in place of the
        source's. Raises CheckpointError for one that was added before."""
        self._claim(name)
        module = name.removesuffix(".weight")
        if module in self._schemes or not (
            name in self._source or name == "lm_head.weight" or is_kv_scale(name)
        ):
            raise CheckpointError(f"{self._source.path} has no unquantised tensor {name!r} to replace")
        self._added[name] = tensor.detach().cpu().contiguous()
        self._names.append(name)

    def add_key_offset(self, name: str, offset: Tensor) -> None:
        """``model.layers.<n>.self_attn.k_offset``, fp32 [num_kv_heads, head_dim], for a file of its own."""
        self._offsets[name] = offset.detach().cpu().contiguous()

    def key_offset(self, name: str) -> Tensor:
        """One that an earlier flush wrote, read back."""
        if name not in self._offsets:
            raise CheckpointError(f"{self._partial} does not hold the offset {name!r} yet")
        return self._offsets[name]

    def flush(self, notes: Mapping[str, Any] | None = None) -> None:
        """Writes what was added since the last flush as one shard; from here a next run goes on.

        notes: JSON, kept with the shard: errors and times for the table at the end, say
        """
        with self._writing():
            if self._added:
                self._save(self._added, self._shard_path(len(self._progress["shards"]) + 1))
                if self._offsets:
                    self._save(self._offsets, self._partial / OFFSETS_FILE)
                self._progress["shards"].append(self._names)
                self._added, self._names = {}, []
            self._progress["notes"] |= notes or {}
            self._save_progress()

    def finish(self) -> Path:
        """Flushes, copies what nobody added from the source, writes config.json, the index and the
        tokenizer's files, and renames the folder to out_dir, which is returned.

        Raises CheckpointError naming a module of scheme_by_module that was not added.
        """
        self.flush()
        done = self.done
        missing = [module for module in self._schemes if module not in done]
        if missing:
            raise CheckpointError(f"{missing[0]} and {len(missing) - 1} more modules were not added yet")
        for name in self._source.names():
            if name in done or name.removesuffix(".weight") in self._schemes:
                continue
            self.add_plain(name, self._source.tensor(name))
            if sum(tensor.nbytes for tensor in self._added.values()) >= _COPY_BYTES:
                self.flush()
        self.flush()
        with self._writing():
            self._name_shards()
            write_json(self._partial / "config.json", self._config())
            for pattern in _TAKEN_OVER:
                for path in self._source.path.glob(pattern):
                    if path.is_file():
                        shutil.copyfile(path, self._partial / path.name)
            self._partial.rename(self._out)
            (self._out / _PROGRESS).unlink()  # not before: without it the next run would begin again
        return self._out

    def discard(self) -> None:
        """Removes everything written so far."""
        shutil.rmtree(self._partial, ignore_errors=True)

    # --- what is below -----------------------------------------------------------------------------------

    def _begin(self, settings: Mapping[str, Any] | None) -> None:
        """Goes on where an earlier run with the same arguments was, or makes the folder."""
        arguments = {
            "source": self._source.fingerprint,
            "schemes": self._schemes,
            "kv_cache": self._kv_cache,
            "settings": json.loads(json.dumps(dict(settings or {}))),
        }
        if self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise CheckpointError(f"{self._out} is there already; give a folder that is not, or an empty one")
        if (self._partial / _PROGRESS).exists():
            self._progress = read_json_object(self._partial / _PROGRESS)
            for name, value in arguments.items():
                if (before := self._progress.get("arguments", {}).get(name)) != value:
                    which = name
                    if name == "settings" and isinstance(before, dict):
                        differing = (key for key in value if before.get(key) != value[key])
                        which += f" ({', '.join(differing)})"
                    raise CheckpointError(
                        f"{self._partial} is of an interrupted run with other {which}; remove it to start "
                        "again"
                    )
            if (self._partial / OFFSETS_FILE).is_file():
                offsets = SafetensorsFile(self._partial / OFFSETS_FILE)
                self._offsets = {name: offsets.tensor(name).clone() for name in offsets.entries}
            return
        with self._writing():
            self._partial.mkdir(parents=True, exist_ok=True)
            self._progress = {"arguments": arguments, "shards": [], "notes": {}}
            self._save_progress()

    def _save(self, tensors: dict[str, Tensor], path: Path) -> None:
        unfinished = path.with_suffix(".unfinished")
        save_file(tensors, unfinished, metadata={"format": "pt"})
        shutil.copymode(self._partial / _PROGRESS, unfinished)  # save_file's are for nobody but the owner
        unfinished.rename(path)

    def _claim(self, name: str) -> None:
        if name in self._names or name in self.done:
            raise CheckpointError(f"{name} was added before")

    def _read(self, module: str, tensors: _Tensors) -> StoredLinear:
        at = Module(tensors, module, *self._shapes[module], "compressed-tensors")
        group = encoding_of(self._schemes[module]).group([module])
        return read_compressed_tensors({"config_groups": {"group_0": group}}, [at])[0]

    def _shard_path(self, number: int) -> Path:
        """By its first name; where ``finish`` was interrupted, by its last."""
        named = [*self._partial.glob(f"model-{number:05d}-of-*.safetensors")]
        if number == 1 and (self._partial / SINGLE_FILE).exists():
            named = [self._partial / SINGLE_FILE]
        return named[0] if named else self._partial / f"shard-{number:05d}.safetensors"

    def _flushed(self, name: str) -> _Tensors:
        """The shard that a module or plain tensor in ``done`` was written to."""
        number = next(n for n, names in enumerate(self._progress["shards"], start=1) if name in names)
        file = SafetensorsFile(self._shard_path(number))
        return _Tensors(self._partial, {one: file.tensor(one) for one in file.entries})

    def _save_progress(self) -> None:
        unfinished = self._partial / (_PROGRESS + ".unfinished")
        write_json(unfinished, self._progress)
        unfinished.rename(self._partial / _PROGRESS)

    def _name_shards(self) -> None:
        count = len(self._progress["shards"])
        if count == 1 and not self._offsets:  # without an index others would read the file of offsets too
            self._shard_path(1).rename(self._partial / SINGLE_FILE)
            return
        weight_map: dict[str, str] = {}
        total = 0
        for number in range(1, count + 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self._partial / name)
            entries = SafetensorsFile(self._partial / name).entries
            weight_map |= dict.fromkeys(entries, name)
            total += sum(entry.end - entry.begin for entry in entries.values())
        write_json(self._partial / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def _config(self) -> dict[str, Any]:
        """The source's, with what was done to it."""
        by_scheme: dict[str, list[str]] = {}
        for module, scheme in self._schemes.items():
            by_scheme.setdefault(scheme, []).append(module)
        encodings = {scheme: encoding_of(scheme) for scheme in by_scheme}
        formats = {encoding.format for encoding in encodings.values()}
        kv_cache_scheme = None
        if self._kv_cache is not None:
            kind = _KV_CACHES[self._kv_cache]
            kv_cache_scheme = {
                **{"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True, "dynamic": False}
            }
        config = {
            **self._source.config_dict,
            "quantization_config": {
                "quant_method": "compressed-tensors",
                "format": formats.pop() if len(formats) == 1 else "mixed-precision",
                "quantization_status": "compressed",
                "config_groups": {
                    f"group_{index}": encoding.group(["Linear"] if len(by_scheme) == 1 else by_scheme[scheme])
                    for index, (scheme, encoding) in enumerate(encodings.items())
                },
                "ignore": [name for name in self._shapes if name not in self._schemes],
                "kv_cache_scheme": kv_cache_scheme,
            },
        }
        if "lm_head" in self.done or "lm_head.weight" in self.done:
            config["tie_word_embeddings"] = False  # it has a weight of its own now
        return config

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            for path in self._partial.glob("*.unfinished"):
                path.unlink(missing_ok=True)
            words = getattr(error, "strerror", None) or str(error)
            raise CheckpointError(
                f"{self._partial} cannot be written: {words}; what was flushed before is kept for the next "
                "run"
            ) from error


class _Tensors:
    """Tensors as a ``Checkpoint`` gives them."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        self._tensors = tensors

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]
