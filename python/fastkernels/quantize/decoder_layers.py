"""A checkpoint's decoder one layer at a time: the plain definition over many texts of one length.

What calibration, its algorithms and ``fastkernels evaluate`` run instead of an engine: the memory is that of
one layer and of the hidden states, every linear's input can be seen, and any weight can be put in place of
another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkernels.checkpoint import Checkpoint
from fastkernels.checkpoint.quantized.formats import dense_weight
from fastkernels.models import build
from fastkernels.models.decoder import DecoderLayer
from fastkernels.models.layers import Attention
from fastkernels.ops.reference import rms_norm, round_activation
from fastkernels.quantize import find_scheme
from fastkernels.quantize.scheme import Scheme

_TOKENS_AT_ONCE = 4096  # that go through a layer together, whole texts: what activations take stays small
_LOGITS_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class LinearGroup:
    """Linears that read one value, which engines merge, and the module before them whose output it is: to
    scale a column of theirs by s, that module's row is divided by s."""

    linears: tuple[str, ...]
    before: str

    @property
    def name(self) -> str:
        return self.linears[0]


GROUPS = (
    LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    LinearGroup(("self_attn.o_proj",), "self_attn.v_proj"),
    LinearGroup(("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    LinearGroup(("mlp.down_proj",), "mlp.up_proj"),
)


class BatchedAttention(Attention):
    """What ``Attention`` computes for one sequence, for many of one length, flat one after the other.

    num_tokens:  of a sequence; set before a forward
    kv_rounding: called with "k" or "v" and [num_seqs, num_kv_heads, num_tokens, head_dim] before they are
                 read, as a cache of fewer bits would give them back; None: as they are
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__(
            attention.layer_index,
            attention.num_q_heads,
            attention.num_kv_heads,
            attention.head_dim,
            attention.scale,
            attention.sliding_window,
        )
        self.num_tokens = 1
        self.kv_rounding: KVRounding | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [num_seqs * num_tokens, heads, head_dim] -> like q."""
        q, k, v = (x.unflatten(0, (-1, self.num_tokens)).transpose(1, 2) for x in (q, k, v))
        if self.kv_rounding is not None:
            k, v = self.kv_rounding("k", k), self.kv_rounding("v", v)
        mask = None
        if self.sliding_window is not None and self.sliding_window < self.num_tokens:
            token = torch.arange(self.num_tokens, device=q.device)
            distance = token[:, None] - token[None, :]
            mask = (distance >= 0) & (distance < self.sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1).contiguous()


class KVRounding:
    """Called where a layer's keys and values pass by; the base class lets them through."""

    def __call__(self, which: str, x: Tensor) -> Tensor:
        return x


class DecoderLayers:
    """The decoder of ``checkpoint`` for texts of at most ``max_tokens``, computing in ``dtype`` on
    ``device``.

    A checkpoint that is quantised is run as its engine runs it: the weights as they were rounded, activations
    rounded where the scheme rounds them. Raises UnsupportedModelError or CheckpointError as reading the
    configuration does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> None:
        """dtype: None: bf16 on CUDA, fp32 on the CPU"""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.device = device
        self.dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        with torch.device("meta"):
            self._model = build(self.config)
        self._model.build_table(max_tokens, str(device))

    def __len__(self) -> int:
        return self.config.num_layers

    @property
    def linears(self) -> list[str]:
        """Full names of the decoder's linears, in the order they run; the head is none of them."""
        return [f"model.layers.{i}.{name}" for i in range(len(self)) for g in GROUPS for name in g.linears]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """out_size and in_size of a linear by its full name."""
        linear = self._model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        return linear.out_features, linear.in_features

    def read_layer(self, index: int) -> dict[str, Tensor]:
        """The parameters of a layer in fp32 on the device, named within it."""
        found = {}
        for name, meta in self._meta_layer(index).named_parameters():
            full = f"model.layers.{index}.{name}"
            value = dense_weight(self.checkpoint, full)
            if value is None:
                value = self.checkpoint.tensor(full, shape=meta.shape)
            found[name] = value.to(self.device).float()
        return found

    def layer(self, index: int, parameters: Mapping[str, Tensor]) -> DecoderLayer:
        """A layer to run, with these parameters. It shares nothing with another but the rotary table."""
        meta = self._meta_layer(index)
        with torch.device("meta"):  # every parameter is replaced below
            layer = DecoderLayer(
                self.config, type(meta.self_attn)(self.config, index, self._model.model.rotary_emb)
            )
        for name in [name for name, _ in layer.named_parameters()]:
            owner, _, leaf = name.rpartition(".")
            value = nn.Parameter(parameters[name].to(self.dtype), requires_grad=False)
            setattr(layer.get_submodule(owner), leaf, value)
        layer.self_attn.attention = BatchedAttention(layer.self_attn.attention)
        stored = self.checkpoint.quantized.linears if self.checkpoint.quantized is not None else {}
        for linear in (linear for group in GROUPS for linear in group.linears):
            scheme = stored[full].scheme if (full := f"model.layers.{index}.{linear}") in stored else None
            if scheme is not None:
                round_inputs(layer.get_submodule(linear), find_scheme(scheme))
        return layer.eval()

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids [num_seqs, num_tokens] -> hidden states [num_seqs, num_tokens, hidden_size]."""
        table = self.checkpoint.tensor("model.embed_tokens.weight")
        return F.embedding(token_ids.cpu(), table).to(self.device, self.dtype)

    def batches(self, hidden: Tensor) -> Iterator[Tensor]:
        """Views of whole texts, few enough to run together."""
        yield from hidden.split(max(_TOKENS_AT_ONCE // hidden.shape[1], 1))

    @torch.inference_mode()
    def run(self, layer: DecoderLayer, hidden: Tensor, *, in_place: bool = False) -> Tensor:
        """hidden [num_seqs, num_tokens, hidden_size] through a layer."""
        out = hidden if in_place else torch.empty_like(hidden)
        for part, into in zip(self.batches(hidden), self.batches(out), strict=True):
            into.copy_(self.forward(layer, part))
        return out

    @torch.inference_mode()
    def forward(self, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        attention_of(layer).num_tokens = hidden.shape[1]
        positions = torch.arange(hidden.shape[1], device=self.device).repeat(hidden.shape[0])
        flat: Tensor = layer(hidden.flatten(0, 1), positions)
        return flat.view_as(hidden)

    @torch.inference_mode()
    def nats(
        self, hidden: Tensor, targets: Tensor, head: Tensor | None = None, head_scheme: Scheme | None = None
    ) -> float:
        """Mean negative log likelihood of targets [num_seqs, num_tokens] after the last layer.

        head: the vocabulary projection, whose inputs are rounded as head_scheme says; None: the checkpoint's
        """
        norm = self._model.model.norm
        norm_weight = self.checkpoint.tensor("model.norm.weight").to(self.device)
        head = (self.head() if head is None else head).to(self.device, self.dtype)
        flat, wanted = hidden.flatten(0, 1), targets.flatten().to(self.device)
        total = 0.0
        rows = max(_LOGITS_AT_ONCE // head.shape[0], 1)
        for part, ids in zip(flat.split(rows), wanted.split(rows), strict=True):
            x = rms_norm(part.float(), norm_weight.float(), norm.eps)
            if head_scheme is not None:
                x = round_activation(x, head_scheme.activation, torch.float32)
            total += F.cross_entropy((x.to(self.dtype) @ head.T).float(), ids, reduction="sum").item()
        return total / len(flat)

    def head(self) -> Tensor:
        """The vocabulary projection [vocab_size, hidden_size]."""
        tied = self.config.tie_word_embeddings
        return self.checkpoint.tensor("model.embed_tokens.weight" if tied else "lm_head.weight")

    def _meta_layer(self, index: int) -> DecoderLayer:
        layer = self._model.model.layers[index]
        assert isinstance(layer, DecoderLayer)
        return layer


def attention_of(layer: DecoderLayer) -> BatchedAttention:
    """Of a layer that ``DecoderLayers.layer`` made."""
    attention = layer.self_attn.attention
    assert isinstance(attention, BatchedAttention)
    return attention


def round_inputs(linear: nn.Module, scheme: Scheme) -> None:
    """From now on the linear sees its inputs rounded as the scheme's engine rounds them."""
    if scheme.activation is None:
        return

    def rounded(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (round_activation(args[0].float(), scheme.activation, torch.float32).to(args[0].dtype),)

    linear.register_forward_pre_hook(rounded)
