"""A plan's weights as tensors on the device: from a checkpoint, or random at real shapes for benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkernels import ops
from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.quantized import KVKind, is_kv_scale
from fastkernels.checkpoint.quantized.formats import dense_weight
from fastkernels.checkpoint.reader import Checkpoint
from fastkernels.compiler import Plan, WeightSpec
from fastkernels.compiler.graph import QuantizedPart
from fastkernels.models import build
from fastkernels.quantize import QuantizationError, Repacked, find_scheme
from fastkernels.quantize.repacked import SUFFIX

Progress = Callable[[int, int], None]
"""Called with the weights that are ready and the number there are."""

KV_KINDS: dict[str, KVKind] = {"float8_e4m3fn": "fp8", "int8": "int8"}
"""Dtype of a KV cache of bytes -> what checkpoints call it."""

_NO_KV_SCALE = 1.0  # of e4m3, which reaches far enough for what models keep; int8 is refused without
_RANDOM_KV_SCALE = {"fp8": 1.0, "int8": 1 / 16}
_DERIVED = (".rotary_emb.inv_freq",)  # saved by old checkpoints, computed by the engine


def load_weights(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Every WeightSpec of ``plan`` from ``checkpoint``, cast to dtype; merged projections are put together in
    place, and quantised to nearest where the plan says so, or taken as the checkpoint holds them; on the CPU,
    packed rows that ``ops.interleaves`` takes are interleaved.

    A copy in the checkpoint's own dtype on the CPU shares its mapped file.
    Raises CheckpointError for a tensor that is missing, of another shape or not floating point, and for one
    that the model has no place for; QuantizationError for one that holds NaN or infinity.
    """
    _check_names(plan, checkpoint)

    def load(spec: WeightSpec) -> Tensor:
        if spec.how == "kv_scale":
            stored = checkpoint.kv.read(spec.name, spec.shape[0], kv_kind(plan))
            missing = torch.full(spec.shape, _NO_KV_SCALE)
            return (missing if stored is None else stored).to(device)
        if spec.how == "key_offset":
            return checkpoint.kv.read_offset(spec.name, spec.shape).to(device)
        return _load(spec, checkpoint, torch.device(device), dtype)

    def load_as_stored(spec: WeightSpec) -> Tensor:
        return _load(spec, checkpoint, torch.device(device), None)

    def make_parts(quantized: QuantizedPart) -> dict[str, Tensor]:
        if quantized.stored:
            return _read_stored(quantized, checkpoint, torch.device(device))
        return _quantize(quantized, load_as_stored)

    return _make_all(plan, load, make_parts, progress)


