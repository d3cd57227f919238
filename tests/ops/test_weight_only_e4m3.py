"""weight_only_linear with x in e4m3: against float64 of the same bytes, scales and codes, and the layout."""

from typing import Any

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from fastkernels.ops.weight_only import has_tile, packed_shape
from tests.conftest import CUDA_REASON
from tests.tolerances import assert_as_good_as_torch, assert_similar, poisoned

on_cuda = pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
IS_HOPPER = CUDA_REASON is None and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="needs a Hopper GPU")

# name -> size of a group (None: a row), dtype of scales
FORMATS: dict[str, tuple[int | None, torch.dtype]] = {
    "int4-e4m3-g128": (128, torch.bfloat16),
    "int4-e4m3-g64": (64, torch.float16),
    "int4-e4m3-g32": (32, torch.bfloat16),
    "int4-e4m3-g256": (256, torch.bfloat16),
    "int4-e4m3-channel": (None, torch.float32),
}
DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [0, 1, 3, 8, 9, 15, 16, 17, 33, 63, 64, 65, 127, 128, 129, 257, 1000]
SIZES = [(1, 128), (17, 256), (40, 1024), (129, 2304), (80, 384)]  # out_size, in_size
TAILS = [(33, 16), (16, 208), (50, 1168)]  # of a scale a row
MANY_ROWS = (9000, 512)  # more tiles than a block takes at once
MORE_ROWS = (40000, 256)  # the same of 8 tokens
TACTICS = range(ops.WEIGHT_ONLY_FEW_TACTICS + 1, ops.WEIGHT_ONLY_TACTICS + 1)
SHARED_TACTICS = range(1, TACTICS[0])  # of the kernels that all GPUs have


