"""The autotuner with a timer that is made up: what tactics there are, what is chosen, kept, taken again."""

import json
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastkernels import ops
from fastkernels.compiler import compile_model
from fastkernels.compiler.tune import (
    BUCKETS,
    FILE_NAME,
    STREAM,
    TORCH,
    Choices,
    Product,
    Tactic,
    TacticCache,
    bucket_of,
    call_of,
    gates,
    products_of,
    rule,
    tactics_of,
    tune,
)
from fastkernels.compiler.tune.calls import empty_outputs, random_weight, random_x
from fastkernels.compiler.tune.timer import CudaTimer, num_copies, rounds
from fastkernels.config import ConfigError, cache_folder, tune_mode
from fastkernels.models.presets import PRESETS
from fastkernels.ops import reference
from fastkernels.ops.gemm import (
    LINEAR_TACTIC,
    MATMUL_FEW_TILES,
    MATMUL_SM80_TILES,
    MATMUL_TILES,
    NUM_MATMUL_TACTICS,
)

CSRC = Path(__file__).parent.parent.parent / "csrc"
HOPPER, AMPERE = (9, 0), (8, 0)
BF16 = torch.bfloat16
QKV = Product("linear", "bf16", BF16, 6144, 4096)
FP8 = Product("matmul", "e4m3", BF16, 6144, 4096)
INT4 = Product("quantized_linear", "int4-g128", BF16, 6144, 4096)
GATED = Product("linear", "bf16", BF16, 28672, 4096, gated=True)
GATED_FP8 = Product("matmul", "e4m3", BF16, 28672, 4096, gated=True)
PRODUCTS = {QKV: 512, FP8: 512, INT4: 64}


class MadeUpTimer:
    """Every tactic takes as long as its name says; another seed, another order."""

    def __init__(self, seed: str = "") -> None:
        self.seed = seed
        self.calls: list[tuple[Product, int, Tactic]] = []

    def __call__(self, product: Product, num_tokens: int, tactic: Tactic) -> float:
        self.calls.append((product, num_tokens, tactic))
        return 1.0 + sum(map(ord, f"{product}{num_tokens}{tactic}{self.seed}")) * 7919 % 1013


def run(folder: Path, timer: MadeUpTimer, *, gpu: str = "NVIDIA H200", version: str = "0.1.0", **options):
    options = {"mode": "full", "capability": HOPPER, **options}
    cache = TacticCache(folder / "fastkernels" / FILE_NAME, gpu, version)
    return tune(options.pop("products", PRODUCTS), cache, timer, **options)


def chosen(choices: Choices, products=PRODUCTS) -> dict[tuple[Product, int], Tactic]:
    return {
        (product, tokens): choices.tactic(product, tokens)
        for product, rows in products.items()
        for tokens in range(1, rows + 1)
    }


BY_RULE = chosen(Choices(capability=HOPPER))


# --- tactics ----------------------------------------------------------------------------------------------


def test_tiles_are_those_of_the_kernel():
    source = (CSRC / "gemm" / "matmul_sm90.h").read_text()
    table = source.partition("kMatmulTiles[] = {")[2].partition("};")[0]
    found = re.findall(r"\{(true|false), (\d+), (\d+)\}", table)
    assert [(a == "true", int(c), int(n)) for a, c, n in found] == list(MATMUL_TILES)
    few = re.findall(r"\{(\d+), (\d+), \d+\}", source.partition("kMatmulFewTiles[] = {")[2].partition(";")[0])
    assert [(int(columns), int(cluster)) for columns, cluster in few] == list(MATMUL_FEW_TILES)
    tiles = ", ".join(map(str, MATMUL_SM80_TILES))
    assert f"kMatmulSm80Tiles[] = {{{tiles}}};" in (CSRC / "gemm" / "matmul_sm80.h").read_text()
    assert f"kNumMatmulTactics = {NUM_MATMUL_TACTICS};" in (CSRC / "include/fastkernels/gemm.h").read_text()


