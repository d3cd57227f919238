"""What matmul's kernels do to a product before they round it: a residual, a gate, bytes with a given scale.

Every tactic, through the op that all faces share; then the faces, which the CPU has too.
"""

from collections.abc import Iterator

import pytest
import torch

from fastkernels import ops
from fastkernels.ops import reference
from fastkernels.ops.gemm import (
    FIRST_FEW_TACTIC,
    FIRST_SM80_TACTIC,
    LINEAR_TACTIC,
    NUM_MATMUL_TACTICS,
    matmul,
    matmul_workspace,
)
from tests.conftest import CUDA_REASON
from tests.ops.matmul_cases import (
    DTYPE_OF,
    EPILOGUES,
    FAST_FP8,
    NO_TILE,
    ONLY_FP8,
    Epilogue,
    check_epilogue,
    problem,
)
from tests.tolerances import assert_as_good_as_torch, assert_rounded, assert_similar, poisoned

on_cuda = pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
IS_HOPPER = CUDA_REASON is None and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not IS_HOPPER, reason="the kernel is for Hopper GPUs")

FEW = list(range(FIRST_FEW_TACTIC, NUM_MATMUL_TACTICS))
SM80 = list(range(FIRST_SM80_TACTIC, FIRST_FEW_TACTIC))
HOPPERS = [*range(LINEAR_TACTIC), *FEW]
SCHEMES = ("fp8", "fp8-one-scale", "fp8-block", "fp8-e5m2", "int8", "int8-zeros", "bf16", "fp16")
TOKENS = [1, 3, 7, 8, 9, 15, 16, 17, 32, 33, 63, 64, 65, 127, 128, 129, 256, 300]
# out_size, in_size: of 16 bits, of bytes, and with a gate and scales of blocks
SIZES = [(8, 16), (72, 64), (136, 1040), (1000, 528), (4104, 1024)]
BYTE_SIZES = [(16, 16), (80, 64), (144, 1040), (1008, 528), (4112, 1024)]
GATED_BLOCKS = [(128, 128), (256, 128), (384, 1152), (1024, 640), (2048, 1024)]


def has_tile(tactic: int, scheme: str, epilogue: Epilogue = EPILOGUES[0]) -> bool:
    if scheme == "fp8-block" and epilogue.gated and tactic in ONLY_FP8:
        return False  # no room for the scales of both
    if scheme in DTYPE_OF:
        return tactic not in (*ONLY_FP8, *SM80)
    return tactic not in NO_TILE.get(scheme, ())


CASES = [
    pytest.param(tactic, scheme, marks=on_hopper if tactic in HOPPERS or scheme in DTYPE_OF else on_cuda)
    for tactic in (-1, *HOPPERS, *SM80)
    for scheme in SCHEMES
    if has_tile(tactic, scheme)
]


@pytest.fixture(scope="module")
def workspace() -> Iterator[torch.Tensor]:
    yield matmul_workspace(torch.device("cuda"))
    problem.cache_clear()


def sizes_of(scheme: str, epilogue: Epilogue) -> list[tuple[int, int]]:
    if scheme == "fp8-block" and epilogue.gated:
        return GATED_BLOCKS
    return SIZES if epilogue.byte is None else BYTE_SIZES


def is_exact(tactic: int, scheme: str) -> bool:
    return tactic not in FAST_FP8 or not scheme.startswith("fp8")


@pytest.mark.parametrize("tactic, scheme", CASES)
def test_matches_reference(tactic, scheme, workspace):
    """Every epilogue at every size, the tokens by turns."""
    for index in range(len(SIZES)):
        for number, epilogue in enumerate(EPILOGUES):
            if not has_tile(tactic, scheme, epilogue):
                continue
            size = sizes_of(scheme, epilogue)[index]
            given = problem(scheme, TOKENS[-1], *size, epilogue.gated)
            for step in (0, 7):
                num_tokens = TOKENS[(4 * index + number + step + tactic) % len(TOKENS)]
                dtype = DTYPE_OF.get(scheme, torch.bfloat16 if num_tokens % 2 else torch.float16)
                how = {"tactic": tactic, "workspace": workspace, "is_exact": is_exact(tactic, scheme)}
                check_epilogue(given, epilogue, num_tokens, dtype, **how)