def random_weights(
    plan: Plan,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Weights of the plan's shapes made on the device: norms are 1, biases small, matrices normal with
    variance
    1 / in_features, so that activations stay of size 1 through any number of layers."""
    generator = torch.Generator(device).manual_seed(seed)

    def make(spec: WeightSpec) -> Tensor:
        if spec.how == "kv_scale":
            return torch.full(spec.shape, _RANDOM_KV_SCALE[kv_kind(plan)], device=device)
        if spec.how == "key_offset":
            return torch.zeros(spec.shape, device=device)
        weight = torch.empty(spec.shape, dtype=dtype, device=device)
        if len(spec.shape) == 2:
            weight.normal_(0.0, spec.shape[1] ** -0.5, generator=generator)
        elif spec.name.endswith(".bias"):
            weight.normal_(0.0, 0.02, generator=generator)
        else:
            weight.fill_(1.0)
        return weight

    def make_parts(quantized: QuantizedPart) -> dict[str, Tensor]:
        in_size = quantized.of.shape[1]
        return {**_quantize(quantized, make), "permutation": torch.arange(in_size, device=device)}

    return _make_all(plan, make, make_parts, progress)


def kv_kind(plan: Plan) -> KVKind:
    """Of a plan whose KV cache is of bytes."""
    return KV_KINDS[plan.kv_caches[0].dtype]


def _make_all(
    plan: Plan,
    make: Callable[[WeightSpec], Tensor],
    make_parts: Callable[[QuantizedPart], dict[str, Tensor]],
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Every weight of the plan. make: gives those that are not quantised; make_parts: all the parts of which
    one is given, at least those that the plan wants."""
    weights: dict[str, Tensor] = {}
    for number, spec in enumerate(plan.weights.values(), start=1):
        if spec.quantized is None:
            weights[spec.name] = make(spec)
        elif spec.name not in weights:
            made = make_parts(spec.quantized)
            packed, for_a_gpu = made["packed"], spec.quantized.scheme.endswith(SUFFIX)
            if packed.device.type == "cpu" and not for_a_gpu and ops.interleaves(packed):
                made["packed"] = ops.interleave_rows(packed)
            names = {part: f"{spec.quantized.of.name}.{part}" for part in made}
            weights |= {names[part]: made[part] for part in made if names[part] in plan.weights}
        if progress is not None:
            progress(number, len(plan.weights))
    return weights


def _quantize(quantized: QuantizedPart, make: Callable[[WeightSpec], Tensor]) -> dict[str, Tensor]:
    try:
        return find_scheme(quantized.scheme).quantize(make(quantized.of))
    except QuantizationError as error:
        raise QuantizationError(f"{quantized.of.name} cannot be quantised: {error}") from None


def _read_stored(quantized: QuantizedPart, checkpoint: Checkpoint, device: torch.device) -> dict[str, Tensor]:
    """The parts that the checkpoint holds, those of merged linears one below the other."""
    assert checkpoint.quantized is not None
    linears = [checkpoint.quantized.linears[name.removesuffix(".weight")] for name in quantized.of.sources]
    read = [linear.read(device) for linear in linears]
    parts = {
        name: tensor if len(read) == 1 or name == "global_scale" else torch.cat([one[name] for one in read])
        for name, tensor in read[0].items()
    }
    scheme = find_scheme(quantized.scheme)
    if isinstance(scheme, Repacked):
        parts = scheme.repack(parts, quantized.of.shape[1])
    permutation = linears[0].permutation
    return parts if permutation is None else {**parts, "permutation": permutation.to(device)}


def _load(
    spec: WeightSpec, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype | None
) -> Tensor:
    """dtype: None: that of the first source."""
    if spec.how == "copy":
        return _source(checkpoint, spec.sources[0], spec.shape).to(device=device, dtype=dtype)
    if dtype is None:
        dtype = _source(checkpoint, spec.sources[0], (spec.source_rows[0], *spec.shape[1:])).dtype
    whole = torch.empty(spec.shape, dtype=dtype, device=device)
    begin = 0
    for name, rows in zip(spec.sources, spec.source_rows, strict=True):
        whole[begin : begin + rows].copy_(_source(checkpoint, name, (rows, *spec.shape[1:])))
        begin += rows
    return whole


def _source(checkpoint: Checkpoint, name: str, shape: tuple[int, ...]) -> Tensor:
    dense = dense_weight(checkpoint, name)
    if dense is not None:
        return dense
    tensor = checkpoint.tensor(name, shape=shape)
    if not tensor.is_floating_point():
        raise CheckpointError(
            f"{checkpoint.path}: tensor {name!r} is {tensor.dtype}; a weight is floating point"
        )
    return tensor


def _check_names(plan: Plan, checkpoint: Checkpoint) -> None:
    """No tensor is left over: one that is would mean another model than config.json says."""
    wanted = {source for spec in plan.weights.values() for source in spec.sources}
    with torch.device("meta"):
        aliases = build(plan.config).aliases
    quantized = checkpoint.quantized
    unused = [
        name
        for name in checkpoint.names()
        if name not in wanted
        and name not in aliases
        and not name.endswith(_DERIVED)
        and not (is_kv_scale(name) if quantized is None else quantized.holds(name))
    ]
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path} holds the tensor {unused[0]!r}{more}, for which "
            f"{plan.config.architecture} has no place"
        )