def test_tiles_of_repacked_weights_are_those_of_the_kernel():
    source = (CSRC / "gemm" / "weight_only_sm90.h").read_text()
    table = source.partition("kWeightOnlyTiles[] = {")[2].partition("};")[0]
    found = re.findall(r"\{(\d+), (\d+)\}", table)
    assert [(int(tokens), int(blocks)) for tokens, blocks in found] == list(ops.WEIGHT_ONLY_TILES)
    header = (CSRC / "include/fastkernels/gemm.h").read_text()
    assert f"kWeightOnlyFewTactics = {ops.WEIGHT_ONLY_FEW_TACTICS};" in header
    assert f"kWeightOnlyTactics = {ops.WEIGHT_ONLY_TACTICS};" in header


def test_which_products_gate():
    """The tactics of matmul on Hopper, of many tokens, where gate and up are whole tiles."""
    by_tile = Tactic("matmul", 9)
    for product in (GATED, GATED_FP8):
        assert gates(product, by_tile, 1024, HOPPER) and gates(product, Tactic("matmul", -1), 1024, HOPPER)
        assert not gates(product, by_tile, 1023, HOPPER)
        assert not gates(product, by_tile, 1024, AMPERE) and not gates(product, by_tile, 1024, None)
        assert not gates(replace(product, gated=False), by_tile, 1024, HOPPER)
        for tactic in (TORCH, STREAM, Tactic("matmul", LINEAR_TACTIC)):
            assert not gates(product, tactic, 1024, HOPPER)
        assert not gates(replace(product, out_size=24), by_tile, 1024, HOPPER)


def test_buckets():
    assert [bucket_of(n) for n in (0, 1, 2, 3, 9, 17, 33, 8192, 10**6)] == [
        1,
        1,
        2,
        4,
        16,
        24,
        48,
        8192,
        8192,
    ]
    assert list(BUCKETS) == sorted(set(BUCKETS))