@on_hopper
@pytest.mark.parametrize("tactic", ONLY_FP8)
def test_scales_of_blocks_and_a_gate_have_no_tile_of_192(tactic, workspace):
    given, how = problem("fp8-block", 9, 128, 128, True), {"tactic": tactic, "workspace": workspace}
    with pytest.raises(Exception, match="there is no tile 2, tactics 4 and 5, for a gate and these types"):
        check_epilogue(given, Epilogue(gated=True), 9, torch.bfloat16, **how)


@on_hopper
@pytest.mark.parametrize("tactic", [-1, 1, 6, 9, 13, 15, *FEW])
@pytest.mark.parametrize("scheme", ["bf16", "fp8", "fp8-block", "int8"])
def test_llama_shapes(scheme, tactic, workspace):
    if not has_tile(tactic, scheme):
        return
    for (out_size, in_size), epilogue in (
        ((14336, 4096), Epilogue(gated=True)),
        ((14336, 4096), Epilogue(gated=True, byte=torch.float8_e4m3fn)),
        ((4096, 14336), Epilogue("in place")),
        ((4096, 4096), Epilogue("own", byte=torch.int8)),
    ):
        given = problem(scheme, 1000, out_size, in_size, epilogue.gated)
        for num_tokens in (16, 64, 1000):
            how = {"tactic": tactic, "workspace": workspace, "is_exact": is_exact(tactic, scheme)}
            check_epilogue(given, epilogue, num_tokens, DTYPE_OF.get(scheme, torch.bfloat16), **how)


@on_hopper
@pytest.mark.parametrize("tactic", [-1, 0, 9, 13, *FEW])
def test_every_number_of_tokens(tactic, workspace):
    for epilogue, out_size in ((Epilogue("in place"), 200), (Epilogue(gated=True), 104)):
        given = problem("bf16", 300, out_size, 136, epilogue.gated)
        for num_tokens in (*range(1, 70), *range(125, 133), *range(250, 301, 10)):
            check_epilogue(given, epilogue, num_tokens, torch.bfloat16, tactic=tactic, workspace=workspace)


@on_hopper
@pytest.mark.parametrize("tactic", [-1, 0, 9, 13, *FEW])
def test_nan_stays_in_its_token_and_row(tactic, workspace):
    """Of a gate, in the column that the row of the gate or of up is of; of a residual, where it stands."""
    x = torch.randn(129, 200, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(528, 200, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(129, 528, device="cuda", dtype=torch.bfloat16)

    def gated() -> torch.Tensor:
        return ops.linear_silu_mul(x, weight, tactic=tactic, workspace=workspace)

    def added() -> torch.Tensor:
        return ops.linear(x, weight, residual=residual, tactic=tactic, workspace=workspace)

    clean_gated, clean_added = gated(), added()
    residual[7, 9] = torch.nan
    out = added()
    assert out[7, 9].isnan() and out.isnan().sum() == 1
    assert torch.equal(out.nan_to_num(0.0), clean_added.masked_fill(residual.isnan(), 0.0))
    x[100, 3], weight[130, 5], weight[264 + 77, 5] = torch.nan, torch.nan, torch.nan
    out = gated()
    keep = torch.ones(129, 264, dtype=torch.bool, device="cuda")
    keep[100], keep[:, [130, 77]] = False, False
    assert out[~keep].isnan().all() and torch.equal(out[keep], clean_gated[keep])


@on_hopper
@pytest.mark.parametrize("tactic", [-1, 0, 9, 13, *FEW])
def test_in_a_graph_behind_other_kernels(tactic, workspace):
    """Dependent launches: the residual is what the product before wrote, and out too."""
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(2048, 1024, device="cuda", dtype=torch.bfloat16) / 32 for _ in range(6)]
    norm = torch.ones(1024, device="cuda", dtype=torch.bfloat16)
    how = {"constant_weight": True, "tactic": tactic, "workspace": workspace}

    def chain() -> torch.Tensor:
        h = x.clone()
        for weight in weights:
            y = ops.linear_silu_mul(ops.rms_norm(h, norm), weight, **how)
            ops.linear(y, weight[:1024], residual=h, out=h, **how)
        return h

    expected = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for _ in range(20):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)


@on_cuda
@pytest.mark.parametrize("scheme", ["bf16", "int8"])
def test_opcheck(scheme, workspace):
    if scheme == "bf16" and not IS_HOPPER:
        pytest.skip("the kernel is for Hopper GPUs")
    for epilogue in (Epilogue("own"), Epilogue(byte=torch.int8), Epilogue(gated=True)):
        given = problem(scheme, 9, 32, 64, epilogue.gated)
        out = torch.zeros(9, 32, device="cuda", dtype=epilogue.byte or torch.bfloat16)
        torch.library.opcheck(
            torch.ops.fastkernels.matmul.default,
            (
                *(given.x, given.weight, given.x_scales, given.weight_scales, None, None, None),
                given.residual if epilogue.residual else None,
                torch.ones(1, device="cuda") if epilogue.byte else None,
                *(False, epilogue.gated, -1, workspace, out),
            ),
        )


