"""The algorithms against plain ones written from their papers, and the grid against the schemes and against
compressed-tensors' own quantiser."""

import pytest
import torch

from fastkernels.quantize import QuantizationError, find_scheme
from fastkernels.quantize.algorithms.awq import awq_scales, output_error
from fastkernels.quantize.algorithms.gptq import gptq
from fastkernels.quantize.algorithms.grid import choose_grid
from fastkernels.quantize.algorithms.round_to_nearest import round_to_nearest
from fastkernels.quantize.algorithms.smoothquant import smooth_scales

NAMES = [
    "fp8",
    "fp8-block",
    "int8-weight",
    "int8-zeros",
    "int4",
    "int4-zeros",
    "int4-g32",
    "int4-channel",
    "nvfp4",
    "mxfp4",
]


def weight_of(*shape: int) -> torch.Tensor:
    """Rows and columns of very unlike sizes."""
    return torch.randn(shape) * torch.rand(shape[0], 1).add(0.01) * torch.rand(1, shape[1]).add(0.1)


def inputs_of(rows: int, size: int) -> torch.Tensor:
    """Columns that go together, and a few that are much larger."""
    mixed = torch.randn(rows, size // 4) @ torch.randn(size // 4, size) / size**0.5 + 0.3 * torch.randn(
        rows, size
    )
    mixed[:, ::37] *= 20
    return mixed


def hessian_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