@pytest.mark.parametrize("num_tokens", BUCKETS)
def test_tactics_of_16_bit_weights(num_tokens):
    tactics = tactics_of(QKV, num_tokens, HOPPER)
    numbers = [tactic.number for tactic in tactics if tactic.kernel == "matmul"]
    assert TORCH in tactics and (STREAM in tactics) == (num_tokens <= 8)
    by_tile = 8 < num_tokens <= 64
    assert numbers and not {4, 5} & set(numbers) and (-1 in numbers) == by_tile
    tiles = [MATMUL_TILES[number // 2] for number in numbers if number >= 0]
    if num_tokens <= 64:
        assert not any(tile.tokens_are_a for tile in tiles)
    if num_tokens > 256:
        assert all(tile.tokens_are_a for tile in tiles)
    plain = [TORCH, STREAM] if num_tokens <= 8 else [TORCH]
    assert tactics_of(QKV, num_tokens, AMPERE) == plain
    assert rule(QKV, num_tokens, AMPERE) == plain[-1]
    assert rule(QKV, num_tokens, HOPPER) == (Tactic("matmul", -1) if by_tile else plain[-1])


@pytest.mark.parametrize("num_tokens", BUCKETS)
def test_tactics_of_a_gate_of_16_bits(num_tokens):
    """They are those of the same product without, but by rule Hopper's kernel has the gate of many tokens."""
    plain = rule(replace(GATED, gated=False), num_tokens, HOPPER)
    own = Tactic("matmul", -1)
    assert rule(GATED, num_tokens, HOPPER) == (own if num_tokens >= 1024 else plain)
    assert rule(GATED, num_tokens, AMPERE) == (STREAM if num_tokens <= 8 else TORCH)
    assert rule(replace(GATED, out_size=24), num_tokens, HOPPER) == plain, "the epilogue has no such gate"
    others = tactics_of(replace(GATED, gated=False), num_tokens, HOPPER)
    assert set(tactics_of(GATED, num_tokens, HOPPER)) == {rule(GATED, num_tokens, HOPPER), *others}


def test_what_the_kernels_do_not_take_is_no_tactic():
    assert tactics_of(Product("linear", "fp32", torch.float32, 64, 64), 1, HOPPER) == [TORCH]
    assert tactics_of(Product("linear", "bf16", BF16, 64, 60), 1, HOPPER) == [TORCH]
    assert tactics_of(Product("linear", "bf16", BF16, 60, 64), 1, HOPPER) == [TORCH, STREAM]
    assert rule(Product("linear", "fp32", torch.float32, 64, 64), 1, HOPPER) == TORCH
    assert rule(Product("linear", "bf16", BF16, 64, 60), 9, HOPPER) == TORCH


@pytest.mark.parametrize("num_tokens", BUCKETS)
@pytest.mark.parametrize("weight", ["e4m3", "e4m3-block", "int8", "int8-zeros", "e5m2"])
def test_tactics_of_bytes_keep_their_bits(weight, num_tokens):
    """No tile with sums of 14 bits, and none that the kernel refuses (tests/ops/test_matmul_sm90.py)."""
    product = Product("matmul", weight, BF16, 6144, 4096)
    plain = rule(product, num_tokens, HOPPER)
    assert plain == Tactic("matmul", LINEAR_TACTIC if num_tokens <= 8 else -1)
    numbers = {tactic.number for tactic in tactics_of(product, num_tokens, HOPPER)}
    assert plain.number in numbers
    refused = {
        "e4m3": {0, 1, 2, 3},
        "e4m3-block": {0, 1, 2, 3, 14, 15},
        "e5m2": {0, 1, 2, 3, 6, 7, 14, 15},
    }.get(weight, {4, 5})
    assert numbers and not numbers & refused
    streams = num_tokens <= 8
    for_any = {LINEAR_TACTIC + 1, LINEAR_TACTIC + 2}
    assert not numbers & for_any and (LINEAR_TACTIC in numbers) == streams
    on_ampere = {LINEAR_TACTIC, *for_any} if streams else for_any
    assert {tactic.number for tactic in tactics_of(product, num_tokens, AMPERE)} == on_ampere | {plain.number}


def test_tactics_by_name():
    for tactic in (TORCH, STREAM, Tactic("matmul", -1), Tactic("weight_only_linear", 2)):
        assert Tactic.parse(str(tactic)) == tactic


def test_tactics_of_repacked_weights():
    def numbers(num_tokens: int, capability: tuple[int, int], weight: str = INT4.weight) -> list[int | None]:
        product = replace(INT4, weight=weight)
        return [tactic.number for tactic in tactics_of(product, num_tokens, capability)]

    few, tiles = [0, 1, 2], list(range(3, ops.WEIGHT_ONLY_TACTICS + 1))  # 0: the rule's
    assert [tokens for tokens, _ in ops.WEIGHT_ONLY_TILES[::3]] == [16, 32, 64, 128, 256]
    assert numbers(8, AMPERE) == numbers(8192, AMPERE) == few[1:2]
    assert numbers(8, (10, 0)) == few, "tiles are for Hopper"
    assert numbers(16, HOPPER) == few + tiles[:3]
    assert numbers(24, HOPPER) == few + tiles[3:6]
    assert numbers(48, HOPPER) == [0, *tiles[6:9]]
    assert numbers(128, HOPPER) == [0, *tiles[9:12]]
    assert numbers(129, HOPPER) == numbers(8192, HOPPER) == [0, *tiles[9:]]
    assert numbers(8192, HOPPER, "int8") == numbers(8192, HOPPER, "int4-e4m3-g64") == [0, *tiles[9:12]]
    assert numbers(1, HOPPER, "int4-e4m3-g128") == [0, *tiles[:3]]
    assert numbers(1, AMPERE, "int4-e4m3-g128") == numbers(8192, AMPERE, "int4-e4m3-g128") == [1]


def test_products_of_a_plan():
    config = PRESETS["llama-3.1-8b"]
    sizes = {"max_num_tokens": 8192, "max_num_seqs": 64}
    shapes = ["6144x4096", "4096x4096", "28672x4096", "4096x14336", "128256x4096"]
    rows = [8192, 8192, 8192, 8192, 64]

    def names(**schemes: str) -> dict[str, int]:
        found = products_of(compile_model(config, **schemes), BF16, **sizes)
        return {str(product): count for product, count in found.items()}

    gates = ["", "", " gated", "", ""]
    named = [f"{shape}{gate}" for shape, gate in zip(shapes, gates, strict=True)]
    assert names() == dict(zip([f"linear bf16 {name}" for name in named], rows, strict=True))
    fp8 = names(quantization="fp8@cuda", head_quantization="int4-g32-zeros@cuda")
    expected = [f"matmul e4m3 bf16 {name}" for name in named[:4]]
    assert fp8 == dict(
        zip([*expected, f"quantized_linear int4-g32-zeros bf16 {shapes[4]}"], rows, strict=True)
    )
    int4_fp8 = names(quantization="int4-fp8@cuda", head_quantization="int4-fp8@cuda")
    assert list(int4_fp8) == [f"quantized_linear int4-e4m3-g128 bf16 {shape}" for shape in shapes]
    assert next(iter(names(quantization="fp8-block@cuda"))) == "matmul e4m3-block bf16 6144x4096"


# --- modes ------------------------------------------------------------------------------------------------


def test_full_times_every_tactic_once_and_takes_what_is_clearly_faster_than_the_rules(tmp_path):
    timer, reported = MadeUpTimer(), []
    choices = run(tmp_path, timer, progress=lambda done, total: reported.append((done, total)))
    assert len(timer.calls) == len(set(timer.calls)) == choices.num_timed
    assert reported == [(done, len(timer.calls)) for done in range(1, len(timer.calls) + 1)]
    for product, rows in PRODUCTS.items():
        for bucket in (b for b in BUCKETS if b <= rows):
            tactics = tactics_of(product, bucket, HOPPER)
            assert [t for p, b, t in timer.calls if (p, b) == (product, bucket)] == tactics
            times = {tactic: MadeUpTimer()(product, bucket, tactic) for tactic in tactics}
            fastest, plain = min(times, key=times.__getitem__), rule(product, bucket, HOPPER)
            expected = fastest if times[fastest] <= 0.9 * times[plain] else plain
            assert choices.tactic(product, bucket) == expected
    assert choices.tactic(QKV, 500) == choices.tactic(QKV, 512)
    assert choices.tactic(QKV, 2000) == rule(QKV, 2000, HOPPER), "no bucket that large was asked for"


@pytest.mark.parametrize("product", [QKV, FP8, INT4], ids=str)
@pytest.mark.parametrize("us, replaces", [(90.0, True), (91.0, False), (100.0, False)])
def test_the_rules_tactic_stays_unless_another_is_a_tenth_faster(product, us, replaces, tmp_path):
    """Also where the rule leaves the tile to the kernel (-1, 0)."""
    plain, other = rule(product, 32, HOPPER), tactics_of(product, 32, HOPPER)[-1]

    def timer(_: Product, num_tokens: int, tactic: Tactic) -> float:
        return {plain: 100.0, other: us}.get(tactic, 110.0)

    choices = run(tmp_path, timer, products={product: 32})
    assert plain != other
    assert choices.tactic(product, 32) == (other if replaces else plain)


@pytest.mark.parametrize("mode", ["full", "cached"])
def test_the_same_choice_again(tmp_path, mode):
    first = run(tmp_path, MadeUpTimer())
    timer = MadeUpTimer("other")
    again = run(tmp_path, timer, mode=mode)
    assert timer.calls == [] and again.num_timed == 0
    assert chosen(again) == chosen(first) != BY_RULE


def test_cached_and_off_time_nothing(tmp_path):
    timer = MadeUpTimer()
    for mode in ("cached", "off"):
        assert chosen(run(tmp_path, timer, mode=mode)) == BY_RULE
    assert timer.calls == [] and list(tmp_path.iterdir()) == []
    run(tmp_path, MadeUpTimer())
    assert chosen(run(tmp_path, timer, mode="off")) == BY_RULE


def test_full_times_only_what_is_missing(tmp_path):
    run(tmp_path, MadeUpTimer(), products={QKV: 16})
    timer = MadeUpTimer("other")
    run(tmp_path, timer, products={QKV: 32, INT4: 1})
    assert {(product, bucket) for product, bucket, _ in timer.calls} == {(QKV, 24), (QKV, 32), (INT4, 1)}
    cached = run(tmp_path, timer, mode="cached", products={QKV: 32, INT4: 1})
    assert {bucket for product, bucket in cached.timed if product == QKV} == {1, 2, 4, 8, 16, 24, 32}
    other = MadeUpTimer("other")
    run(tmp_path, other, products={QKV: 16}, again=True)
    assert {bucket for _, bucket, _ in other.calls} == {1, 2, 4, 8, 16}


def test_a_product_with_one_tactic_is_not_timed(tmp_path):
    timer = MadeUpTimer()
    product = Product("linear", "fp32", torch.float32, 64, 64)
    assert run(tmp_path, timer, products={product: 64}).tactic(product, 3) == TORCH
    assert timer.calls == []


def test_what_was_timed_stays_when_the_next_product_fails(tmp_path):
    def timer(product: Product, num_tokens: int, tactic: Tactic) -> float:
        if product == FP8:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, timer)
    assert {product for product, _ in run(tmp_path, MadeUpTimer(), mode="cached").timed} == {QKV}


# --- the file ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [{"gpu": "NVIDIA H100 80GB HBM3"}, {"version": "0.2.0"}])
def test_another_gpu_or_version_is_neither_used_nor_lost(tmp_path, other):
    first = run(tmp_path, MadeUpTimer())
    timer = MadeUpTimer("other")
    assert chosen(run(tmp_path, timer, mode="cached", **other)) == BY_RULE
    second = run(tmp_path, timer, **other)
    assert len(timer.calls) == second.num_timed > 0
    assert chosen(run(tmp_path, MadeUpTimer(), mode="cached")) == chosen(first)
    assert chosen(run(tmp_path, MadeUpTimer(), mode="cached", **other)) == chosen(second) != chosen(first)


BROKEN = {
    "not JSON": "{'gpus'",
    "cut off": None,
    "not UTF-8": b"\xff\xfe",
    "a list": "[]",
    "another format": '{"format": 2, "gpus": {}}',
    "no object": '{"format": 1, "gpus": {"NVIDIA H200": []}}',
    "of another GPU": '{"format": 1, "gpus": {"other": {"0.1.0": {"x": {"1": {"tactic": "torch"}}}}}}',
    "no bucket": '{"format": 1, "gpus": {"g": {"v": {"p": {"x": {"tactic": "torch", "us": {"torch": 1}}}}}}}',
    "no time": '{"format": 1, "gpus": {"g": {"v": {"p": {"1": {"tactic": "torch", "us": {"torch": "a"}}}}}}}',
    "no winner": '{"format": 1, "gpus": {"g": {"v": {"p": {"1": {"tactic": [], "us": {"torch": 1}}}}}}}',
    "no tactic": '{"format": 1, "gpus": {"g": {"v": {"p": {"1": {"tactic": "a b", "us": {"a b": 1}}}}}}}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_cache_is_reported_and_rebuilt(tmp_path, content):
    path = tmp_path / "fastkernels" / FILE_NAME
    if content is None:
        run(tmp_path, MadeUpTimer())
        content = path.read_bytes()[:-100]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match="tactics.json is of no use until it is rebuilt: ") as seen:
        assert chosen(run(tmp_path, MadeUpTimer(), mode="cached")) == BY_RULE
    assert len(seen) == 1 and "\n" not in str(seen[0].message)
    with pytest.warns(RuntimeWarning, match="is of no use") as seen:
        choices = run(tmp_path, MadeUpTimer())
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(run(tmp_path, MadeUpTimer(), mode="cached")) == chosen(choices) != BY_RULE


def test_a_tactic_that_is_none_any_more_is_timed_again(tmp_path):
    run(tmp_path, MadeUpTimer(), products={QKV: 1})
    path = tmp_path / "fastkernels" / FILE_NAME
    whole = json.loads(path.read_text())
    (entry,) = whole["gpus"]["NVIDIA H200"]["0.1.0"][str(QKV)].values()
    entry["tactic"], entry["us"]["matmul 38"] = "matmul 38", 0.1
    path.write_text(json.dumps(whole))
    assert run(tmp_path, MadeUpTimer(), mode="cached", products={QKV: 1}).timed == {}
    timer = MadeUpTimer()
    run(tmp_path, timer, products={QKV: 1})
    assert len(timer.calls) == len(tactics_of(QKV, 1, HOPPER))


def test_the_file_is_readable_and_nothing_else_is_left(tmp_path):
    choices = run(tmp_path, MadeUpTimer())
    (path,) = (tmp_path / "fastkernels").iterdir()
    entry = json.loads(path.read_text())["gpus"]["NVIDIA H200"]["0.1.0"][str(QKV)]["32"]
    assert entry["tactic"] == str(choices.tactic(QKV, 32))
    assert list(entry["us"]) == [str(tactic) for tactic in tactics_of(QKV, 32, HOPPER)]


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "fastkernels").write_text("a file where the folder would be")
    with pytest.warns(RuntimeWarning, match="the tuner's cache") as seen:
        choices = run(tmp_path, MadeUpTimer(), products={QKV: 1})
    first, second = (str(one.message) for one in seen)
    assert first.endswith("is of no use until it is rebuilt: Not a directory")
    assert second.endswith("; nothing is kept")
    assert choices.num_timed and choices.tactic(QKV, 1) in tactics_of(QKV, 1, HOPPER)


