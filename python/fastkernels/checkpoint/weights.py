"""Puts the tensors of a checkpoint into a model definition."""

from __future__ import annotations

import torch
from torch import nn

from fastkernels.checkpoint.errors import CheckpointError
from fastkernels.checkpoint.quantized.formats import dense_weight
from fastkernels.checkpoint.reader import Checkpoint
from fastkernels.models.decoder import CausalLM

_DERIVED = (".rotary_emb.inv_freq",)  # saved by old checkpoints, computed here


def load_weights(model: CausalLM, checkpoint: Checkpoint, *, dtype: torch.dtype | None = None) -> CausalLM:
    """Replaces every parameter of ``model`` (on the meta device, say) by the checkpoint's tensor; returns the
    model.

    dtype: cast to it; None keeps the checkpoint's and shares its mapped file without copying
    Weights that are quantised there are dequantised, to fp32 where dtype is None; activations stay as they
    are.
    Raises CheckpointError for a missing tensor, one of the wrong shape, and one that the model has no place
    for.
    """
    aliases = model.aliases
    wanted = [name for name in model.state_dict() if name not in aliases]
    unused = [name for name in checkpoint.names() if name not in wanted and name not in aliases]
    quantized = checkpoint.quantized
    unused = [
        name
        for name in unused
        if not name.endswith(_DERIVED) and not (quantized is not None and quantized.holds(name))
    ]
    for name in wanted:
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        value = dense_weight(checkpoint, name)
        if value is None:
            value = checkpoint.tensor(name, shape=getattr(owner, leaf).shape)
        if not value.is_floating_point():
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name!r} is {value.dtype}; weights are floating point"
            )
        setattr(owner, leaf, nn.Parameter(value if dtype is None else value.to(dtype), requires_grad=False))
    if unused:
        raise CheckpointError(
            f"{checkpoint.path} holds the tensor {unused[0]!r}"
            + (f" and {len(unused) - 1} more" if len(unused) > 1 else "")
            + f" for which {type(model).__name__} has no place"
        )
    model.tie_weights()
    return model
