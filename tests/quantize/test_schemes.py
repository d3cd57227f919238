"""Every scheme: what its bytes stand for, by a float64 definition, and how far rounding may go."""

import pytest
import torch

from fastkernels.quantize import SCHEMES, QuantizationError, find_scheme

NAMES = [
    *SCHEMES,
    "int4-g32",
    "int4-g64",
    "int4-channel",
    "int4-zeros",
    "int4-g32-zeros",
    "int4-channel-zeros",
]
SHAPES = [(1, 128), (3, 256), (130, 384), (257, 640)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def weight_of(*shape: int) -> torch.Tensor:
    """Rows and columns of very unlike sizes."""
    return torch.randn(shape) * torch.rand(shape[0], 1).add(0.01) * torch.rand(1, shape[1]).add(0.1)


def e4m3_value(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 128 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = torch.tensor([e4m3_value(byte) for byte in range(256)], dtype=torch.float64)


def codes_of(packed: torch.Tensor) -> torch.Tensor:
    """Bytes -> codes 0 to 15, the low half first."""
    codes = torch.empty(packed.shape[0], 2 * packed.shape[1], dtype=torch.int64)
    codes[:, 0::2], codes[:, 1::2] = packed & 15, packed >> 4
    return codes


def steps_of(name: str, parts: dict[str, torch.Tensor], shape: tuple[int, int]):
    """float64: the value of every element in units of its scale, and the scale of every element."""
    block = find_scheme(name).block(shape[1])
    scales = parts["scales"]
    if name == "mxfp4":
        factors = 2.0 ** (scales.double() - 127)
    elif name == "nvfp4":
        factors = E4M3[scales.view(torch.uint8).long()] * parts["global_scale"].double()
    else:
        factors = scales.double()

    def each(by_block: torch.Tensor) -> torch.Tensor:
        rows, columns = (torch.arange(size) // step for size, step in zip(shape, block, strict=True))
        return by_block[rows[:, None], columns[None]]

    packed = parts["packed"]
    if name.startswith("fp8"):
        values = E4M3[packed.view(torch.uint8).long()]
    elif name.startswith("int8"):
        values = packed.double()
    elif name.startswith("int4"):
        zeros = each(parts["zeros"]).double() if "zeros" in parts else 8.0
        values = codes_of(packed).double() - zeros
    else:
        table = torch.tensor(E2M1 + [-v for v in E2M1], dtype=torch.float64)
        values = table[codes_of(packed)]
    return values, each(factors)


def half_step(name: str, exact: torch.Tensor) -> torch.Tensor:
    """How far a value of `exact`, in units of its scale, may move."""
    size = exact.abs()
    if name.startswith("int8"):
        return torch.full_like(size, 0.5 + 1e-5)
    if name.startswith("int4"):  # bf16 scales: 15 steps may be 2^-8 of themselves too short
        return torch.full_like(size, 0.5 + 16 * 2**-8)
    if name.startswith("fp8"):
        return (size * 2**-4).clamp_min(2**-10)
    return torch.where(size < 2, 0.25, torch.where(size < 4, 0.5, 1.0)) + 1e-5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name, shape):
    scheme, weight = find_scheme(name), weight_of(*shape)
    parts = scheme.quantize(weight)
    assert {key: (tuple(part.shape), part.dtype) for key, part in parts.items()} == {
        key: (spec.shape, spec.torch_dtype) for key, spec in scheme.parts(*shape).items()
    }
    assert all(part.is_contiguous() for part in parts.values())
    values, factors = steps_of(name, parts, shape)
    torch.testing.assert_close(scheme.dequantize(parts, torch.float64), values * factors, rtol=0, atol=0)
    exact = weight.double() / factors
    assert ((values - exact).abs() <= half_step(name, exact)).all()
    again = scheme.quantize(scheme.dequantize(parts))
    if "zeros" not in name and name not in ("int4", "int4-g32", "int4-g64", "int4-channel", "int4-fp8"):
        # Largest values that the scale was made from are still there, so nothing moves.
        torch.testing.assert_close(scheme.dequantize(again), scheme.dequantize(parts), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_chunks_make_no_difference(name, monkeypatch):
    weight = weight_of(300, 256)
    whole = find_scheme(name).quantize(weight)
    monkeypatch.setattr("fastkernels.quantize.scheme._CHUNK", 256 * 130)
    pieces = find_scheme(name).quantize(weight)
    assert all(torch.equal(whole[key].view(torch.uint8), pieces[key].view(torch.uint8)) for key in whole)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_rows(name):
    """Of zeros alone, of tiny and of huge weights, in bf16 as they are loaded."""
    weight = weight_of(5, 256).bfloat16()
    weight[0], weight[1], weight[2] = 0, weight[1] * 1e-20, weight[2] * 1e20
    if name == "nvfp4":
        weight[2] = weight[3]  # one scale for the whole tensor leaves nothing of the rest
    scheme = find_scheme(name)
    result = scheme.dequantize(scheme.quantize(weight))
    assert torch.isfinite(result).all() and (result[0] == 0).all()
    if name.startswith("fp8-block"):
        return  # a block holds all five rows
    for row in (2, 3, 4) if name == "nvfp4" else (1, 2, 3, 4):
        error = (result[row].double() - weight[row].double()).norm() / weight[row].double().norm()
        assert error < 0.2, (row, error)


def test_e2m1_ties_go_to_the_even_neighbour():
    values = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] + [-0.25, -0.75, -5.0, 0.0] * 6])
    scheme = find_scheme("mxfp4")  # the largest is 6: the scale is 1
    result = scheme.dequantize(scheme.quantize(values))[0]
    assert result[:12].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -4, 0]


def test_names():
    assert find_scheme("int4-g128").name == "int4"
    for name in NAMES:
        assert find_scheme(name).name == name
    for wrong in ("int3", "INT8", "int4-g16", "int4-zeros-g32", ""):
        with pytest.raises(
            QuantizationError,
            match=r"no quantization scheme is called '.*'; there are fp8, fp8-block, int8, int8-zeros, ",
        ):
            find_scheme(wrong)


@pytest.mark.parametrize(
    ("name", "in_size", "message"),
    [
        ("int4", 192, "int4 takes rows of a multiple of 128, its groups; this weight's have 192"),
        ("int4-g32", 40, "int4-g32 takes rows of a multiple of 32, its groups; this weight's have 40"),
        ("int4-channel", 33, "int4-channel takes rows of a multiple of 2, two in a byte"),
        ("nvfp4", 40, "nvfp4 takes rows of a multiple of 16, its blocks"),
        ("mxfp4", 48, "mxfp4 takes rows of a multiple of 32, its blocks"),
        ("fp8-block", 192, "fp8-block takes rows of a multiple of 128, its blocks"),
    ],
)
def test_sizes_that_are_refused(name, in_size, message):
    with pytest.raises(QuantizationError, match=message):
        find_scheme(name).quantize(torch.randn(4, in_size))


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_refused(name):
    scheme = find_scheme(name)
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = torch.randn(4, 256)
        weight[2, 77] = bad
        with pytest.raises(
            QuantizationError, match=f"{name} takes finite weights; this one holds NaN or inf"
        ):
            scheme.quantize(weight)
    with pytest.raises(QuantizationError, match=r"takes a floating point weight .* torch.int64 \[4, 256\]"):
        scheme.quantize(torch.ones(4, 256, dtype=torch.int64))
    with pytest.raises(QuantizationError, match=r"this one is torch.float32 \[256\]"):
        scheme.quantize(torch.ones(256))