def test_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTKERNELS_TUNE", raising=False)
    assert tune_mode() == "cached"
    for mode in ("off", "cached", "full"):
        monkeypatch.setenv("FASTKERNELS_TUNE", mode)
        assert tune_mode() == mode
    monkeypatch.setenv("FASTKERNELS_TUNE", "always")
    with pytest.raises(
        ConfigError, match="FASTKERNELS_TUNE is 'always'; it must be one of off, cached, full"
    ):
        tune_mode()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "fastkernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "fastkernels"


# --- what is timed ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tactic", [TORCH, STREAM])
def test_calls_of_torch_and_linear(tactic, has_bias):
    product = Product("linear", "bf16", BF16, 24, 40, has_bias)
    x, weights = random_x(product, 5, torch.device("cpu")), random_weight(product, torch.device("cpu"))
    out = torch.full((5, 24), torch.nan, dtype=BF16)
    call_of(product, tactic, [*x, *weights], [out], None)()
    expected = x[0].double() @ weights[0].double().t() + (weights[1].double() if has_bias else 0)
    assert (out - expected).abs().max() <= 0.02 * expected.abs().max()
    if not has_bias:
        gated = torch.full((5, 12), torch.nan, dtype=BF16)
        call_of(replace(product, gated=True), tactic, [*x, *weights], [gated, out], None)()
        expected = reference.silu_mul(expected)
        assert (gated - expected).abs().max() <= 0.02 * expected.abs().max()


