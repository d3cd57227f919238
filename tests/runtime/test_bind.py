"""Which kernel a product of a GPU's plan is bound to. No GPU: meta tensors have none of its memory either."""

from dataclasses import replace

import pytest
import torch

from fastkernels import LLM, SamplingParams
from fastkernels.compiler import Step, compile_model
from fastkernels.compiler.tune import (
    BY_RULE,
    FILE_NAME,
    HOPPER,
    STREAM,
    TORCH,
    Choices,
    Product,
    Tactic,
    Timed,
    tactics,
    tactics_of,
)
from fastkernels.compiler.tune.timer import CudaTimer
from fastkernels.config import ConfigError, EngineConfig
from fastkernels.models.presets import PRESETS
from fastkernels.ops import reference
from fastkernels.ops.quant import KINDS
from fastkernels.runtime import build
from fastkernels.runtime.bind import Products, bind
from fastkernels.runtime.build import choose_tactics, compile_for
from tests.conftest import CUDA_REASON

BF16 = torch.bfloat16
OUT, IN = 1024, 512
_fk = torch.ops.fastkernels
_aten = torch.ops.aten

# scheme -> shapes and dtypes of the inputs of its step, x first, for so many tokens
STEPS = {
    None: ("linear", lambda n: [((n, IN), BF16), ((OUT, IN), BF16)]),
    "int8@cuda": (
        "matmul",
        lambda n: [
            ((n, IN), torch.int8),
            ((n,), torch.float32),
            ((OUT, IN), torch.int8),
            ((OUT, 1), torch.float32),
        ],
    ),
    "fp8-block@cuda": (
        "matmul",
        lambda n: [
            ((n, IN), torch.float8_e4m3fn),
            ((n, IN // 128), torch.float32),
            ((OUT, IN), torch.float8_e4m3fn),
            ((OUT // 128, IN // 128), torch.float32),
        ],
    ),
    "int8-zeros@cuda": (
        "matmul",
        lambda n: [
            ((n, IN), torch.int8),
            ((n,), torch.float32),
            ((n,), torch.int32),
            ((OUT, IN), torch.int8),
            ((OUT, 1), torch.float32),
            ((OUT,), torch.int32),
        ],
    ),
    "int4@cuda": (
        "quantized_linear",
        lambda n: [((n, IN), BF16), ((OUT // 16, IN // 128, 1056), torch.uint8), ((OUT,), torch.float32)],
    ),
    "int4-fp8@cuda": (
        "quantized_linear",
        lambda n: [
            ((n, IN), torch.float8_e4m3fn),
            ((n,), torch.float32),
            ((OUT // 16, IN // 128, 1056), torch.uint8),
            ((OUT,), torch.float32),
        ],
    ),
}
PRODUCT_OF = {
    None: Product("linear", "bf16", BF16, OUT, IN),
    "int8@cuda": Product("matmul", "int8", BF16, OUT, IN),
    "int8-zeros@cuda": Product("matmul", "int8-zeros", BF16, OUT, IN),
    "fp8-block@cuda": Product("matmul", "e4m3-block", BF16, OUT, IN),
    "int4@cuda": Product("quantized_linear", "int4-g128", BF16, OUT, IN),
    "int4-fp8@cuda": Product("quantized_linear", "int4-e4m3-g128", BF16, OUT, IN),
}


def call(scheme, num_tokens, choices=BY_RULE, *, with_bias=False, workspace=True, misaligned=False):
    """The bound call of a step on meta tensors, which are no CPU's either."""
    op, shapes = STEPS[scheme]
    inputs = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes(num_tokens)]
    if misaligned:
        inputs[0] = torch.empty(num_tokens, IN + 4, dtype=BF16, device="meta")[:, 4:]
    if with_bias:
        inputs.append(torch.empty(OUT, dtype=BF16, device="meta"))
    out = torch.empty(num_tokens, OUT, dtype=BF16, device="meta")
    step = Step(op, tuple(map(str, range(len(inputs)))), ("out",), {"scheme": scheme} if scheme else {})
    kept = torch.empty(1, dtype=torch.uint8, device="meta") if workspace else None
    bound = bind(step, inputs, [out], num_tokens=num_tokens, dtype=BF16, products=Products(choices, kept))
    return bound, inputs, out, kept


def only(product: Product, bucket: int, tactic: Tactic, capability: tuple[int, int] | None = None) -> Choices:
    return Choices({(product, bucket): Timed(tactic, {tactic: 1.0})}, capability=capability)


@pytest.mark.parametrize("with_bias", [False, True])
def test_by_rule(with_bias):
    def kernel(scheme: str | None, num_tokens: int) -> object:
        return call(scheme, num_tokens, with_bias=with_bias)[0].func

    of_torch = _aten.addmm.out if with_bias else _aten.mm.out
    assert kernel(None, 8) is _fk.linear.default
    assert kernel(None, 9) is of_torch
    assert kernel("int4@cuda", 1) is kernel("int4@cuda", 500) is _fk.weight_only_linear.default
    for scheme in ("int8@cuda", "fp8-block@cuda"):
        assert kernel(scheme, 1) is kernel(scheme, 500) is _fk.matmul.default


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scheme", ["int8@cuda", "int8-zeros@cuda", "fp8-block@cuda"])
def test_arguments_of_matmul(scheme, with_bias):
    bound, inputs, out, workspace = call(scheme, 40, with_bias=with_bias)
    x, weight, x_scales, weight_scales, zeros, sums, bias, *rest = bound.args
    residual, out_scale, constant, gated, tactic, given, result = rest
    if scheme == "int8-zeros@cuda":
        assert (zeros, weight, sums) == (inputs[2], inputs[3], inputs[5])
    else:
        assert weight is inputs[2] and zeros is None and sums is None
    assert (x, x_scales) == (inputs[0], inputs[1])
    assert weight_scales.shape == ((OUT,) if scheme.startswith("int8") else (OUT // 128, IN // 128))
    assert bias is (inputs[-1] if with_bias else None)
    assert (residual, out_scale, constant, gated, tactic) == (None, None, True, False, -1)
    assert given is workspace and result is out
    bound, *_ = call(scheme, 40, only(PRODUCT_OF[scheme], 48, Tactic("matmul", 13)))
    assert bound.args[11] == 13


def test_by_choice():
    linear, int4 = PRODUCT_OF[None], PRODUCT_OF["int4@cuda"]
    bound, inputs, _, workspace = call(None, 40, only(linear, 48, Tactic("matmul", 11)))
    assert bound.func is _fk.matmul.default and bound.args[11:13] == (11, workspace)
    assert bound.args[:9] == (*inputs, *(None,) * 7)
    assert call(None, 3, only(linear, 4, TORCH))[0].func is _aten.mm.out
    assert call("int4@cuda", 3, only(int4, 4, Tactic("weight_only_linear", 2)))[0].args[6] == 2
    assert call("int4@cuda", 5, only(int4, 4, Tactic("weight_only_linear", 2)))[0].args[5] == 0
    assert call(None, 40, only(linear, 64, Tactic("matmul", 11)))[0].func is _aten.mm.out, "another bucket"


def test_misaligned_rows_are_torchs():
    choice = only(PRODUCT_OF[None], 48, Tactic("matmul", 11))
    for num_tokens in (3, 40):
        assert call(None, num_tokens, choice, misaligned=True)[0].func is _aten.mm.out


def test_a_gated_product():
    """One kernel where the product is streamed, whatever says so; else two, by way of the second output."""
    product = Product("linear", "bf16", BF16, 2 * OUT, IN, gated=True)

    def bound(num_tokens: int, choices: Choices = BY_RULE, misaligned: bool = False):
        x = torch.empty(num_tokens, IN + 4, dtype=BF16, device="meta")[:, 4:]
        x = x if misaligned else torch.empty(num_tokens, IN, dtype=BF16, device="meta")
        weight = torch.empty(2 * OUT, IN, dtype=BF16, device="meta")
        out, gate_up = (torch.empty(num_tokens, n, dtype=BF16, device="meta") for n in (OUT, 2 * OUT))
        step = Step("linear_silu_mul", ("x", "weight"), ("out", "gate_up"), {})
        kept = torch.empty(1, dtype=torch.uint8, device="meta")
        call = bind(
            step,
            [x, weight],
            [out, gate_up],
            num_tokens=num_tokens,
            dtype=BF16,
            products=Products(choices, kept),
        )
        return call, x, weight, out, gate_up

    for num_tokens, choices in ((8, BY_RULE), (16, only(product, 16, STREAM))):
        call, x, weight, out, _ = bound(num_tokens, choices)
        assert call.func is _fk.linear_silu_mul.default
        assert call.args == (x, weight, True, out)
    by_matmul = only(product, 48, Tactic("matmul", 11))
    for arguments, func in (
        ((9,), _aten.mm.out),
        ((16, only(product, 16, TORCH)), _aten.mm.out),
        ((40, by_matmul), _fk.matmul.default),
        ((3, BY_RULE, True), _aten.mm.out),
    ):
        call, _, _, out, gate_up = bound(*arguments)
        first, second = call.args
        assert first.func is func and second.func is _fk.silu_mul.default
        assert second.args == (gate_up, out)
        assert first.keywords.get("out", first.args[-1]) is gate_up
    for arguments, tactic in (
        ((2000, only(product, 2048, Tactic("matmul", 9), HOPPER)), 9),
        ((2000, Choices(capability=HOPPER)), -1),
    ):
        call, x, weight, out, _ = bound(*arguments)
        assert call.func is _fk.matmul.default
        assert call.args[:2] == (x, weight) and call.args[2:9] == (None,) * 7
        assert call.args[9:12] == (True, True, tactic) and call.args[13] is out
    for num_tokens, func in ((40, _fk.matmul.default), (500, _aten.mm.out)):  # too few for a gate
        first, second = bound(num_tokens, Choices(capability=HOPPER))[0].args
        assert first.func is func and second.func is _fk.silu_mul.default
    assert bound(8, Choices(capability=HOPPER))[0].func is _fk.linear_silu_mul.default


def test_a_gated_product_that_leaves_bytes():
    """With the gate in the product, what it gives lies at the beginning of the room."""
    product = Product("matmul", "e4m3", BF16, 2 * OUT, IN, gated=True)
    byte, per_token = torch.float8_e4m3fn, KINDS["token"]

    def bound(num_tokens: int, choices: Choices):
        def empty(*shape: int, dtype: torch.dtype = byte) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        inputs = [empty(num_tokens, IN), empty(num_tokens, dtype=torch.float32)]
        inputs += [empty(2 * OUT, IN), empty(2 * OUT, 1, dtype=torch.float32)]
        outputs = [empty(num_tokens, OUT), empty(num_tokens, dtype=torch.float32)]
        outputs.append(empty(num_tokens, 2 * OUT, dtype=BF16))
        names = tuple(map(str, range(7)))
        attributes = {"scheme": "fp8@cuda", "per": "token"}
        step = Step("matmul_silu_mul_quant", names[:4], names[4:], attributes)
        products = Products(choices, empty(1, dtype=torch.uint8))
        call = bind(step, inputs, outputs, num_tokens=num_tokens, dtype=BF16, products=products)
        assert [call.args[0].args[0], call.args[0].args[1]] == [inputs[0], inputs[2]]
        return *call.args, outputs

    for num_tokens, choices in (
        (2000, BY_RULE),
        (8, Choices(capability=HOPPER)),
        (1000, Choices(capability=HOPPER)),
        (40, only(product, 48, Tactic("matmul", 9), HOPPER)),
        (2000, Choices(capability=(8, 0))),
    ):
        first, second, (out, scales, room) = bound(num_tokens, choices)
        assert first.func is _fk.matmul.default and first.args[10] is False and first.args[13] is room
        assert second.func is _fk.silu_mul_quant.default
        assert second.args == (room, per_token, out, scales)
    for choices, tactic in (
        (Choices(capability=HOPPER), -1),
        (only(product, 2048, Tactic("matmul", 9), HOPPER), 9),
    ):
        first, second, (out, scales, room) = bound(2000, choices)
        act = first.args[13]
        assert first.args[10] is True and first.args[11] == tactic
        assert act.shape == (2000, OUT) and act.is_contiguous() and act.dtype == BF16
        assert act._base is room and act.storage_offset() == 0
        assert second.func is _fk.quantize.default and second.args == (act, per_token, out, scales)


def test_a_head_of_an_odd_size_is_streamed():
    step = Step("linear", ("x", "weight"), ("out",), {})
    x, weight = (
        torch.empty(3, IN, dtype=BF16, device="meta"),
        torch.empty(1003, IN, dtype=BF16, device="meta"),
    )
    out = torch.empty(3, 1003, dtype=BF16, device="meta")
    bound = bind(step, [x, weight], [out], num_tokens=3, dtype=BF16, products=Products())
    assert bound.func is _fk.linear.default


# --- choosing, with a GPU that is made up -----------------------------------------------------------------


@pytest.fixture
def made_up_gpu(monkeypatch, tmp_path):
    """The device of an H200 that is not there, and the times that were taken on it."""
    taken = []

    class Timer:
        def __init__(self, device: torch.device) -> None:
            assert device == torch.device("cuda", 0)

        def __call__(self, product: Product, num_tokens: int, tactic: Tactic) -> float:
            taken.append((product, num_tokens, tactic))
            return float(-len(taken))  # the last is the fastest

    monkeypatch.setattr(build, "CudaTimer", Timer)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: HOPPER)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return torch.device("cuda", 0), taken


@pytest.mark.parametrize(("scheme", "head"), [(None, None), ("fp8", None), ("int4", "int8")])
def test_an_engines_choices(made_up_gpu, tmp_path, scheme, head):
    device, taken = made_up_gpu
    options = EngineConfig(quantization=scheme, head_quantization=head, max_num_tokens=40, max_num_seqs=4)
    plan = compile_for(PRESETS["llama-3.2-1b"], options, device, BF16)
    reported = []

    def choose(mode: str) -> Choices:
        return choose_tactics(
            plan, options, device, BF16, mode=mode, progress=lambda *report: reported.append(report)
        )

    assert choose("off") == choose("cached") == Choices(capability=HOPPER) and not taken
    full = choose("full")
    assert len(taken) == full.num_timed == len(reported)
    assert reported[-1] == ("timing matrix products", len(taken), len(taken))
    assert (tmp_path / "fastkernels" / FILE_NAME).is_file()
    products = {product for product, _ in full.timed}
    assert {(p.out_size, p.in_size) for p in products} == {
        (3072, 2048),
        (2048, 2048),
        (16384, 2048),
        (2048, 8192),
        (128256, 2048),
    }
    for (product, bucket), timed in full.timed.items():
        assert timed.tactic == tactics_of(product, bucket, HOPPER)[-1]
        assert bucket <= (4 if product.out_size == 128256 else 48)
    before = len(taken)
    for mode in ("cached", "full"):
        assert dict(choose(mode).timed) == dict(full.timed)
    assert len(taken) == before


def test_the_cpu_has_no_choices(monkeypatch):
    monkeypatch.setattr(build, "TacticCache", None)  # not even looked at
    options = EngineConfig()
    plan = compile_model(PRESETS["llama-3.2-1b"])
    assert choose_tactics(plan, options, torch.device("cpu"), torch.float32, mode="full") == BY_RULE


def test_an_unknown_mode_is_refused_by_the_engine(monkeypatch):
    monkeypatch.setenv("FASTKERNELS_TUNE", "fast")
    with pytest.raises(ConfigError, match="FASTKERNELS_TUNE is 'fast'"):
        build.build_engine(build.find_model("demo", random_weights=False), EngineConfig(device="cpu"))


# --- on a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize("scheme", [None, "fp8", "int4"])
def test_a_tuned_engine(monkeypatch, tmp_path, scheme):
    """Tuned, then built again from the cache: the same tactics, so the same bits; and logits as by rule."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ids = list(range(40, 100))

    def logits(mode: str) -> list[torch.Tensor]:
        monkeypatch.setenv("FASTKERNELS_TUNE", mode)
        found = []
        for max_num_tokens in (64, 8):
            with LLM(
                "demo",
                device="cuda",
                dtype="bf16",
                max_num_seqs=4,
                max_num_tokens=max_num_tokens,
                quantization=scheme,
            ) as llm:
                found.append(llm.logits(ids))
                llm.generate([ids, ids[:7]])
        return found

    plain, tuned = logits("off"), logits("full")
    for one, other in zip(plain, tuned, strict=True):
        assert (one - other).norm() <= 0.03 * one.norm()
    for one, other in zip(tuned, logits("cached"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize("product", PRODUCT_OF.values(), ids=str)
def test_the_timer(product):
    """Times of every tactic, which leave its results right."""
    device = torch.device("cuda", torch.cuda.current_device())
    capability = torch.cuda.get_device_capability()
    timer = CudaTimer(device)
    large = Product(product.op, product.weight, BF16, 4 * OUT, 8 * IN)
    gates = product.op == "linear" or product.weight == "e4m3"
    for one in (replace(large, gated=True), large) if gates else (large,):
        for num_tokens in (1024, 64, 1):
            for tactic in tactics_of(one, num_tokens, capability):
                assert 0.5 < timer(one, num_tokens, tactic) < 1000
    x, out = timer._x[0], timer._outputs[0]
    if product.op == "linear":
        expected = reference.linear(x[:1].double(), timer._weights[-1][0].double())
        assert (out[:1] - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.skipif(CUDA_REASON is not None, reason=str(CUDA_REASON))
@pytest.mark.parametrize("scheme", [None, "fp8"])
def test_gates_in_products_give_the_same_logits(scheme, monkeypatch):
    """Of prompts of every kind of tactic, and of what is generated after them."""
    monkeypatch.setattr(tactics, "LEAST_GATED_TOKENS", 1)  # the demo model takes no prompt of so many
    prompts = [list(range(40, 40 + length)) for length in (3, 20, 100, 300)]

    def logits(*disabled: str) -> list[torch.Tensor]:
        options = {"device": "cuda", "dtype": "bf16", "max_num_seqs": 4, "quantization": scheme}
        with LLM("demo", **options, disabled_passes=disabled) as llm:
            params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            outputs = llm.generate(prompts, params)
            assert [len(output.token_ids) for output in outputs] == [8] * len(prompts)
            return [llm.logits(prompt) for prompt in prompts]

    for one, other in zip(logits(), logits("gated_linear", "gated_matmul"), strict=True):
        assert (one - other).norm() <= 0.03 * other.norm()