def weight_of(name: str, out_size: int, in_size: int) -> dict[str, Any]:
    """As ``repack_for_cuda`` takes it: every code, scales such that the result is of size 1."""
    size, dtype = FORMATS[name]
    block = (1, size or in_size)
    scales = torch.rand(out_size, in_size // block[1]).add(0.5).div(4.6 * in_size**0.5)
    weight = torch.randint(0, 256, (out_size, in_size // 2)).to(torch.uint8)
    return {"weight": weight, "scales": scales.to(dtype), "weight_type": "int4", "block": block}


def repack(given: dict[str, Any], device: str = "cpu") -> ops.RepackedWeight:
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    return ops.repack_for_cuda(**moved, activation="e4m3")


def takes(name: str, in_size: int) -> bool:
    size = FORMATS[name][0]
    return size is None or in_size % size == 0


def bytes_of(num_tokens: int, in_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of sizes that differ, as ``quantize`` leaves them."""
    x = torch.randn(num_tokens, in_size) * torch.exp2(torch.randint(-2, 2, (num_tokens, 1)))
    return reference.quantize(x, "token", dtype=torch.float8_e4m3fn)


def expected(
    x: torch.Tensor, x_scales: torch.Tensor, given: dict[str, Any], dtype: torch.dtype
) -> torch.Tensor:
    values = x.to(dtype) * x_scales.to(dtype)[:, None]
    return values @ reference.dequantize_weight(**given, dtype=dtype).t()


def unpack(weight: ops.RepackedWeight) -> torch.Tensor:
    """[out_size, in_size] float64, read byte by byte as csrc/gemm/weight_only.h says."""
    tiles, chunks, _ = weight.packed.shape
    size, units = int(weight.packed_format.split("-g")[1]), weight.packed.cpu()
    values = torch.zeros(tiles, 16, chunks, 128, dtype=torch.float64)
    for k in range(128):
        u, s, h, t, i = k // 64, k % 64 // 32, k % 32 // 16, k % 16 // 4, k % 4
        for row in range(16):
            g, half = row % 8, row // 8
            byte = units[..., u * 512 + (4 * g + t) * 16 + (2 * s + h) * 4 + i].long()
            code = byte >> 4 * half & 15
            value = torch.where(code % 2 == 1, -(code // 2) - 1, code // 2).double()
            at = 1024 + k // size * 32 + g * 4 + half * 2
            scale = units[..., at : at + 2].contiguous().view(torch.float16)[..., 0].double()
            values[:, row, :, k] = value * scale
    whole = values.flatten(2).flatten(0, 1)[: weight.out_size, : weight.in_size]
    return whole * weight.row_factors.cpu().double()[:, None]


@pytest.mark.parametrize("name", FORMATS)
def test_the_layout_holds_the_weight(name):
    for out_size, in_size in (*SIZES[:3], *TAILS):
        if takes(name, in_size):
            given = weight_of(name, out_size, in_size)
            weight = repack(given)
            assert tuple(weight.packed.shape) == packed_shape(weight.packed_format, out_size, in_size)
            exact = reference.dequantize_weight(**given)
            torch.testing.assert_close(unpack(weight), exact, rtol=2e-7, atol=0)


def test_past_the_end_of_a_row_weights_are_zero():
    weight = repack(weight_of("int4-e4m3-channel", 20, 144))
    wide = ops.RepackedWeight(weight.packed, weight.row_factors, weight.packed_format, 20, 256)
    assert (unpack(wide)[:, 144:] == 0).all()


def test_repacking_refuses():
    given = weight_of("int4-e4m3-g128", 20, 256)
    zeros = torch.full((20, 2), 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="int4 with zeros for activations in e4m3, but the op takes int4"):
        ops.repack_for_cuda(**given, zeros=zeros, activation="e4m3")
    with pytest.raises(ValueError, match="weight is int4 for activations in int8, but the op takes int4"):
        ops.repack_for_cuda(**given, activation="int8")


# --- on a GPU -------------------------------------------------------------------------------------------


def check(name: str, tokens: list[int], out_size: int, in_size: int, dtype: torch.dtype, tactic: int) -> None:
    """Odd numbers of tokens with a bias."""
    given = weight_of(name, out_size, in_size)
    weight = repack(given, "cuda")
    all_x, all_scales = bytes_of(max(tokens), in_size)
    exact, plain = (expected(all_x, all_scales, given, of) for of in (torch.float64, torch.float32))
    for num_tokens in tokens:
        x, x_scales = all_x[:num_tokens].cuda(), all_scales[:num_tokens].cuda()
        bias = torch.randn(out_size).to(dtype) if num_tokens % 2 else None
        moved_bias = None if bias is None else bias.cuda()
        out = poisoned(num_tokens, out_size, dtype=dtype, device="cuda")
        options: dict[str, Any] = {"x_scales": x_scales, "tactic": tactic}
        assert ops.weight_only_linear(x, weight, moved_bias, **options, out=out) is out
        of_exact, of_plain = exact[:num_tokens], plain[:num_tokens]
        if bias is not None:
            of_exact, of_plain = of_exact + bias.double(), of_plain + bias.float()
        assert_as_good_as_torch(out.cpu(), of_plain.to(dtype), of_exact)
        assert_similar(out.cpu(), of_exact, 1e-5)
        again = torch.empty_like(out)
        ops.weight_only_linear(x, weight, moved_bias, **options, constant_weight=True, out=again)
        assert torch.equal(out, again), "two runs differ"


@on_cuda
@pytest.mark.parametrize("tactic", [0, *SHARED_TACTICS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_matches_reference_on_cuda(name, dtype, tactic):
    for out_size, in_size in SIZES + TAILS:
        if takes(name, in_size):
            check(name, TOKENS, out_size, in_size, dtype, tactic)


@on_cuda
@pytest.mark.parametrize("tactic", SHARED_TACTICS)
@pytest.mark.parametrize("name", FORMATS)
def test_many_rows_on_cuda(name, tactic):
    check(name, [1, 5, 16, 17, 33, 129], *MANY_ROWS, torch.bfloat16, tactic)
    check(name, [8], *MORE_ROWS, torch.bfloat16, tactic)


@on_hopper
@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize("name", FORMATS)
def test_every_tactic_on_cuda(name, tactic):
    tokens = ops.WEIGHT_ONLY_TILES[tactic - TACTICS[0]][0]
    if not has_tile(repack(weight_of(name, 16, 256)).packed_format, tokens):
        pytest.skip("groups this small have no such tile")
    for out_size, in_size in (SIZES[3], MANY_ROWS, SIZES[0]):
        if takes(name, in_size):
            check(name, [1, 13, 129, 257], out_size, in_size, torch.bfloat16, tactic)


@on_hopper
@pytest.mark.parametrize("tactic", [3, 12, 13, 15, 16])
def test_whole_rounds_and_what_is_left_on_cuda(tactic):
    check("int4-e4m3-g128", [1300], 4000, 256, torch.float16, tactic)


@on_cuda
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_long_sums_on_cuda(mean):
    """wgmma adds up 128 neighbours with about 14 bits; a mean makes the sums grow."""
    given = weight_of("int4-e4m3-g128", 256, 16384)
    codes = torch.randn(256, 16384).add(mean / 2).mul(2).round().clamp(-8, 7).add(8).to(torch.uint8)
    given["weight"] = codes[:, ::2] | codes[:, 1::2] << 4
    x, x_scales = reference.quantize(torch.randn(300, 16384) + mean, "token", dtype=torch.float8_e4m3fn)
    exact = expected(x, x_scales, given, torch.float64)
    weight = repack(given, "cuda")
    for tactic in (*SHARED_TACTICS, *((9, 12, 15) if IS_HOPPER else ())):
        out = poisoned(300, 256, dtype=torch.float16, device="cuda")
        ops.weight_only_linear(x.cuda(), weight, x_scales=x_scales.cuda(), tactic=tactic, out=out)
        assert_similar(out.cpu(), exact, 1e-6)


@on_cuda
def test_every_code_on_cuda():
    """x picks one element of each row, so that the result is the weight itself, rounded once."""
    given = weight_of("int4-e4m3-g32", 32, 256)
    weight = repack(given, "cuda")
    x, ones = torch.eye(256).to(torch.float8_e4m3fn).cuda(), torch.ones(256, device="cuda")
    for tactic in (0, *SHARED_TACTICS, *((3, 12) if IS_HOPPER else ())):
        y = ops.weight_only_linear(x, weight, x_scales=ones, tactic=tactic)
        exact = reference.dequantize_weight(**given).t()
        torch.testing.assert_close(y.cpu().double(), exact, rtol=4e-3, atol=1e-7)


@on_cuda
@pytest.mark.parametrize("tactic", [0, *SHARED_TACTICS])
def test_every_byte_of_x_on_cuda(tactic):
    """Each row of the weight is 1 at one element of x and 0 elsewhere, so that the result is x itself."""
    codes = torch.full((256, 256), 8, dtype=torch.uint8).fill_diagonal_(9)
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    scales = torch.ones(256, 2, dtype=torch.bfloat16)
    weight = repack({"weight": packed, "scales": scales, "weight_type": "int4", "block": (1, 128)}, "cuda")
    all_bytes = torch.arange(256).to(torch.uint8)
    finite = torch.where(all_bytes & 127 == 127, 0, all_bytes)
    for count in (7, 19):
        x = torch.stack([finite.roll(token) for token in range(count)]).view(torch.float8_e4m3fn).cuda()
        ones = torch.ones(count, device="cuda")
        out = poisoned(count, 256, dtype=torch.float16, device="cuda")
        ops.weight_only_linear(x, weight, x_scales=ones, tactic=tactic, out=out)
        assert torch.equal(out, x.half())
        spoilt = x.view(torch.uint8).clone()
        spoilt[3, 77], spoilt[5, 200] = 127, 255
        y = ops.weight_only_linear(spoilt.view(x.dtype), weight, x_scales=ones, tactic=tactic)
        rest = [token for token in range(count) if token not in (3, 5)]
        assert y[[3, 5]].isnan().all() and torch.equal(y[rest].half(), x[rest].half())


@on_cuda
@pytest.mark.parametrize("tactic", [*SHARED_TACTICS, *((3, 6, 9, 12, 15) if IS_HOPPER else ())])
def test_a_token_does_not_depend_on_the_others_on_cuda(tactic):
    weight = repack(weight_of("int4-e4m3-g128", 70, 1024), "cuda")
    x, x_scales = (one.cuda() for one in bytes_of(16, 1024))
    # Tokens of a product -> parts of them that it multiplies in the same way
    ranges = {16: ((0, 1), (3, 8), (0, 16), (9, 16))}
    if tactic in SHARED_TACTICS:
        ranges = {8: ((0, 1), (3, 8)), 16: ((0, 9), (6, 16))}
    for count, parts in ranges.items():
        scales = x_scales[:count].clone()
        together = ops.weight_only_linear(x[:count], weight, x_scales=scales, tactic=tactic)
        for first, last in parts:
            scales = x_scales[first:last].clone()
            some = ops.weight_only_linear(x[first:last], weight, x_scales=scales, tactic=tactic)
            assert torch.equal(some, together[first:last])


@on_cuda
@pytest.mark.parametrize("name, in_size", [("int4-e4m3-g128", 256), ("int4-e4m3-channel", 208)])
@pytest.mark.parametrize("tactic", [0, *SHARED_TACTICS])
@pytest.mark.parametrize("num_tokens", [6, 9, 70, 300])
def test_nan_and_strided_operands_on_cuda(num_tokens, tactic, name, in_size):
    weight = repack(weight_of(name, 40, in_size), "cuda")
    x, x_scales = (one.cuda() for one in bytes_of(num_tokens, in_size))
    wide_x = torch.full((num_tokens, 512), 0x7F, dtype=torch.uint8, device="cuda")
    wide_x[:, 64 : 64 + in_size] = x.view(torch.uint8)
    part = wide_x.view(x.dtype)[:, 64 : 64 + in_size]
    sound = ops.weight_only_linear(x, weight, x_scales=x_scales, tactic=tactic)
    for before in (8, 7):  # rows of out on 16 bytes, and not
        wide_out = poisoned(num_tokens, 64, dtype=torch.bfloat16, device="cuda")
        ours = wide_out[:, before : before + 40]
        ops.weight_only_linear(part, weight, x_scales=x_scales, tactic=tactic, out=ours)
        assert torch.equal(ours, sound)
        assert wide_out[:, :before].isnan().all() and wide_out[:, before + 40 :].isnan().all()
    x_scales[4] = float("nan")
    spoilt = ops.weight_only_linear(x, weight, x_scales=x_scales, tactic=tactic)
    rest = [token for token in range(num_tokens) if token != 4]
    assert spoilt[4].isnan().all() and torch.equal(spoilt[rest], sound[rest])


@on_cuda
def test_quantized_linear_on_cuda_rounds_and_repacks():
    given = weight_of("int4-e4m3-g128", 40, 512)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    x, bias = torch.randn(5, 512).bfloat16().cuda(), torch.randn(40).bfloat16().cuda()
    rounded, x_scales = ops.quantize(x, per="token", dtype=torch.float8_e4m3fn)
    by_hand = ops.weight_only_linear(rounded, repack(given, "cuda"), bias, x_scales=x_scales)
    assert torch.equal(ops.quantized_linear(x, bias=bias, activation="e4m3", **moved), by_hand)
    on_cpu = ops.quantized_linear(x.cpu(), bias=bias.cpu(), activation="e4m3", **given)
    assert_similar(by_hand.cpu(), on_cpu, 1e-5)


@on_cuda
def test_permutation_on_cuda():
    given = weight_of("int4-e4m3-g128", 40, 512)
    permutation = torch.randperm(512)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    ordered = ops.repack_for_cuda(**moved, activation="e4m3", permutation=permutation.cuda())
    x, x_scales = bytes_of(5, 512)
    gathered = x.view(torch.uint8)[:, permutation].contiguous().view(x.dtype).cuda()
    plain = ops.weight_only_linear(gathered, repack(given, "cuda"), x_scales=x_scales.cuda())
    assert torch.equal(ops.weight_only_linear(x.cuda(), ordered, x_scales=x_scales.cuda()), plain)


@on_cuda
def test_graph_and_opcheck_on_cuda():
    weight = repack(weight_of("int4-e4m3-g128", 40, 512), "cuda")
    x, x_scales = (one.cuda() for one in bytes_of(5, 512))
    first = ops.weight_only_linear(x, weight, x_scales=x_scales)
    out = poisoned(5, 40, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.weight_only_linear(x, weight, x_scales=x_scales, constant_weight=True, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, first)
    number = list(ops.PACKED_FORMATS).index(weight.packed_format)
    torch.library.opcheck(
        torch.ops.fastkernels.weight_only_linear.default,
        (x, x_scales, weight.packed, weight.row_factors, None, number, 0, False, out),
        test_utils=("test_autograd_registration", "test_faketensor"),
    )


@on_cuda
def test_refuses_what_it_does_not_take_on_cuda():
    weight = repack(weight_of("int4-e4m3-g128", 24, 256), "cuda")
    x, x_scales = (one.cuda() for one in bytes_of(3, 256))

    def refused(message: str, x: torch.Tensor = x, **changes: Any) -> None:
        with pytest.raises((ValueError, RuntimeError), match=message):
            ops.weight_only_linear(x, weight, **{"x_scales": x_scales, **changes})

    refused("x is bf16, but the op takes", x=torch.zeros(3, 256, device="cuda").bfloat16())
    refused("x_scales go with x in e4m3, and with weights repacked for it", x_scales=None)
    refused(r"x_scales has shape \[2\], but the op takes \[num_tokens\]", x_scales=x_scales[:2])
    refused("x_scales is bf16, but the op takes fp32", x_scales=x_scales.bfloat16())
    refused("out is fp32, but the op takes bf16, fp16", out=torch.empty(3, 24, device="cuda"))
    small = repack(weight_of("int4-e4m3-g64", 24, 256), "cuda")
    why = "tactic is 15, tiles of 256 tokens, which this" if IS_HOPPER else "are for Hopper GPUs"
    with pytest.raises((ValueError, RuntimeError), match=why):
        ops.weight_only_linear(x, small, x_scales=x_scales, tactic=15)
