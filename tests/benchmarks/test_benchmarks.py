"""The harness on the CPU, the command, and the page rendered from reports."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import activation, engine, gemm, gemm_gated, norm, render, sampling
from benchmarks.__main__ import main
from benchmarks.harness import Case, Ceilings, ResultError, ceilings, close, floor, run_cases
from benchmarks.report import Report, Row
from benchmarks.shapes import shapes_for
from fastkernels import ops

CPU = torch.device("cpu")


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(main)
    return app


def test_an_op_is_measured_beside_floor_and_peer() -> None:
    rows = norm.run(device=CPU, quick=True, only="rms_norm 1 token")
    assert [(row.subject, row.case) for row in rows] == [("rms_norm", "1 token"), ("add_rms_norm", "1 token")]
    for row in rows:
        assert row.us > 0 and row.floor_us > 0 and row.peer_us > 0 and row.peer.startswith("torch ")
        assert row.over_peer == row.us / row.peer_us and row.over_floor == row.us / row.floor_us


def test_floor_is_the_largest_of_its_terms() -> None:
    best = ceilings(CPU)
    assert floor(CPU) == (best.launch_us, "launch")
    assert floor(CPU, num_bytes=1e12) == (pytest.approx(1e6 / best.copy_tb_s), "memory")
    assert floor(CPU, num_bytes=1e3, flops=1e15) == (pytest.approx(1e9 / best.matrix_tflop_s), "matrix")


def silu_case(expect, peers=None) -> Case:
    return Case(
        "silu_mul",
        "tiny",
        torch.float32,
        make=lambda: torch.randn(4, 32),
        ours=lambda x: lambda: ops.silu_mul(x),
        expect=expect,
        num_bytes=768,
        peers=peers or {},
    )


def test_a_wrong_result_fails_and_keeps_the_other_rows() -> None:
    good, bad = silu_case(ops.silu_mul), silu_case(lambda x: ops.silu_mul(x) * 1.01)
    with pytest.raises(
        ResultError, match=r"silu_mul, tiny: ResultError: the result is off by 0\.0099"
    ) as caught:
        run_cases([bad, good], device=CPU, quick=True, only=None)
    assert len(caught.value.rows) == 1
    with pytest.raises(ResultError, match="off by nan"):
        close(torch.tensor([math.nan]), torch.ones(1), "fp32")
    with pytest.raises(ResultError, match="has shape"):
        close(torch.ones(2), torch.ones(1), "fp32")


def test_a_peer_that_fails_is_left_out_and_the_fastest_of_the_others_named(capsys) -> None:
    def broken(x):
        raise ImportError("not here")

    def plain(x):
        return lambda: torch.nn.functional.silu(x[:, :16]) * x[:, 16:]

    def wrong(x):
        return lambda: x[:, :16]

    case = silu_case(ops.silu_mul, {"broken": broken, "plain": plain, "wrong": wrong})
    row = run_cases([case], device=CPU, quick=True, only=None)[0]
    assert row.peer == "plain" and row.others == {}
    err = capsys.readouterr().err
    assert "broken left out: ImportError: not here" in err and "wrong left out: ResultError" in err


def test_command(app, tmp_path) -> None:
    path = tmp_path / "report.json"
    arguments = ["ops", "--device", "cpu", "--quick", "--only", "gelu_mul 1", "--json", str(path)]
    result = CliRunner().invoke(app, [*arguments, "--commit", "abc"])
    assert result.exit_code == 0, result.output
    report = Report.read(path)
    assert [row.case for row in report.rows] == ["1 token", "16 tokens"]
    assert report.commit == "abc" and report.command == "python -m benchmarks ops --quick"
    assert "gelu_mul" in result.stdout and "x floor" in result.stdout
    assert CliRunner().invoke(app, ["ops", "--device", "cpu", "--only", "no such row"]).exit_code == 2
    assert CliRunner().invoke(app, ["ops", "--device", "tpu"]).exit_code == 2


def test_cases_of_a_gpu_have_names_of_their_own(monkeypatch) -> None:
    """On a Hopper GPU that is made up; nothing is computed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(multi_processor_count=132)
    )
    monkeypatch.setattr(gemm, "matmul_workspace", lambda device: None)
    gpu = torch.device("cuda")
    cases = [*gemm._cases(gpu, False), *sampling._cases(gpu, False)]
    for module in (norm, activation):
        cases += module._cases(gpu, False, False)
    names = [(case.subject, case.name) for case in cases]
    assert len(set(names)) == len(names) > 200
    assert all(case.num_bytes > 0 for case in cases)