# --- the faces --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3, 16])
def test_linear_with_a_residual(num_tokens, dtype, device):
    if device.type == "cuda" and dtype == torch.float32:
        pytest.skip("the CUDA kernels take bf16 and fp16")
    x = torch.randn(num_tokens, 136, device=device, dtype=dtype)
    weight, bias = (torch.randn(*shape, device=device, dtype=dtype) / 8 for shape in ((72, 136), (72,)))
    residual = torch.randn(num_tokens, 96, device=device, dtype=dtype)[:, 16:88]
    out = poisoned(num_tokens, 72, dtype=dtype, device=device)
    assert ops.linear(x, weight, bias, residual=residual, out=out) is out
    exact = reference.linear(*(t.double() for t in (x, weight, bias)), residual=residual.double())
    assert_as_good_as_torch(out, reference.linear(x, weight, bias, residual=residual), exact)
    in_place = residual.clone()
    ops.linear(x, weight, bias, residual=in_place, out=in_place)
    assert torch.equal(in_place, out)
    if device.type == "cpu":
        assert torch.equal(out, ops.linear(x, weight, bias) + residual)


@on_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_any_number_of_tokens_with_a_gate_or_a_residual(dtype):
    for num_tokens in (1, 17, 200):
        x = torch.randn(num_tokens, 136, device="cuda", dtype=dtype)
        weight = torch.randn(144, 136, device="cuda", dtype=dtype) / 8
        exact = reference.linear_silu_mul(x.double(), weight.double())
        out = ops.linear_silu_mul(x, weight, tactic=-1)
        assert_as_good_as_torch(out, reference.linear_silu_mul(x, weight), exact)
        residual = torch.randn(num_tokens, 144, device="cuda", dtype=dtype)
        exact = reference.linear(x.double(), weight.double(), residual=residual.double())
        out = ops.linear(x, weight, residual=residual)
        assert_as_good_as_torch(out, reference.linear(x, weight, residual=residual), exact)


QUANTIZED = {  # weight_type, block by rows and in_size, activation
    "int8": ("int8", None, "int8"),
    "int8-zeros": ("int8", None, "int8-zeros"),
    "fp8": ("e4m3", None, "e4m3"),
    "fp8-block": ("e4m3", (128, 128), "e4m3-block"),
    "int8-weight": ("int8", None, None),  # the last two on the CPU alone
    "int4": ("int4", (1, 64), None),
}