def names_of(call) -> list[str]:
    """The kernels of a call, in their order."""
    calls = call.args if callable(call.args[0]) else (call,)
    return [
        (one.func.overloadpacket if hasattr(one.func, "overloadpacket") else one.func).__name__
        for one in calls
    ]


@pytest.mark.parametrize("num_tokens", [128, 1024])
@pytest.mark.parametrize("weight", ["bf16", "e4m3"])
def test_all_kernels_of_a_gated_step_are_timed(weight, num_tokens):
    product = Product("linear" if weight == "bf16" else "matmul", weight, BF16, 512, 256, gated=True)
    cpu, workspace = torch.device("cpu"), torch.zeros(16, dtype=torch.uint8)
    inputs = [*random_x(product, num_tokens, cpu), *random_weight(product, cpu)]
    outputs = empty_outputs(product, num_tokens, cpu)
    assert [len(output) for output in outputs] == [num_tokens] * (2 if weight == "bf16" else 3)
    assert outputs[0].shape == (num_tokens, 256) and outputs[-1].shape == (num_tokens, 512)

    def kernels(tactic: Tactic, capability: tuple[int, int]) -> list[str]:
        call = call_of(product, tactic, inputs, outputs, workspace, capability=capability)
        if tactic.kernel == "matmul":  # its arguments pass the library's checks
            with pytest.raises(ValueError, match="no kernel for the CPU"):
                call()
        return names_of(call)

    own, gated = Tactic("matmul", -1), num_tokens == 1024
    if weight == "bf16":
        assert kernels(STREAM, HOPPER) == ["linear_silu_mul"]
        assert kernels(TORCH, HOPPER) == ["mm", "silu_mul"]
        assert kernels(own, HOPPER) == (["matmul"] if gated else ["matmul", "silu_mul"])
        assert kernels(own, AMPERE) == ["matmul", "silu_mul"]
    else:
        assert kernels(own, HOPPER) == ["matmul", "quantize" if gated else "silu_mul_quant"]
        assert kernels(own, AMPERE) == ["matmul", "silu_mul_quant"]