def test_what_follows_a_gate_is_compared(monkeypatch) -> None:
    """With products of the CPU: ours and the peers give what is expected, and a gate less does not."""

    def product(op, x, weight, x_scales, weight_scales, *rest, gated=False, out_scale=None):
        y = (x.float() * x_scales[:, None]) @ (weight.float() * weight_scales[:, None]).t()
        y = ops.silu_mul(y) if gated else y
        out = rest[-1]
        out.copy_(y if out_scale is None else ops.quantize(y, per="tensor", scales=out_scale)[0])

    monkeypatch.setattr(gemm_gated, "matmul", product)
    shapes = shapes_for(CPU, quick=True)
    for per in ("token", "tensor"):
        case = gemm_gated._byte_case(per, 48, shapes, CPU, torch.empty(0))
        given = case.make()
        expected = case.expect(given)
        for contender in (case.ours, *case.peers.values()):
            case.compare(contender(given)(), expected, "bf16")
        with pytest.raises(ResultError, match="off by"):
            case.compare(case.ours(given)(), expected.roll(1, 1), "bf16")


def test_engines_are_those_the_schemes_make() -> None:
    """Fewer bits, fewer bytes to read in a step."""
    sizes = {str(setup): engine._weight_bytes(setup) for setup in engine.CASES}
    assert len(sizes) == len(engine.CASES)
    of = {name.partition(", ")[2]: size for name, size in sizes.items() if name.startswith("llama-3.1-8b")}
    assert of["int4, head fp8-weight"] < of["int4"] < of["nvfp4"] < of["fp8"] < of[""]


def test_an_engine_that_fails_keeps_the_rows_of_the_others(monkeypatch) -> None:
    def measure(setup, cases, prefills, device, quick) -> engine.Measured:
        if setup.quantization == "nvfp4":
            raise torch.OutOfMemoryError("no memory")
        return engine.Measured(dict.fromkeys(cases, 1000.0), dict.fromkeys(cases, 10.0))

    monkeypatch.setattr(engine, "_measure_ours", measure)
    monkeypatch.setattr(engine, "ceilings", lambda device: Ceilings(4.0, 700.0, 1.0))
    monkeypatch.setattr(engine.engine_peers, "measure", lambda *arguments: {})
    with pytest.raises(ResultError, match="nvfp4: OutOfMemoryError: no memory") as caught:
        engine.run(device=torch.device("cuda"), quick=False, only="llama-3.1-8b")
    wanted = [name for name in engine.CASES if name.model == "llama-3.1-8b" and name.quantization != "nvfp4"]
    assert {row.subject for row in caught.value.rows} == {f"decode step, {setup}" for setup in wanted}


MADE_UP = Report(
    machine="A Machine",
    torch="2.0",
    cuda="13.0",
    fastkernels="0.1",
    commit="abc",
    date="2000-01-01",
    command="python -m benchmarks ops",
    ceilings={"TB/s copy": 4.0},
    rows=(
        Row("norm", "1 token", "cuda", "bf16", 2.0, 1.0, "launch", "torch", 4.0, {"TB/s": 0.123456}),
        Row("norm", "8 | tokens", "cuda", "bf16", 1234.0, others={"slow": 9.0}, note="a note"),
        Row("step", "batch 1", "cuda", "bf16", 5300.0, 3500.0, "memory", extra={"tokens/s": 189.0}),
    ),
)


def test_a_report_is_written_and_read_back(tmp_path) -> None:
    path = tmp_path / "a" / "report.json"
    MADE_UP.write(path)
    first = dataclasses.replace(MADE_UP.rows[0], extra={"TB/s": 0.1235})  # four digits are kept
    assert Report.read(path) == dataclasses.replace(MADE_UP, rows=(first, *MADE_UP.rows[1:]))
    path.write_text('{"machine": 1}')
    with pytest.raises(ValueError, match=r"report\.json is not a report"):
        Report.read(path)


def test_page(tmp_path) -> None:
    MADE_UP.write(tmp_path / "a-machine" / "ops.json")
    render.write(tmp_path, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "## A Machine\n" in page and "A Machine; 2000-01-01; fastkernels 0.1 at abc, torch 2.0." in page
    assert "Again: `python -m benchmarks ops --device cuda --json PATH`." in page
    assert "| case | us | x floor | peer | x peer | note |\n| --- | ---: | --- |" in page
    assert "| 1 token | 2.00 | 2.00 (launch) | 4.00 torch | 0.50 | 0.12 TB/s |" in page
    assert "| 8 \\| tokens | 1,234 | - | - | - | a note |" in page
    assert "| batch 1 | 5.30 | 1.51 (memory) | - | - | 189 tokens/s |" in page and "| case | ms |" in page


def test_the_page_is_that_of_the_kept_reports() -> None:
    reports = render.kept_reports()
    if not reports:
        pytest.skip("no report is kept yet")
    page = render.PAGE.read_text(encoding="utf-8")
    assert page == render.page(reports), "run: python -m benchmarks render"