# --- the grid -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 128), (130, 384), (257, 640)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_without_a_search_the_grid_is_the_schemes_own(name, shape, device):
    """Byte for byte what ``Scheme.quantize`` makes."""
    scheme, weight = find_scheme(name), weight_of(*shape).to(device)
    grid = choose_grid(scheme, weight, search=False)
    parts, wanted = grid.parts(weight), scheme.quantize(weight)
    assert list(parts) == list(wanted)
    for part in parts:
        found, expected = (x[part].contiguous().view(torch.uint8) for x in (parts, wanted))
        assert torch.equal(found, expected), part


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_parts_stand_for_what_was_rounded(name, search, device):
    scheme, weight = find_scheme(name), weight_of(130, 384).to(device)
    grid, rounded = round_to_nearest(scheme, weight, search=search)
    parts = grid.parts(rounded)
    for part, spec in scheme.parts(130, 384).items():
        assert (tuple(parts[part].shape), parts[part].dtype) == (spec.shape, spec.torch_dtype)
        assert parts[part].is_contiguous()
    torch.testing.assert_close(scheme.dequantize(parts), rounded, rtol=1e-6, atol=0)
    columns = torch.randperm(384, device=weight.device)[:50]
    torch.testing.assert_close(grid.round(weight[:, columns], columns), rounded[:, columns], rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_search_never_makes_it_worse(name, device):
    scheme, weight = find_scheme(name), weight_of(64, 384).to(device)
    x = inputs_of(2000, 384).to(device)
    plain = (round_to_nearest(scheme, weight, search=False)[1] - weight).square().sum()
    searched = (round_to_nearest(scheme, weight)[1] - weight).square().sum()
    assert searched <= plain * (1 + 1e-6)
    if name == "nvfp4":  # e2m1's steps are uneven, so scales matter most
        assert searched < 0.9 * plain
    # By the output's error, block by block as if the others had none.
    hessian = hessian_of(x)
    blocks = torch.zeros_like(hessian)
    size = scheme.block(384)[1]
    for begin in range(0, 384, size):
        blocks[begin : begin + size, begin : begin + size] = hessian[
            begin : begin + size, begin : begin + size
        ]
    by_output = round_to_nearest(scheme, weight, hessian)[1] - weight
    by_largest = round_to_nearest(scheme, weight, search=False)[1] - weight
    assert output_error(by_output, blocks) <= output_error(by_largest, blocks) * (1 + 1e-5)


def test_extreme_blocks(device):
    """All zero, tiny, huge: finite, and no scale of 0, which no reader takes."""
    weight = weight_of(5, 256)
    weight[0], weight[1], weight[2, :64] = 0, weight[1] * 1e-20, 0
    for name in NAMES:
        scheme = find_scheme(name)
        grid, rounded = round_to_nearest(scheme, weight.to(device))
        assert torch.isfinite(rounded).all() and (rounded[0] == 0).all(), name
        scales = grid.parts(rounded)["scales"]
        assert scales.dtype == torch.uint8 or (scales.float() > 0).all(), name
    with pytest.raises(QuantizationError, match="takes finite weights"):
        round_to_nearest(find_scheme("int8-weight"), torch.full((2, 64), float("nan")))


@pytest.mark.parametrize("name", ["int4", "int4-zeros", "int4-g32", "int8-weight", "fp8"])
def test_rounding_is_that_of_compressed_tensors(name):
    """On the same scales: everywhere the same, or a step away where a weight lies between two."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    scheme, weight = find_scheme(name), weight_of(48, 256)
    grid, rounded = round_to_nearest(scheme, weight)
    kind = {"int4": ("int", 4), "int8": ("int", 8), "e4m3": ("float", 8)}[scheme.weight_type]
    by_group = scheme.block(256)[1] < 256
    args = quantization.QuantizationArgs(
        num_bits=kind[1],
        type=kind[0],
        symmetric=grid.zero is None,
        strategy="group" if by_group else "channel",
        group_size=scheme.block(256)[1] if by_group else None,
    )
    zero = torch.zeros_like(grid.step) if grid.zero is None else grid.zero - 8  # theirs runs from -8 to 7
    theirs = forward.fake_quantize(weight, grid.step, zero.to(torch.int8), args)
    size = scheme.block(256)[1]
    step = grid.step.repeat_interleave(size, 1) * (32 if kind[0] == "float" else 1)
    assert ((theirs - rounded).abs() <= step * 1.001).all()
    assert (theirs == rounded).float().mean() > 0.999


# --- GPTQ ---------------------------------------------------------------------------------------------------


def obq(
    weight: torch.Tensor, hessian: torch.Tensor, round_column, order: list[int], damping: float
) -> torch.Tensor:
    """Frantar et al., section 3, equations 2 and 3, as they stand: after each column the inverse of what is
    left of H is made again, in float64."""
    left, matrix = weight.double().clone(), hessian.double().clone()
    matrix += damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
    result = torch.empty_like(left)
    for position, column in enumerate(order):
        remaining = order[position:]
        inverse = torch.linalg.inv(matrix[remaining][:, remaining])
        result[:, column] = round_column(left[:, column], column)
        error = (left[:, column] - result[:, column]) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
    return result


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-zeros", "int8-weight", "nvfp4"])
def test_gptq_is_that_of_the_paper(name, activation_order, block, device):
    weight, hessian = weight_of(24, 96), hessian_of(inputs_of(400, 96))
    grid = choose_grid(find_scheme(name), weight)
    order = hessian.diagonal().argsort(descending=True).tolist() if activation_order else list(range(96))

    def round_column(values: torch.Tensor, column: int) -> torch.Tensor:
        return grid.round(values.float()[:, None], torch.tensor([column]))[:, 0].double()

    expected = obq(weight, hessian, round_column, order, 0.01)
    on_device = choose_grid(find_scheme(name), weight.to(device))
    found = gptq(
        weight.to(device), hessian.to(device), on_device, block=block, activation_order=activation_order
    ).cpu()
    assert torch.equal(grid.round(found), found)  # on the grid
    # One that lies between two codes in fp32 takes others of its row with it, so not all are equal.
    step = grid.step.repeat_interleave(96 // grid.step.shape[1], 1) * (2 if name == "nvfp4" else 1)
    within = ((found.double() - expected).abs() <= step * 1.001).double().mean()
    assert within > 0.995
    assert (found.double() == expected).double().mean() > 0.97
    exact = output_error(expected.float() - weight, hessian)
    assert output_error(found - weight, hessian) == pytest.approx(exact, rel=0.02)
    assert exact < 0.8 * output_error(grid.round(weight) - weight, hessian)


def test_gptq_of_columns_that_go_together_or_are_never_read(device):
    """A singular Hessian is damped; a column that is never read is rounded as it is."""
    weight, x = weight_of(16, 64).to(device), inputs_of(8, 64).to(device)
    x[:, 5] = 0
    grid = choose_grid(find_scheme("int4-g32"), weight)
    found = gptq(weight, hessian_of(x), grid)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[:, 5], grid.round(weight)[:, 5], rtol=0, atol=0)
    nothing = gptq(weight, torch.zeros(64, 64, device=device), grid)
    torch.testing.assert_close(nothing, grid.round(weight), rtol=0, atol=0)


# --- scales that move between neighbours
# ----------------------------------------------------------------------


def test_awq_finds_the_strength_of_a_plain_search(device):
    """Lin et al., equation 5, with the output computed from the inputs themselves."""
    scheme, x = find_scheme("int4-g32"), inputs_of(500, 128)
    weights = [weight_of(40, 128), weight_of(24, 128)]
    magnitude = x.abs().mean(0)

    def error(strength: float) -> float:
        scales = magnitude**strength
        scales = scales / (scales.max() * scales.min()).sqrt()
        total = 0.0
        for weight in weights:
            rounded = scheme.dequantize(scheme.quantize(weight * scales)) / scales
            total += ((x @ (rounded - weight).T) ** 2).sum().item()
        return total

    best = min((i / 20 for i in range(20)), key=error)
    scales, strength = awq_scales(
        [weight.to(device) for weight in weights],
        hessian_of(x).to(device),
        magnitude.to(device),
        scheme,
    )
    assert error(strength) == pytest.approx(error(best), rel=1e-3)
    assert strength > 0 and error(best) < 0.8 * error(0.0)
    expected = magnitude**strength
    torch.testing.assert_close(scales.cpu(), expected / (expected.max() * expected.min()).sqrt())


def test_smoothquant_of_the_papers_example(device):
    """Xiao et al., figure 5: strength 0.5 makes X = [[1, -16, 2, 6], [-2, 8, -1, -9]] and
    W = [[2, 1, -2], [1, -1, -1], [2, -1, -2], [-1, -1, 1]] as wide as each other."""
    x = torch.tensor([[1.0, -16, 2, 6], [-2, 8, -1, -9]], device=device)
    weight = torch.tensor([[2.0, 1, -2], [1, -1, -1], [2, -1, -2], [-1, -1, 1]], device=device).T.contiguous()
    scales, strength = smooth_scales([weight], x.abs().amax(0), x, find_scheme("int8"))
    expected = x.abs().amax(0) ** strength / weight.abs().amax(0) ** (1 - strength)
    torch.testing.assert_close(scales, expected / (expected.max() * expected.min()).sqrt())
    half = (x.abs().amax(0) / weight.abs().amax(0)).sqrt()
    torch.testing.assert_close(half.cpu(), torch.tensor([1.0, 4, 1, 3]))


def test_smoothquant_helps_where_columns_are_large(device):
    scheme, x, weight = find_scheme("int8"), inputs_of(512, 128).to(device), weight_of(64, 128).to(device)

    def error(scales: torch.Tensor) -> float:
        scaled = weight * scales
        step = (x / scales).abs().amax(1, keepdim=True) / 127
        inputs = ((x / scales) / step).round() * step
        return (inputs @ scheme.dequantize(scheme.quantize(scaled)).T - x @ weight.T).square().sum().item()

    scales, strength = smooth_scales([weight], x.abs().amax(0), x, scheme)
    assert 0 < strength < 1
    assert error(scales) < 0.5 * error(torch.ones_like(scales))


def test_scales_of_columns_that_are_tied_are_equal():
    def tie(scales: torch.Tensor) -> torch.Tensor:
        return scales.view(2, 2, 32).amax(1, keepdim=True).expand(2, 2, 32).flatten()

    x, weight = inputs_of(300, 128), weight_of(32, 128)
    for scales, _ in (
        awq_scales([weight], hessian_of(x), x.abs().mean(0), find_scheme("int4-g32"), tie),
        smooth_scales([weight], x.abs().amax(0), x, find_scheme("int8"), tie),
    ):
        first, second = scales.view(2, 2, 32).unbind(1)
        assert torch.equal(first, second)


def test_gptq_refuses_inputs_that_are_not_finite():
    weight, hessian = torch.randn(8, 64), torch.full((64, 64), torch.nan)
    with pytest.raises(QuantizationError, match="its inputs hold NaN or infinity on the calibration text"):
        gptq(weight, hessian, choose_grid(find_scheme("int4-g32"), weight))
