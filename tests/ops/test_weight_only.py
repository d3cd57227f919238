"""weight_only_linear against float64 of the same weights, and the layout of its weights."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from fastkernels.ops.weight_only import has_tile, packed_shape
from tests.conftest import CUDA_REASON
from tests.ops.test_quantized_linear import SCHEMES, Schemes
from tests.ops.test_quantized_linear import operands as operands_of
from tests.tolerances import assert_as_good_as_torch, assert_similar, poisoned

on_cuda = pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
on_hopper = pytest.mark.skipif(
    CUDA_REASON is not None or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)

# format -> name in LAYOUTS
FORMATS = {
    "int4-g128": "int4-g128",
    "int4-g64": "int4-g64",
    "int4-g32": "int4-g32",
    "int4-g128-zeros": "int4-g128-zeros",
    "int4-g64-zeros": "int4-g64-zeros",
    "int4-g32-zeros": "int4-g32-zeros",
    "int4-channel": "int4-channel",
    "int4-channel-zeros": "int4-channel-zeros",
    "int4-g256": "int4-g256",
    "int8": "int8-weight",
    "e4m3": "fp8-weight",
    "e4m3-block": "fp8-block-128",
    "nvfp4": "nvfp4",
    "mxfp4": "mxfp4",
}
LAYOUTS: Schemes = {
    **SCHEMES,
    "int4-g32": ("int4", 32, 1, torch.bfloat16, False, None),
    "int4-g64-zeros": ("int4", 64, 1, torch.float16, True, None),
    "int4-g256": ("int4", 256, 1, torch.bfloat16, False, None),
    "fp8-block-128": ("e4m3", 128, 128, torch.float32, False, None),
}
DTYPES = [torch.bfloat16, torch.float16]
TOKENS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 200, 1000]
SIZES = [  # out_size, in_size: tails of 16 rows and of 128 neighbours, fewer chunks than warps
    (1, 128),
    (17, 256),
    (40, 1024),
    (129, 2304),
    (80, 384),
    (20, 5120),
]
TAILS = [(33, 8), (16, 200), (50, 1160)]  # of schemes with a scale a row
MANY_ROWS = (9000, 512)  # more tiles than a block takes at once


def operands(scheme: str, num_tokens: int, out_size: int, in_size: int, dtype: torch.dtype) -> dict[str, Any]:
    return operands_of(scheme, num_tokens, out_size, in_size, dtype, LAYOUTS)


def repack(given: dict[str, Any]) -> ops.RepackedWeight:
    names = ("weight", "scales", "weight_type", "block", "zeros", "global_scale")
    return ops.repack_for_cuda(**{name: given[name] for name in names if name in given})


def tokens_of_tile(tactic: int) -> int | None:  # None: the kernel for few tokens, which has no tiles
    number = tactic - ops.WEIGHT_ONLY_FEW_TACTICS - 1
    return None if number < 0 else ops.WEIGHT_ONLY_TILES[number][0]


def has_tactic(name: str, tactic: int) -> bool:
    tokens = tokens_of_tile(tactic)
    return tokens is None or has_tile(name, tokens)


def takes(name: str, in_size: int) -> bool:
    size = LAYOUTS[FORMATS[name]][1]
    return size is None or in_size % size == 0


def unpack(weight: ops.RepackedWeight) -> torch.Tensor:
    """[out_size, in_size] float64, read bit by bit as csrc/gemm/weight_only.h says, lane after lane."""
    tiles, chunks, _ = weight.packed.shape
    name, units = weight.packed_format, weight.packed.cpu()
    is_byte = name.startswith(("int8", "e4m3"))
    values = torch.zeros(tiles, 16, chunks, 128, dtype=torch.float64)
    for lane in range(32):
        g, t = divmod(lane, 4)
        piece = 16 * (4 * g + (t ^ g // 2))
        for index in range(8):  # an operand of the mma: k of pair 0, and its 8 values
            pair_2 = 2  # neighbours from pair 0 to pair 2
            if is_byte:
                u, j = divmod(index, 2)
                k, at = 32 * u + 8 * t + 4 * j, u * 512 + piece + j * 8
                codes = units[..., at : at + 8]  # [row, low] of pairs 0 and 1, then of 2 and 3
                of = [
                    (i, low, codes[..., i // 2 * 4 + low * 2 + i % 2]) for i in range(4) for low in range(2)
                ]
            else:
                u, word = divmod(index, 4)
                at = u * 512 + piece + word * 4
                if name.startswith("int4"):
                    k = 64 * u + 32 * (word % 2) + 8 * t + 4 * (word // 2)
                else:
                    k, pair_2 = 64 * u + 16 * t + 2 * word, 8
                four = units[..., at : at + 4].long()
                bits = four[..., 0] | four[..., 1] << 8 | four[..., 2] << 16 | four[..., 3] << 24
                of = []
                for i in range(4):
                    for low in range(2):
                        half = bits >> 16 * low
                        if name.startswith("int4"):
                            code = half >> 4 * i & 15
                        else:
                            places = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10))[i]
                            bits_of = [(half >> place & 1) << 3 - n for n, place in enumerate(places)]
                            code = torch.stack(bits_of).sum(0)
                        of.append((i, low, code))
            for i, low, code in of:
                row, at_k = g + i % 2 * 8, k + i // 2 * pair_2 + low
                values[:, row, :, at_k] = decode(name, units, code, row, at_k)
    whole = values.flatten(2).flatten(0, 1)[: weight.out_size, : weight.in_size]
    return whole * weight.row_factors.cpu().double()[:, None]


def decode(name: str, units: torch.Tensor, code: torch.Tensor, row: int, k: int) -> torch.Tensor:
    scales, g, half = units[..., 2048 if name.startswith(("int8", "e4m3")) else 1024 :], row % 8, row // 8
    if name == "int8":
        return code.view(torch.int8).double()
    if name.startswith("e4m3"):
        value = code.view(torch.float8_e4m3fn).double()
        return (
            value
            if name == "e4m3"
            else value * scales[..., :4].contiguous().view(torch.float32)[..., 0].double()
        )
    if name.startswith("int4"):
        size = int(name.split("-")[1][1:])
        at = k // size * 32 + g * 4 + half * 2
        scale = scales[..., at : at + 2].contiguous().view(torch.float16)[..., 0].double()
        zero = (
            scales[..., 128 // size * 32 + k // size * 16 + g * 2 + half].double() if "zeros" in name else 8
        )
        return (code - zero) * scale
    magnitudes = torch.tensor((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), dtype=torch.float64)
    value = magnitudes[code & 7] * (1 - 2 * (code >> 3)).double()
    u = k // 64
    if name == "nvfp4":
        c = scales[..., (u * 8 + g) * 8 + k % 64 // 16 * 2 + half].long()
        return value * torch.exp2((c >> 3).double() - 10) * (1 + (c & 7).double() / 8)
    c = scales[..., (u * 8 + g) * 4 + k % 64 // 32 * 2 + half].double()
    return value * torch.where(c > 0, torch.exp2(c - 245), 0.0)


@pytest.mark.parametrize("name", FORMATS)
def test_the_layout_holds_the_weight(name):
    for out_size, in_size in (*SIZES[:3], *TAILS):
        if not takes(name, in_size):
            continue
        given = operands(FORMATS[name], 1, out_size, in_size, torch.bfloat16)
        if name == "nvfp4":
            every = (
                torch.arange(given["scales"].numel()) % 254
            )  # every scale but NaN, negative ones and 0 too
            every = every + (every > 126).long()
            given["scales"] = every.to(torch.uint8).view(torch.float8_e4m3fn).view(given["scales"].shape)
        weight = repack(given)
        assert tuple(weight.packed.shape) == packed_shape(weight.packed_format, out_size, in_size)
        given = {key: value for key, value in given.items() if key not in ("x", "bias", "activation")}
        exact = reference.dequantize_weight(**given)
        torch.testing.assert_close(unpack(weight), exact, rtol=2e-7, atol=0)  # row_factors are fp32


def test_past_the_end_of_a_row_weights_are_zero():
    """The kernel multiplies them by elements of x that it has read already."""
    for name in ("int4-channel", "int4-channel-zeros", "int8", "e4m3"):
        weight = repack(operands(FORMATS[name], 1, 20, 136, torch.bfloat16))
        wide = ops.RepackedWeight(weight.packed, weight.row_factors, weight.packed_format, 20, 256)
        assert (unpack(wide)[:, 136:] == 0).all()


def test_repacking_by_parts(monkeypatch):
    given = operands("int4-g128-zeros", 1, 500, 256, torch.bfloat16)
    whole = repack(given)
    monkeypatch.setattr("fastkernels.ops.weight_only._CHUNK", 128 * 256)
    parts = repack(given)
    assert torch.equal(whole.packed, parts.packed) and torch.equal(whole.row_factors, parts.row_factors)


def test_repacking_refuses():
    given = operands("int4-g128", 1, 20, 256, torch.bfloat16)
    given["scales"][3, 1] = float("nan")
    with pytest.raises(ValueError, match="weight or scales hold NaN or infinity"):
        repack(given)
    given = operands("fp8-weight", 1, 20, 256, torch.bfloat16)
    given["weight"].view(torch.uint8)[3, 5] = 0x7F
    with pytest.raises(ValueError, match="weight or scales hold NaN or infinity"):
        repack(given)
    given = operands("mxfp4", 1, 20, 256, torch.bfloat16)
    given["scales"][1, 1] = 255
    with pytest.raises(ValueError, match="weight or scales hold NaN or infinity"):
        repack(given)
    with pytest.raises(
        ValueError, match=r"weight is int4 with blocks of 1 x 16 .* but the op takes int4 with"
    ):
        repack(operands("int4-g16", 1, 20, 256, torch.bfloat16))
    with pytest.raises(ValueError, match="x is on cpu, but the op runs on CUDA only"):
        ops.weight_only_linear(
            torch.zeros(1, 256).bfloat16(), repack(operands("int8-weight", 1, 8, 256, torch.float16))
        )


# --- on a GPU -------------------------------------------------------------------------------------------


def moved(given: dict[str, Any]) -> dict[str, Any]:
    return {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in given.items()}


@cache
def prepared(
    name: str, num_tokens: int, out_size: int, in_size: int, dtype: torch.dtype
) -> tuple[dict[str, Any], ops.RepackedWeight, torch.Tensor, torch.Tensor]:
    """Operands on the CPU, the weight on the GPU, and what is expected without bias: float64 and fp32."""
    given = operands(FORMATS[name], num_tokens, out_size, in_size, dtype)
    plain = {**given, "bias": None}
    exact = reference.quantized_linear(**plain)
    return given, repack(moved(given)), exact, reference.quantized_linear(**plain, dtype=torch.float32)


def check(
    name: str, tokens: Sequence[int], out_size: int, in_size: int, dtype: torch.dtype, tactic: int
) -> None:
    """tokens: how many of them, one call after the other; odd ones with a bias."""
    given, weight, exact, plain = prepared(name, max(tokens), out_size, in_size, dtype)
    for num_tokens in tokens:
        x, bias = given["x"][:num_tokens].cuda(), given["bias"] if num_tokens % 2 else None
        moved_bias = None if bias is None else bias.cuda()
        out = poisoned(num_tokens, out_size, dtype=dtype, device="cuda")
        assert ops.weight_only_linear(x, weight, moved_bias, tactic=tactic, out=out) is out
        of_exact, of_plain = exact[:num_tokens], plain[:num_tokens]
        if bias is not None:
            of_exact, of_plain = of_exact + bias.double(), of_plain + bias.float()
        assert_as_good_as_torch(out.cpu(), of_plain.to(dtype), of_exact)
        assert_similar(out.cpu(), of_exact, 1e-5)
        again = ops.weight_only_linear(x, weight, moved_bias, tactic=tactic, constant_weight=True)
        assert torch.equal(out, again), "two runs differ"


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_matches_reference(name, dtype):
    for out_size, in_size in SIZES + TAILS:
        if takes(name, in_size):
            check(name, TOKENS, out_size, in_size, dtype, 0)


@on_cuda
@pytest.mark.parametrize("tactic", range(1, ops.WEIGHT_ONLY_TACTICS + 1))
@pytest.mark.parametrize("name", FORMATS)
def test_every_tactic(name, tactic):
    if tactic > ops.WEIGHT_ONLY_FEW_TACTICS and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("this kernel is for Hopper")
    if not has_tactic(name, tactic):
        weight = repack(moved(operands(FORMATS[name], 1, 16, 128, torch.bfloat16)))
        with pytest.raises(
            (ValueError, RuntimeError), match=f"tactic is {tactic}, tiles of 256 tokens, which"
        ):
            ops.weight_only_linear(torch.ones(1, 128, device="cuda").bfloat16(), weight, tactic=tactic)
        return
    # Tiles of 256 tokens round code x scale, as weights of 16 bits would be: an error of the terms, which a
    # sum of them that comes out near 0 is no measure of.
    few = () if tokens_of_tile(tactic) == 256 else (1, 8, 13)
    for out_size, in_size in (SIZES[3], MANY_ROWS, SIZES[0]):
        if takes(name, in_size):
            tokens = (*few, 33, 129, 257) if out_size == 1 else (1, 8, 13, 33, 129, 257)
            check(name, tokens, out_size, in_size, torch.bfloat16, tactic)


@on_hopper
@pytest.mark.parametrize("tactic", [3, 12, 13, 15, 16])
def test_whole_rounds_and_what_is_left(tactic):
    """More tiles than SMs, so that a block takes several; the last are shared by clusters (tactic 13)."""
    check("int4-g128", (600 if tactic < 15 else 1300,), 4000, 256, torch.float16, tactic)


@on_cuda
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_four_that_share_k(name):
    """9 to 16 tokens of 4 bits on Hopper: as many chunks as blocks or more, pairs of tiles that are less than
    a warp's share or more, an odd tile, a K that a block has no room for."""
    for out_size, in_size in ((16, 512), (1000, 768), (3200, 1280), (17000, 512), (50, 9216), (33, 33024)):
        if takes(name, in_size):
            check(name, (9, 12, 16), out_size, in_size, torch.float16, 0)