def quantized(scheme: str, num_tokens: int, rows: int, device: torch.device) -> dict:
    """in_size is 256."""
    weight_type, block, activation = QUANTIZED[scheme]
    if weight_type == "e4m3":
        weight = torch.randn(rows, 256).mul(20).to(torch.float8_e4m3fn)
    elif weight_type == "int4":
        weight = torch.randint(0, 256, (rows, 128)).to(torch.uint8)
    else:
        weight = torch.randint(-128, 128, (rows, 256)).to(torch.int8)
    height, width = block or (1, 256)
    scales = (torch.rand(-(-rows // height), 256 // width) + 0.5) / (64 if weight_type == "int4" else 600)
    x = torch.randn(num_tokens, 256, dtype=torch.bfloat16)
    how = {"weight_type": weight_type, "block": block, "activation": activation}
    return {"x": x.to(device), "weight": weight.to(device), "scales": scales.to(device), **how}


def on_the_cpu(given: dict) -> dict:
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in given.items()}


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("num_tokens", [1, 5, 40])
def test_quantized_linear(num_tokens, scheme, device):
    """On a GPU one kernel; on the CPU the ops that it stands for, bit for bit."""
    if device.type == "cuda" and QUANTIZED[scheme][2] is None:
        pytest.skip("without an activation CUDA takes none of the three")
    given = quantized(scheme, num_tokens, 256, device)
    bias = torch.randn(256, device=device, dtype=torch.bfloat16)
    residual = torch.randn(num_tokens, 256, device=device, dtype=torch.bfloat16)
    for options in ({"gated": True}, {"residual": residual}, {"bias": bias, "residual": residual}):
        exact = reference.quantized_linear(**on_the_cpu({**given, **options})).to(device)
        out = poisoned(*exact.shape, dtype=torch.bfloat16, device=device)
        assert ops.quantized_linear(**given, **options, out=out) is out
        assert torch.isfinite(out).all()
        assert_similar(out, exact, 1e-4)  # the CPU rounds twice or thrice
        composed = ops.quantized_linear(**given, bias=options.get("bias"))
        composed = ops.silu_mul(composed) if "gated" in options else composed + residual
        if device.type == "cpu":
            assert torch.equal(out, composed)
        if "residual" in options:
            in_place = residual.clone()
            ops.quantized_linear(**given, **{**options, "residual": in_place}, out=in_place)
            assert torch.equal(in_place, out)
        scale = (exact.abs().max() * 0.8 / 127).float().view(1)
        for byte in (torch.float8_e4m3fn, torch.int8):
            bytes_ = torch.zeros(exact.shape, dtype=byte, device=device)
            assert ops.quantized_linear(**given, **options, out_scale=scale, out=bytes_) is bytes_
            assert_rounded(bytes_, exact / scale.double(), 2e-2 if device.type == "cpu" else 3e-3)
            if device.type == "cpu":
                expected, _ = ops.quantize(composed, per="tensor", scales=scale, dtype=byte)
                assert torch.equal(bytes_.view(torch.uint8), expected.view(torch.uint8))
        assert ops.quantized_linear(**given, **options, out_scale=scale).dtype == torch.float8_e4m3fn


def test_compile():
    """On the CPU; CUDA's op has a fake kernel, which opcheck checks."""
    device = torch.device("cpu")
    given = quantized("int8", 3, 64, device)
    x, residual = given.pop("x"), torch.randn(3, 64, dtype=torch.bfloat16)
    scale = torch.tensor([0.05])
    weight = torch.randn(64, 256, dtype=torch.bfloat16)

    def every(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            ops.linear(x, weight, residual=residual),
            ops.quantized_linear(x, **given, residual=residual),
            ops.quantized_linear(x, **given, gated=True),
            ops.quantized_linear(x, **given, out_scale=scale).float(),
        )

    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    for one, other in zip(every(x), compiled(x), strict=True):
        assert torch.equal(one, other)


# --- what is refused --------------------------------------------------------------------------------------


def test_the_faces_refuse_what_they_do_not_take(device):
    x = torch.randn(3, 256, device=device, dtype=torch.bfloat16)
    weight = torch.randn(48, 256, device=device, dtype=torch.bfloat16)
    residual = torch.randn(3, 48, device=device, dtype=torch.bfloat16)
    for options, message in (
        ({"residual": residual[:, :40]}, r"residual has shape \[3, 40\], but the op takes \[num_tokens"),
        ({"residual": residual.half()}, "residual is fp16, but the op takes bf16"),
        ({"residual": residual.t().contiguous().t()}, "the last dimension of residual must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.linear(x, weight, **options)
    given = quantized("int8", 3, 48, device)
    scale = torch.ones(1, device=device)
    bias, bytes_ = residual[0].contiguous(), torch.zeros(3, 48, dtype=torch.int8, device=device)
    for options, message in (
        ({"gated": True, "bias": bias}, "gated takes neither bias nor residual"),
        ({"gated": True, "residual": residual}, "gated takes neither bias nor residual"),
        ({"residual": residual[:2]}, r"residual has shape \[2, 48\], but the op takes \[num_tokens"),
        ({"residual": residual.float()}, "residual is fp32, but the op takes bf16"),
        ({"out_scale": scale.expand(2)}, r"out_scale has shape \[2\], but the op takes \[1\]"),
        ({"out_scale": scale.double()}, "out_scale is float64, but the op takes fp32"),
        ({"out_scale": scale, "out": residual}, "out is bf16, but the op takes float8_e4m3fn, int8"),
        ({"out": bytes_}, "out is int8, but the op takes bf16"),
        (
            {"out_scale": scale, "gated": True},
            "out_size is 24; with an out_scale it must be a multiple of 16",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            ops.quantized_linear(**given, **options)
    with pytest.raises(ValueError, match="weight has 47 rows; gate and up have as many each"):
        ops.quantized_linear(**quantized("int8", 3, 47, device), gated=True)
    if device.type == "cpu":
        with pytest.raises(ValueError, match="a tactic is given, but x is on cpu; tactics are of GPUs"):
            ops.linear_silu_mul(x, weight, tactic=-1)
        return
    for scheme in ("int8-weight", "int4"):
        with pytest.raises(ValueError, match="residual, gated and out_scale go with an activation"):
            ops.quantized_linear(**quantized(scheme, 3, 48, device), gated=True)
    with pytest.raises(ValueError, match="out_size is 20; with a gate it must be a multiple of 8"):
        ops.quantized_linear(**quantized("int8", 3, 40, device), gated=True)
    with pytest.raises(
        ValueError, match="out_size is 64; with a gate and scales of blocks it must be a mult"
    ):
        ops.quantized_linear(**quantized("fp8-block", 3, 128, device), gated=True)
    for options in ({"gated": True}, {"residual": residual}, {"out_scale": scale}):
        rows = 64 if "gated" in options else 48
        with pytest.raises(
            Exception, match=r"the tactic of few tokens takes .* no gate, residual or out in bytes"
        ):
            ops.quantized_linear(**quantized("int8", 3, rows, device), **options, tactic=LINEAR_TACTIC)


def test_the_library_refuses_what_it_does_not_take(device):
    """Before it looks for a kernel, so on the CPU too."""
    x = torch.zeros(3, 64, dtype=torch.int8, device=device)
    weight = torch.zeros(32, 64, dtype=torch.int8, device=device)
    scale = torch.ones(1, device=device)
    half = torch.zeros(3, 32, dtype=torch.bfloat16, device=device)
    bytes_ = torch.zeros(3, 32, dtype=torch.int8, device=device)
    workspace = torch.zeros(16, dtype=torch.uint8, device=device)

    def call(out=half, bias=None, residual=None, out_scale=None, gated=False, scales=32):
        scales = (torch.ones(3, device=device), torch.ones(scales, device=device))
        torch.ops.fastkernels.matmul(
            *(x, weight, *scales, None, None, bias, residual, out_scale),
            *(False, gated, -1, workspace, out),
        )

    gives = "but the op gives bf16 and fp16, and with an out_scale e4m3 and int8"
    alike = "bias and residual must have the dtype of out, or where that is bytes both bf16 or both fp16"
    shaped = r"residual must be \[num_tokens, out_size\], its last dimension contiguous"
    for options, message in (
        ({"out": bytes_}, f"out is int8, {gives}"),
        ({"out_scale": scale}, f"out is bf16, {gives}"),
        ({"out": half.float()}, f"out is fp32, {gives}"),
        ({"out": bytes_, "out_scale": scale.expand(2)}, "out_scale must be one fp32 value"),
        ({"out": bytes_, "out_scale": scale.half()}, "out_scale must be one fp32 value"),
        ({"gated": True}, r"with a gate \[2 \* out_size, in_size\]"),
        ({"gated": True, "out": half[:, :16], "bias": half[0, :16]}, "neither bias nor residual"),
        ({"gated": True, "out": half[:, :16], "residual": half[:, 16:]}, "neither bias nor residual"),
        ({"gated": True, "out": half[:, :16], "scales": 16}, r"of the weight's rows, \[rows\] or \[1\]"),
        ({"bias": half[0].half()}, alike),
        ({"residual": half.half()}, alike),
        ({"residual": half.float(), "out": bytes_, "out_scale": scale}, alike),
        ({"residual": half, "bias": half[0].half(), "out": bytes_, "out_scale": scale}, alike),
        ({"bias": half[0, :16]}, r"bias must be contiguous \[out_size\]"),
        ({"residual": half[:2]}, shaped),
        ({"residual": half.t().contiguous().t()}, shaped),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            call(**options)


@on_cuda
def test_alignment(workspace):
    x = torch.zeros(3, 64, dtype=torch.int8, device="cuda")
    weight, ones = torch.zeros(32, 64, dtype=torch.int8, device="cuda"), torch.ones(32, device="cuda")
    wide = torch.zeros(3, 36, dtype=torch.bfloat16, device="cuda")
    bytes_ = torch.zeros(3, 40, dtype=torch.int8, device="cuda")

    def call(out: torch.Tensor, **options: torch.Tensor) -> None:
        matmul("matmul", x, weight, ones[:3], ones, None, False, -1, workspace, out, **options)

    for options in (
        {"out": torch.zeros_like(wide[:, :32]), "residual": wide[:, :32]},
        {"out": bytes_[:, :32], "out_scale": ones[:1]},
    ):
        with pytest.raises(Exception, match="aligned to 16 bytes"):
            call(**options)
