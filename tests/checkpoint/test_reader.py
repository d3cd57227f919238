"""Checkpoint folders: what is read, what is written, and every way in which one can be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastkernels.checkpoint import Checkpoint, CheckpointError, load_weights, write_checkpoint
from fastkernels.config import UnsupportedModelError
from fastkernels.models import build
from tests.checkpoints import CASES, SIZES, make_checkpoint, make_model

CONFIG: dict[str, Any] = {**SIZES, "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32"}


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "a.weight": torch.randn(5, 7),
        "b.bias": torch.randn(3).to(torch.bfloat16),
        "c.empty": torch.empty(0, 4),
        "d.scalar": torch.tensor(2.5),
        "e.int": torch.arange(6).reshape(2, 3),
        "f.fp8": torch.randn(9).to(torch.float8_e4m3fn),
        "g.odd": torch.randn(11).half(),
    }


def _write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **options: Any) -> Path:
    write_checkpoint(folder, CONFIG, _tensors() if tensors is None else tensors, **options)
    return folder


@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 60])
def test_what_is_written_is_read(tmp_path: Path, max_shard_bytes: int) -> None:
    tensors = _tensors()
    checkpoint = Checkpoint(_write(tmp_path, tensors, max_shard_bytes=max_shard_bytes))
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == (
        ["model.safetensors"]
        if max_shard_bytes > 60
        else [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
        ]
    )
    assert checkpoint.config_dict == CONFIG
    assert checkpoint.names() == sorted(tensors)
    assert checkpoint.size_bytes == sum(tensor.nbytes for tensor in tensors.values())
    for name, tensor in tensors.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        read = checkpoint.tensor(name, shape=tensor.shape)
        assert read.shape == tensor.shape and read.dtype == tensor.dtype
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_reads_the_shards_that_transformers_writes_and_the_other_way_round(tmp_path: Path) -> None:
    import transformers

    sharded = make_checkpoint(tmp_path, "qwen3-tied", max_shard_size="300KB")
    assert (sharded / "model.safetensors.index.json").exists()
    checkpoint = Checkpoint(sharded)
    expected = make_model("qwen3-tied").state_dict()
    assert set(checkpoint.names()) == set(expected) - {"lm_head.weight"}
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), expected[name])

    written = tmp_path / "written"
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    write_checkpoint(written, checkpoint.config_dict, tensors, max_shard_bytes=200_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(written)
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name])


def test_tensors_are_memory_mapped_and_private(tmp_path: Path) -> None:
    _write(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    tensor = Checkpoint(tmp_path).tensor("a.weight")
    tensor.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before
    big = Checkpoint(_write(tmp_path / "big", {"big": torch.zeros(64, 1024, 1024, dtype=torch.uint8)}))
    resident_kib = _resident_kib()
    row = big.tensor("big")[3]
    assert int(row.sum()) == 0
    assert _resident_kib() - resident_kib < 32 * 1024, "one row of 1 MiB must not bring 64 MiB in"


def _resident_kib() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def test_unaligned_tensors(tmp_path: Path) -> None:
    """The format's writers align; its readers must not count on it."""
    data = torch.randn(4)
    header = {
        "x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "y": {"dtype": "F32", "shape": [4], "data_offsets": [1, 17]},
    }
    _write_raw(tmp_path, header, b"\x07" + data.numpy().tobytes())
    assert torch.equal(Checkpoint(tmp_path).tensor("y"), data)