@on_cuda
@pytest.mark.parametrize("name", FORMATS)
def test_a_token_does_not_depend_on_the_others(name):
    given = moved(operands(FORMATS[name], 16, 70, 1024, torch.bfloat16))
    weight = repack(given)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    ranges = {  # tokens of a product -> parts of them that it multiplies in the same way
        4: ((0, 1), (1, 4), (2, 4)),
        8: ((0, 5), (3, 8)),
        16: ((0, 9), (6, 16)),
    }
    for tactic in (1, 2) if hopper else (1,):
        for count, parts in ranges.items():
            together = ops.weight_only_linear(given["x"][:count], weight, tactic=tactic)
            for first, last in parts:
                some = ops.weight_only_linear(given["x"][first:last], weight, tactic=tactic)
                assert torch.equal(some, together[first:last])
    together = ops.weight_only_linear(given["x"], weight)
    for first, last in ranges[16]:
        assert torch.equal(ops.weight_only_linear(given["x"][first:last], weight), together[first:last])
    for tactic in (4, 14, *((17,) if has_tactic(name, 17) else ())) if hopper else ():
        together = ops.weight_only_linear(given["x"], weight, tactic=tactic)
        for first, last in ((0, 1), (3, 8), (0, 16), (9, 16)):
            some = ops.weight_only_linear(given["x"][first:last], weight, tactic=tactic)
            assert torch.equal(some, together[first:last])