@pytest.mark.parametrize(
    "product",
    [
        Product("linear", "bf16", BF16, 256, 384),
        Product("linear", "fp16", torch.float16, 256, 384, has_bias=True),
        Product("matmul", "e4m3", BF16, 200, 384),
        Product("matmul", "e4m3-block", BF16, 200, 384, has_bias=True),
        Product("matmul", "e4m3-block", BF16, 200, 128),
        Product("matmul", "int8", torch.float16, 200, 384, has_bias=True),
        *(Product("matmul", "int8-zeros", BF16, 200, 384, has_bias) for has_bias in (False, True)),
        Product("matmul", "e5m2", BF16, 200, 384),
        *(Product("quantized_linear", name, BF16, 200, 384) for name in ("int4-g128", "e4m3-block")),
    ],
    ids=str,
)
def test_calls_of_the_gpus_kernels(product):
    """Their arguments pass the library's checks; then it says that the CPU has no such kernel."""
    cpu = torch.device("cpu")
    x, weights = random_x(product, 40, cpu), random_weight(product, cpu)
    out = torch.empty(24, product.out_size, dtype=product.dtype)
    workspace = torch.zeros(16, dtype=torch.uint8)
    tactics = [*tactics_of(product, 24, HOPPER), *tactics_of(product, 24, AMPERE)]
    tactics = [tactic for tactic in tactics if tactic.kernel not in ("torch", "linear")]
    for tactic in (*tactics, rule(product, 24, HOPPER)):
        if tactic != TORCH:
            with pytest.raises(ValueError, match=r"no kernel for the CPU|runs on CUDA only"):
                call_of(product, tactic, [*(part[:24] for part in x), *weights], [out], workspace)()