def _write_raw(folder: Path, header: Any, data: bytes, header_bytes: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    length = struct.pack("<Q", len(raw) if header_bytes is None else header_bytes)
    (folder / "model.safetensors").write_bytes(length + raw + data)
    return folder


def test_writer_writes_shared_memory_once_and_removes_what_it_replaces(tmp_path: Path) -> None:
    weight = torch.randn(6, 4)
    _write(tmp_path, max_shard_bytes=60)
    _write(tmp_path, {"embed": weight, "head": weight, "view": weight.t()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == {"embed", "view"}
    assert torch.equal(written["view"], weight.t())


def test_fingerprint_follows_the_weights_not_the_sharding(tmp_path: Path) -> None:
    tensors = _tensors()
    whole = Checkpoint(_write(tmp_path / "whole", tensors)).fingerprint
    assert len(whole) == 64
    assert Checkpoint(_write(tmp_path / "sharded", tensors, max_shard_bytes=60)).fingerprint == whole
    tensors["a.weight"] = tensors["a.weight"] + 1
    assert Checkpoint(_write(tmp_path / "tuned", tensors)).fingerprint != whole
    write_checkpoint(tmp_path / "config", {**CONFIG, "rms_norm_eps": 0.5}, _tensors())
    assert Checkpoint(tmp_path / "config").fingerprint != whole


def _broken(change: Callable[[Path], Any], shards: int = 1) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        _write(folder, max_shard_bytes=60 if shards > 1 else 5_000_000_000)
        change(folder)

    return make


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def _lengthen(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"tail")


def _reindex(**weight_map: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        value = json.loads(index.read_text())
        value["weight_map"].update(weight_map)
        index.write_text(json.dumps(value))

    return change


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}

BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (_broken(lambda f: (f / "config.json").unlink()), "has no config.json"),
    "broken config": (
        _broken(lambda f: (f / "config.json").write_text('{"hidden')),
        r"config\.json is not valid JSON: Unterminated string",
    ),
    "config is a list": (
        _broken(lambda f: (f / "config.json").write_text("[]")),
        r"config\.json holds a JSON list; it must hold an object",
    ),
    "no weights": (
        _broken(lambda f: (f / "model.safetensors").unlink()),
        r"has neither model\.safetensors nor model\.safetensors\.index\.json",
    ),
    "pickle": (_broken(_only_pickle), r"holds pickled weights \(pytorch_model\.bin\), which run code"),
    "truncated": (
        _broken(_truncate),
        r"model\.safetensors is truncated: its header describes \d+ bytes, the file",
    ),
    "too long": (_broken(_lengthen), r"model\.safetensors is too long: its header describes"),
    "cut in the header": (
        _broken(lambda f: (f / "model.safetensors").write_bytes(b"\x00\x10\x00\x00\x00\x00\x00\x00{")),
        "truncated or no safetensors file: it has 9 bytes and announces a header of 4096",
    ),
    "empty file": (
        _broken(lambda f: (f / "model.safetensors").write_bytes(b"")),
        "truncated or no safetensors file: it has 0 bytes",
    ),
    "header no JSON": (lambda f: _write_raw(f, b"{nonsense", b""), "its header is no JSON"),
    "header a list": (lambda f: _write_raw(f, [1], b""), "its header is not a JSON object"),
    "entry without shape": (
        lambda f: _write_raw(f, {"x": {"dtype": "F32", "data_offsets": [0, 16]}}, bytes(16)),
        "lacks a dtype, shape or byte range for tensor 'x'",
    ),
    "negative range": (
        lambda f: _write_raw(f, {"x": {**ENTRY, "data_offsets": [-8, 8]}}, bytes(16)),
        "lacks a dtype, shape or byte range for tensor 'x'",
    ),
    "unknown dtype": (
        lambda f: _write_raw(f, {"x": {**ENTRY, "dtype": "F4"}}, bytes(16)),
        "tensor 'x' has dtype 'F4'; fastkernels reads F64, F32",
    ),
    "range and shape differ": (
        lambda f: _write_raw(f, {"x": {**ENTRY, "shape": [5]}}, bytes(16)),
        r"tensor 'x' of F32 \[5\] needs 20 bytes, its byte range has 16",
    ),
    "missing shard": (
        _broken(lambda f: (f / "model-00002-of-00003.safetensors").unlink(), shards=3),
        r"index\.json places tensor '[a-g]\.\w+' in model-00002-of-00003\.safetensors, which does not exist",
    ),
    "tensor not in its shard": (
        _broken(_reindex(**{"z.weight": "model-00001-of-00003.safetensors"}), shards=3),
        r"places tensor 'z\.weight' in model-00001-of-00003\.safetensors, which does not hold it",
    ),
    "shard outside the folder": (
        _broken(_reindex(**{"z.weight": "../model.safetensors"}), shards=3),
        r"in '\.\./model\.safetensors'; it must name a \.safetensors file in the same folder",
    ),
    "shard a pickle": (
        _broken(_reindex(**{"z.weight": "model.bin"}), shards=3),
        r"in 'model\.bin'; it must name a \.safetensors file",
    ),
    "index without a map": (
        _broken(lambda f: (f / "model.safetensors.index.json").write_text("{}")),
        "has no weight_map from tensor names to files",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_folders(kind: str, tmp_path: Path) -> None:
    break_it, message = BROKEN[kind]
    break_it(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(tmp_path)
    assert str(tmp_path) in str(caught.value), "the message names the file"
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the checkpoint .*nowhere does not exist; give the folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds pickled weights \(model\.pt\)"):
        Checkpoint(tmp_path / "model.pt")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is not a folder"):
        Checkpoint(tmp_path / "file")


def test_missing_tensor_and_wrong_shape(tmp_path: Path) -> None:
    checkpoint = Checkpoint(_write(tmp_path))
    for read in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(CheckpointError, match=r"has no tensor 'z\.weight'; it holds 7 others"):
            read("z.weight")
    message = r"model\.safetensors: tensor 'a\.weight' has shape \[5, 7\]; config\.json asks for \[7, 5\]"
    with pytest.raises(CheckpointError, match=message):
        checkpoint.tensor("a.weight", shape=(7, 5))


def test_config_errors_name_the_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {**CONFIG, "num_hidden_layers": -1}, _tensors())
    with pytest.raises(CheckpointError, match=r"config\.json: .*num_hidden_layers = -1"):
        _ = Checkpoint(tmp_path).config
    for wrong in ({"rope_scaling": ["yarn"]}, {"partial_rotary_factor": "half"}):
        write_checkpoint(tmp_path, {**CONFIG, **wrong}, _tensors())
        with pytest.raises(CheckpointError, match=r"config\.json holds a value of the wrong type"):
            _ = Checkpoint(tmp_path).config
    write_checkpoint(tmp_path, {**CONFIG, "architectures": ["Mamba"]}, _tensors())
    with pytest.raises(UnsupportedModelError, match="'Mamba'; fastkernels knows LlamaForCausalLM"):
        _ = Checkpoint(tmp_path).config


def _llama(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Any:
    reference = make_model("llama")
    tensors = dict(reference.state_dict())
    change(tensors)
    write_checkpoint(
        folder, {**reference.config.to_dict(), "architectures": [CASES["llama"].architecture]}, tensors
    )
    checkpoint = Checkpoint(folder)
    with torch.device("meta"):
        model = build(checkpoint.config)
    return load_weights(model, checkpoint)


def test_weights_that_do_not_fit_the_model(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"has no tensor '{name}'"):
        _llama(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(
        CheckpointError, match=rf"'{name}' has shape \[160, 232\]; config\.json asks for \[232, 160\]"
    ):
        _llama(tmp_path, lambda tensors: tensors.update({name: tensors[name].t()}))
    with pytest.raises(CheckpointError, match=f"'{name}' is torch.int8; weights are floating point"):
        _llama(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.zeros(320), "x": torch.zeros(1)}
    with pytest.raises(
        CheckpointError, match=r"q_proj\.bias' and 1 more for which LlamaForCausalLM has no place"
    ):
        _llama(tmp_path, lambda tensors: tensors.update(extra))


def test_old_checkpoints_with_saved_frequencies_are_read(tmp_path: Path) -> None:
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.zeros(40) for i in range(3)}
    model = _llama(tmp_path, lambda tensors: tensors.update(extra))
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_load_weights_casts_when_told(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "qwen2-tied", dtype=torch.bfloat16)
    checkpoint = Checkpoint(path)
    assert checkpoint.config.dtype == "bfloat16"
    model = load_weights(build(checkpoint.config), checkpoint)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    load_weights(model, checkpoint, dtype=torch.float32)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.requires_grad for p in model.parameters())


def test_reader_agrees_with_the_safetensors_library(tmp_path: Path) -> None:
    tensors = _tensors()
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(tmp_path)
    for name, expected in load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(
            checkpoint.tensor(name).reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)
        )