@on_cuda
@pytest.mark.parametrize("name", FORMATS)
def test_every_code(name):
    """x picks one element of each row, so that the result is the weight itself, rounded once."""
    given = operands(FORMATS[name], 1, 32, 256, torch.bfloat16)
    for dtype in DTYPES:
        weight = repack(moved(given))
        y = ops.weight_only_linear(torch.eye(256, dtype=dtype, device="cuda"), weight)
        full = {key: value for key, value in given.items() if key not in ("x", "bias", "activation")}
        exact = reference.dequantize_weight(**full).t()
        torch.testing.assert_close(
            y.cpu().double(), exact, rtol=4e-3 if dtype == torch.bfloat16 else 5e-4, atol=1e-7
        )


@on_cuda
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("num_tokens", [9, 70, 300])
def test_nan_and_strided_operands(name, num_tokens):
    given = moved(operands(FORMATS[name], num_tokens, 40, 256, torch.bfloat16))
    weight = repack(given)
    wide_x = torch.full((num_tokens, 512), float("nan"), dtype=torch.bfloat16, device="cuda")
    wide_x[:, 64:320] = given["x"]
    for before in (8, 7):  # rows of out on 16 bytes, and not
        wide_out = poisoned(num_tokens, 64, dtype=torch.bfloat16, device="cuda")
        ours = wide_out[:, before : before + 40]
        ops.weight_only_linear(wide_x[:, 64:320], weight, out=ours)
        assert torch.equal(ours, ops.weight_only_linear(given["x"], weight))
        assert wide_out[:, :before].isnan().all() and wide_out[:, before + 40 :].isnan().all()
    sound = ops.weight_only_linear(given["x"], weight)
    given["x"][4, 7] = float("nan")
    spoilt = ops.weight_only_linear(given["x"], weight)
    assert spoilt[4].isnan().all()
    rest = [token for token in range(num_tokens) if token != 4]
    assert torch.equal(spoilt[rest], sound[rest])