def test_a_matmul_without_workspace_is_refused():
    with pytest.raises(ValueError, match="no call of the tactic matmul 3"):
        call_of(FP8, Tactic("matmul", 3), [torch.empty(1)] * 4, [torch.empty(1)], None)


def test_copies_pass_the_cache_and_replays_last():
    l2_bytes = 50 << 20
    assert num_copies(128256 * 4096 * 2, l2_bytes) == 2
    assert num_copies(100, l2_bytes) == 64
    for weight_bytes in (4096 * 4096, 6144 * 4096 * 2):
        assert 3 * l2_bytes <= num_copies(weight_bytes, l2_bytes) * weight_bytes < 4 * l2_bytes + weight_bytes
    assert rounds(QKV, 8192, 6144 * 4096 * 2, 4) == 1
    assert rounds(QKV, 1, 6144 * 4096 * 2, 4) == 8  # of 4 calls of about 12.6 us


class MadeUpCuda:
    """What the timer asks of torch.cuda, on the CPU: nothing is captured, and a replay takes 100 us."""

    class Graph:
        captured = False

        def capture_begin(self, capture_error_mode: str) -> None:
            assert capture_error_mode == "thread_local"

        def capture_end(self) -> None:
            self.captured = True

        def replay(self) -> None:
            assert self.captured

        def reset(self) -> None:
            self.captured = False

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.recorded = False

        def record(self) -> None:
            self.recorded = True

        def elapsed_time(self, end: "MadeUpCuda.Event") -> float:
            assert self.recorded and end.recorded
            return 0.1

    class Stream:
        def __init__(self, device: torch.device) -> None: ...
        def synchronize(self) -> None: ...

    CUDAGraph = Graph

    @staticmethod
    def stream(stream: Stream) -> nullcontext[None]:
        return nullcontext()

    @staticmethod
    def device(device: torch.device) -> nullcontext[None]:
        return nullcontext()

    @staticmethod
    def get_device_capability(device: torch.device) -> tuple[int, int]:
        return AMPERE

    @staticmethod
    def get_device_properties(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=1 << 20)

    @staticmethod
    def empty_cache() -> None: ...


