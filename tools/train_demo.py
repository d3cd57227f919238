"""Trains the demo model and its draft model on the source of CPython's standard library.

    python tools/train_demo.py prepare --stdlib /usr/lib/python3.11 --work build/demo
    python tools/train_demo.py train   --work build/demo --model main       (minutes on one GPU)
    python tools/train_demo.py train   --work build/demo --model draft      (may run beside the other)
    python tools/train_demo.py package --work build/demo --out python/fastkernels/demo

The corpus is small (a few million tokens), so the main model sees it many times: dropout on every residual
branch, and the weights kept are those of the lowest loss on the validation files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_corpus import END_OF_TEXT, VOCAB_SIZE, prepare
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HEAD_DIM = 64
ROPE_THETA = 10000.0
EPS = 1e-5
CONTEXT_TOKENS = 2048
PERPLEXITY_WINDOW_TOKENS = 1024
LIBRARY_SHARE = 0.7  # of the training rows; the others are drawn from the tests


@dataclass(frozen=True)
class Shape:
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    intermediate_size: int
    learning_rate: float
    steps: int
    dropout: float


SHAPES = {
    "main": Shape(256, 10, 4, 2, 640, learning_rate=2e-3, steps=7000, dropout=0.3),
    "draft": Shape(128, 2, 4, 2, 256, learning_rate=4e-3, steps=6000, dropout=0.0),
}


def rotary_tables(num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos, sin [num_tokens, head_dim] of the NeoX layout (the two halves of a head are the pairs)."""
    inverse = ROPE_THETA ** (-torch.arange(0, HEAD_DIM, 2, device=device).float() / HEAD_DIM)
    angles = torch.arange(num_tokens, device=device).float()[:, None] * inverse
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        q_size, kv_size = shape.num_q_heads * HEAD_DIM, shape.num_kv_heads * HEAD_DIM
        self.q_proj = nn.Linear(shape.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, num_tokens, _ = x.shape
        q, k, v = (
            proj(x).view(batch, num_tokens, -1, HEAD_DIM).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        group = self.shape.num_q_heads // self.shape.num_kv_heads
        k = rotate(k, cos, sin).repeat_interleave(group, dim=1)
        v = v.repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, num_tokens, -1))


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, EPS)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, EPS)
        self.mlp = MLP(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Llama(nn.Module):
    """Llama with tied embeddings; parameter names are those of a Hugging Face checkpoint less "model."."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape, dropout) for _ in range(shape.num_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, EPS)
        self.dropout = nn.Dropout(dropout)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                onto_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * shape.num_layers) if onto_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [batch, num_tokens + 1] int64 -> mean next-token loss over all of them, fp32."""
        x = self.dropout(self.embed_tokens(ids[:, :-1]))
        cos, sin = rotary_tables(x.shape[1], x.device)
        for layer in self.layers:
            x = layer(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed_tokens.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def windows(ids: Tensor, starts: Tensor, num_tokens: int) -> Tensor:
    """[len(starts), num_tokens + 1] int64: each row and the token after it."""
    return ids[starts[:, None] + torch.arange(num_tokens + 1, device=ids.device)].long()


def training_batch(parts: list[Tensor], rows: int, num_tokens: int, generator: torch.Generator) -> Tensor:
    library_rows = round(rows * LIBRARY_SHARE)
    drawn = []
    for ids, count in zip(parts, (library_rows, rows - library_rows), strict=True):
        starts = torch.randint(len(ids) - num_tokens, (count,), generator=generator, device=ids.device)
        drawn.append(windows(ids, starts, num_tokens))
    return torch.cat(drawn)


@torch.no_grad()
def validation_loss(model: nn.Module, ids: Tensor, rows: int, num_tokens: int, autocast: bool) -> float:
    """Mean loss over consecutive windows of a part."""
    model.eval()
    starts = torch.arange(0, len(ids) - num_tokens, num_tokens, device=ids.device)
    total = 0.0
    for chunk in starts.split(rows):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
            total += model(windows(ids, chunk, num_tokens)).item() * len(chunk)
    model.train()
    return total / len(starts)


def save_weights(model: Llama, path: Path) -> None:
    state = {
        f"model.{name}": value.detach().to("cpu", torch.bfloat16)
        for name, value in model.state_dict().items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path, metadata={"format": "pt"})


def train(args: argparse.Namespace) -> None:
    shape = SHAPES[args.model]
    steps = args.steps or shape.steps
    dropout = shape.dropout if args.dropout is None else args.dropout
    peak_rate = args.learning_rate or shape.learning_rate
    out = args.out or args.work / args.model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator(device).manual_seed(args.seed)
    library, tests, validation = (
        torch.from_numpy(np.load(args.work / f"{part}.npy").astype(np.int16)).to(device)
        for part in ("library", "tests", "validation")
    )
    model = Llama(shape, dropout).to(device)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}],
        lr=peak_rate, betas=(0.9, 0.95), fused=on_gpu,
    )  # fmt: skip
    num_parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.model}: {num_parameters} parameters, dropout {dropout}, {steps} steps on {device}")
    runner: nn.Module = torch.compile(model) if on_gpu and not args.no_compile else model  # type: ignore[assignment]

    warmup = max(1, min(200, steps // 10))
    best_loss, started = math.inf, time.monotonic()
    for step in range(steps):
        # The time limit shortens the schedule rather than cutting it off, so that the rate reaches zero.
        elapsed = (time.monotonic() - started) / (60 * args.max_minutes)
        progress = max(step / steps, elapsed)
        if progress >= 1:
            break
        rate = peak_rate * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = training_batch([library, tests], args.rows, args.window_tokens, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = runner(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 0:
            print(f"first step after {time.monotonic() - started:.0f} s, loss {loss.item():.3f}", flush=True)
            started = time.monotonic()  # compiling is no part of the schedule
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            held = validation_loss(model, validation, args.rows, args.window_tokens, on_gpu)
            seconds = time.monotonic() - started
            mark = ""
            if held < best_loss:
                best_loss, mark = held, " *"
                save_weights(model, out / "model.safetensors")
            print(
                f"{args.model} step {step + 1} {seconds:.0f} s rate {rate:.1e} "
                f"train {loss.item():.4f} validation {held:.4f}{mark}",
                flush=True,
            )
    if on_gpu:
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() >> 20} MiB")
    print(f"{args.model}: best validation loss {best_loss:.4f} (perplexity {math.exp(best_loss):.3f})")


def huggingface_config(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_q_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT_TOKENS,
        "rms_norm_eps": EPS,
        "rope_theta": ROPE_THETA,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor) -> tuple[float, float]:
    """(perplexity, total loss in nats) over windows of PERPLEXITY_WINDOW_TOKENS that overlap by one token.

    Each token but the first is predicted once, from what stands before it in its window.
    """
    total = 0.0
    for start in range(0, len(ids) - 1, PERPLEXITY_WINDOW_TOKENS):
        window = ids[start : start + PERPLEXITY_WINDOW_TOKENS + 1]
        total += model(window[None]).item() * (len(window) - 1)
    return math.exp(total / (len(ids) - 1)), total


def package(args: argparse.Namespace) -> None:
    """Writes the two model folders, the held-out text and its figures, which the model card quotes."""
    heldout = (args.work / "heldout.txt").read_bytes()
    ids = torch.from_numpy(np.load(args.work / "heldout.npy").astype(np.int64))
    figures: dict[str, object] = {
        "window_tokens": PERPLEXITY_WINDOW_TOKENS,
        "num_tokens": len(ids),
        "num_bytes": len(heldout) - len(END_OF_TEXT) * int((ids == 0).sum()),
        "files": (args.work / "heldout_files.txt").read_text(encoding="utf-8").split(),
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT_TOKENS,
        "clean_up_tokenization_spaces": False,
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 0}
    for name, folder in (("main", args.out), ("draft", args.out / "draft")):
        folder.mkdir(parents=True, exist_ok=True)
        weights = load_file(args.work / name / "model.safetensors")
        model = Llama(SHAPES[name], dropout=0.0)
        model.load_state_dict({key.removeprefix("model."): value.float() for key, value in weights.items()})
        value, nats = perplexity(model.eval(), ids)
        bits_per_byte = nats / math.log(2) / int(figures["num_bytes"])  # type: ignore[call-overload]
        figures[name] = {"perplexity": round(value, 4), "bits_per_byte": round(bits_per_byte, 4)}
        print(f"{name}: held-out perplexity {value:.4f}, {bits_per_byte:.4f} bits a byte")
        shutil.copyfile(args.work / name / "model.safetensors", folder / "model.safetensors")
        shutil.copyfile(args.work / "tokenizer.json", folder / "tokenizer.json")
        for file, content in (
            ("config.json", huggingface_config(SHAPES[name])),
            ("generation_config.json", generation_config),
            ("tokenizer_config.json", tokenizer_config),
        ):
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (args.out / "heldout.txt.gz").write_bytes(gzip.compress(heldout, 9, mtime=0))
    (args.out / "heldout.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("prepare", "read the corpus, train the tokenizer, write the token ids"),
        ("train", "train one model, keeping the weights of the lowest validation loss"),
        ("package", "measure the held-out perplexity and write the model folders"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--work", type=Path, required=True, help="folder of corpus and weights")
        if name == "prepare":
            command.add_argument("--stdlib", type=Path, required=True, help="the Lib folder of a CPython")
        elif name == "package":
            command.add_argument("--out", type=Path, required=True, help="the model folder to write")
        else:
            command.add_argument("--model", choices=SHAPES, required=True)
            command.add_argument("--out", type=Path, help="folder of the weights (default: WORK/MODEL)")
            command.add_argument("--steps", type=int)
            command.add_argument("--dropout", type=float)
            command.add_argument("--learning-rate", type=float)
            command.add_argument("--max-minutes", type=float, default=60.0)
            command.add_argument("--rows", type=int, default=16)
            command.add_argument("--window-tokens", type=int, default=CONTEXT_TOKENS)
            command.add_argument("--eval-every", type=int, default=250)
            command.add_argument("--seed", type=int, default=0)
            command.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    try:
        if args.command == "prepare":
            prepare(args.stdlib, args.work)
        elif args.command == "train":
            train(args)
        else:
            package(args)
    except (FileNotFoundError, ValueError) as error:
        parser.error(f"{error} (the order is prepare, train both models, package)")


if __name__ == "__main__":
    main()