@on_cuda
@pytest.mark.parametrize("num_tokens", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_blocks_of_x_that_are_hard(name, dtype, num_tokens):
    """Outliers, zeros, -0, denormals, the largest everywhere: x is exact, or 16 bits of a block's largest."""
    given = operands(FORMATS[name], num_tokens, 40, 1024, dtype)
    x, tiny = given["x"], torch.finfo(dtype).smallest_normal
    x[0, 5], x[0, 128:256] = -1e4, 0.0
    x[1] = -0.0
    x[2] = torch.randint(-100, 101, (1024,)).double().mul(tiny / 128).to(dtype)
    x[3] = torch.where(torch.rand(1024) < 0.5, 3e4, -3e4).to(dtype)
    full = {key: value for key, value in given.items() if key not in ("x", "bias", "activation")}
    matrix = reference.dequantize_weight(**full)
    exact = x.double() @ matrix.t()
    largest = x.double().abs().unflatten(1, (-1, 128)).amax(2).clamp_min(2.0**-112)  # [token, block]
    of_digits = largest @ matrix.abs().unflatten(1, (-1, 128)).sum(2).t() / 60000
    limit = exact.abs() * (torch.finfo(dtype).eps * 1.01) + of_digits + tiny
    weight = repack(moved(given))
    for tactic in (1, 2) if torch.cuda.get_device_capability() == (9, 0) else (1,):
        out = ops.weight_only_linear(x.cuda(), weight, tactic=tactic).cpu()
        overflow = exact.abs() > torch.finfo(dtype).max * 0.99
        error = (out.double() - exact).abs()
        assert ((error <= limit) | overflow).all(), (error / limit)[~overflow].max()
        assert (out[1] == 0).all()


@on_cuda
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_so(name, bad):
    given = moved(operands(FORMATS[name], 4, 40, 1024, torch.bfloat16))
    weight = repack(given)
    for num_tokens in (2, 4):
        x = given["x"][:num_tokens].clone()
        sound = ops.weight_only_linear(x, weight)
        x[1, 700] = bad
        spoilt = ops.weight_only_linear(x, weight)
        assert not spoilt[1].isfinite().any()
        rest = [token for token in range(num_tokens) if token != 1]
        assert torch.equal(spoilt[rest], sound[rest])


@on_cuda
@pytest.mark.parametrize("name", ["int4-g128", "int8", "nvfp4"])
def test_more_tiles_than_sums_fit(name):
    """Rows do not depend on how many others there are; blocks take these in several groups."""
    given = moved(operands(FORMATS[name], 8, 40000, 4096, torch.bfloat16))
    whole = repack(given)
    few = repack({**given, "weight": given["weight"][:80], "scales": given["scales"][:80]})
    for num_tokens in (1, 4, 8):
        for tactic in (1, 2) if torch.cuda.get_device_capability() == (9, 0) else (1,):
            x = given["x"][:num_tokens]
            out = poisoned(num_tokens, 40000, dtype=torch.bfloat16, device="cuda")
            ops.weight_only_linear(x, whole, tactic=tactic, out=out)
            assert out.isfinite().all()
            assert torch.equal(out[:, :80], ops.weight_only_linear(x, few, tactic=tactic))


@on_cuda
def test_permutation():
    given = moved(operands("int4-g128", 5, 40, 512, torch.float16))
    permutation = torch.randperm(512, device="cuda")
    plain = repack(given)
    names = ("weight", "scales", "weight_type", "block")
    ordered = ops.repack_for_cuda(**{name: given[name] for name in names}, permutation=permutation)
    expected = ops.weight_only_linear(given["x"][:, permutation].contiguous(), plain)
    assert torch.equal(ops.weight_only_linear(given["x"], ordered), expected)


@on_cuda
@pytest.mark.parametrize("name", ["int4-g128", "nvfp4", "int8"])
def test_quantized_linear_on_cuda_repacks(name):
    given = moved(operands(FORMATS[name], 5, 40, 512, torch.bfloat16))
    expected = ops.weight_only_linear(given["x"], repack(given), given["bias"])
    assert torch.equal(ops.quantized_linear(**given), expected)


@on_cuda
def test_graph_and_compile():
    given = moved(operands("int4-g128", 5, 40, 512, torch.bfloat16))
    weight, x = repack(given), given["x"]
    expected = ops.weight_only_linear(x, weight)
    out = poisoned(5, 40, dtype=torch.bfloat16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    ops.weight_only_linear(x, weight, out=out)
    with torch.cuda.graph(graph):
        ops.weight_only_linear(x, weight, constant_weight=True, out=out)
    out.fill_(float("nan"))
    graph.replay()
    assert torch.equal(out, expected)
    torch.library.opcheck(
        torch.ops.fastkernels.weight_only_linear.default,
        (x, None, weight.packed, weight.row_factors, None, 0, 0, False, out),
    )


@on_cuda
def test_refuses_what_it_does_not_take():
    given = moved(operands("int4-g128", 3, 24, 256, torch.bfloat16))
    weight, x = repack(given), given["x"]

    def refused(message: str, x: torch.Tensor = x, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            ops.weight_only_linear(x, weight, **changes)

    refused("x is fp32, but the op takes bf16, fp16", x=x.float())
    refused(r"x has shape \[3, 128\], but the op takes \[num_tokens, 256\]", x=x[:, :128])
    refused("tactic is 18, but there are 1 to 17, and 0 chooses", tactic=18)
    refused(r"bias has shape \[23\]", bias=torch.zeros(23, device="cuda").bfloat16())
    refused("out is fp32", out=torch.empty(3, 24, device="cuda"))
    with pytest.raises((ValueError, RuntimeError), match="x and packed must be aligned to 16 bytes"):
        ops.weight_only_linear(torch.zeros(3, 257, device="cuda").bfloat16()[:, 1:], weight)