def test_the_timer_with_a_gpu_that_is_made_up(monkeypatch):
    monkeypatch.setattr(torch, "cuda", MadeUpCuda)
    timer = CudaTimer(torch.device("cpu"))
    for product in (
        Product("linear", "bf16", BF16, 512, 1024),
        Product("linear", "bf16", BF16, 512, 256, has_bias=True),
        Product("linear", "bf16", BF16, 512, 256, gated=True),
    ):
        weight_bytes = product.out_size * (product.in_size + product.has_bias) * 2
        copies = num_copies(weight_bytes, 1 << 20)
        for num_tokens in (32, 4, 64):
            for tactic in tactics_of(product, num_tokens, AMPERE):
                calls = copies * rounds(product, num_tokens, weight_bytes, copies)
                assert timer(product, num_tokens, tactic) == pytest.approx(100 / calls)
            assert len(timer._weights) == copies
            assert {len(output) for output in timer._outputs} == {max(32, num_tokens)}
            expected = timer._x[0][:num_tokens].double() @ timer._weights[-1][0].double().t()
            if product.has_bias:
                expected += timer._weights[-1][1]
            if product.gated:
                expected = reference.silu_mul(expected)
            assert (timer._outputs[0][:num_tokens] - expected).norm() <= 0.01 * expected.norm()


def test_a_full_tune_of_llama_8b_is_small():
    """Under 60 s at what a time takes: 20 ms beside its calls, which is generous, and 5 of its replays."""
    plan = compile_model(PRESETS["llama-3.1-8b"])
    products = products_of(plan, BF16, max_num_tokens=8192, max_num_seqs=64)
    seconds = 0.0
    for product, rows in products.items():
        weight_bytes = product.out_size * product.in_size * 2
        for bucket in (b for b in BUCKETS if b <= rows):
            copies = num_copies(weight_bytes, 50 << 20)
            calls = copies * rounds(product, bucket, weight_bytes, copies)
            flops = 2 * bucket * product.out_size * product.in_size
            replay = calls * max(weight_bytes / 3e12, flops / 4e14)
            seconds += (0.02 + 5 * replay) * len(tactics_of(product, bucket, HOPPER))
    assert seconds < 45
