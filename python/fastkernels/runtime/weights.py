"""A plan's weights as tensors on the device: from a checkpoint, or random at real shapes for benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastkernels import ops
from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.reader import Checkpoint
from fastkernels.compiler import Plan, WeightSpec
from fastkernels.models import build
from fastkernels.quantize import QuantizationError, find_scheme
from fastkernels.quantize.repacked import SUFFIX

Progress = Callable[[int, int], None]
"""Called with the weights that are ready and the number there are."""

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
    place, and quantised to nearest where the plan says so; on the CPU, packed rows that ``ops.interleaves``
    takes are interleaved.

    A copy in the checkpoint's own dtype on the CPU shares its mapped file.
    Raises CheckpointError for a tensor that is missing, of another shape or not floating point, and for one
    that the model has no place for; QuantizationError for one that holds NaN or infinity.
    """
    _check_names(plan, checkpoint)

    def load(spec: WeightSpec) -> Tensor:
        return _load(spec, checkpoint, torch.device(device), dtype)

    def load_as_stored(spec: WeightSpec) -> Tensor:
        return _load(spec, checkpoint, torch.device(device), None)

    return _make_all(plan, load, load_as_stored, progress)


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
        weight = torch.empty(spec.shape, dtype=dtype, device=device)
        if len(spec.shape) == 2:
            weight.normal_(0.0, spec.shape[1] ** -0.5, generator=generator)
        elif spec.name.endswith(".bias"):
            weight.normal_(0.0, 0.02, generator=generator)
        else:
            weight.fill_(1.0)
        return weight

    return _make_all(plan, make, make, progress)


def _make_all(
    plan: Plan,
    make: Callable[[WeightSpec], Tensor],
    make_source: Callable[[WeightSpec], Tensor],
    progress: Progress | None,
) -> dict[str, Tensor]:
    """Every weight of the plan. make: gives those that are not quantised; make_source: what the others are
    made of, in whatever dtype it is there."""
    weights: dict[str, Tensor] = {}
    for number, spec in enumerate(plan.weights.values(), start=1):
        if spec.quantized is None:
            weights[spec.name] = make(spec)
        elif spec.name not in weights:
            weights |= _quantize(spec.quantized.of, spec.quantized.scheme, make_source)
        if progress is not None:
            progress(number, len(plan.weights))
    return weights


def _quantize(of: WeightSpec, scheme: str, make_source: Callable[[WeightSpec], Tensor]) -> dict[str, Tensor]:
    try:
        parts = find_scheme(scheme).quantize(make_source(of))
    except QuantizationError as error:
        raise QuantizationError(f"{of.name} cannot be quantised: {error}") from None
    packed = parts["packed"]
    if packed.device.type == "cpu" and not scheme.endswith(SUFFIX) and ops.interleaves(packed):
        parts["packed"] = ops.interleave_rows(packed)
    return {f"{of.name}.{part}": tensor for part, tensor in parts.items()}


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
    unused = [
        name
        for name in checkpoint.names()
        if name not in wanted and name not in aliases and not name.endswith(_DERIVED)
    ]
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.path} holds the tensor {unused[0]!r}{more}, for which "
            f"{plan.config.architecture} has no place"
        )
