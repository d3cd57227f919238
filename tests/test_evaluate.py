"""``fastkernels evaluate``: its figures against plain ones, and what it advises."""

import json
import math

import pytest
from torch.nn import functional as F
from typer.testing import CliRunner

from fastkernels import LLM
from fastkernels.cli import app
from fastkernels.errors import RequestError
from fastkernels.evaluate import evaluate_model, histogram, layers_to_exclude, save_histogram
from fastkernels.quantize.calibration import evaluation_windows
from fastkernels.quantize.run import quantize_checkpoint
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "short.txt").write_text("import os\n" * 50)  # whose perplexity nobody looks at
    quantize_checkpoint(
        "demo",
        folder / "out",
        scheme="int8-weight",
        exclude=["model.layers.4.*"],
        text=folder / "short.txt",
        device="cpu",
        sequence_length=256,
    )
    return folder / "out"


def test_figures_are_those_of_the_logits(quantised):
    found = evaluate_model(quantised, against="demo", device="cpu", most_windows=1)
    assert found.comparison is not None
    with LLM("demo", device="cpu") as demo, LLM(quantised, device="cpu") as own:
        row = evaluation_windows(demo.tokenizer).token_ids[0]
        exact, rounded = (F.log_softmax(llm.logits(row[:-1].tolist()).double(), -1) for llm in (demo, own))
    divergence = (exact.exp() * (exact - rounded)).sum(-1)
    assert found.num_tokens == 1024
    assert found.perplexity == pytest.approx(math.exp(F.nll_loss(rounded, row[1:]).item()), rel=1e-5)
    other = found.comparison
    assert other.perplexity == pytest.approx(math.exp(F.nll_loss(exact, row[1:]).item()), rel=1e-5)
    assert other.perplexity_growth == pytest.approx(found.perplexity / other.perplexity - 1, abs=1e-9)
    assert other.kl_mean == pytest.approx(divergence.mean().item(), rel=0.02)
    assert other.kl_99_9 == pytest.approx(divergence.quantile(0.999).item(), rel=0.02)
    agreement = (exact.argmax(-1) == rounded.argmax(-1)).double().mean().item()
    assert other.top1_agreement == pytest.approx(agreement) and agreement > 0.95
    assert len(other.layer_errors) == 10 and other.layer_errors[4] == 0
    assert all(0 < error < 0.05 for index, error in enumerate(other.layer_errors) if index != 4)
    assert "Nothing needs to be left out" in other.advice


def test_a_model_against_itself():
    other = evaluate_model("demo", against="demo", device="cpu", most_windows=1).comparison
    assert other is not None
    assert (other.perplexity_growth, other.top1_agreement, max(other.layer_errors)) == (0, 1, 0)
    assert abs(other.kl_mean) < 1e-6


def test_the_command(quantised, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(
        "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n" * 5
    )
    arguments = ["evaluate", str(quantised), "--text", str(text), "--device", "cpu"]
    alone = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert alone["comparison"] is None and 1 < alone["perplexity"] < 100
    result = CliRunner().invoke(app, [*arguments, "--against", "demo"])
    assert result.exit_code == 0, result.output
    for words in ("perplexity", "top-1 agreement", "99.9th percentile", "layer   9", "Nothing needs"):
        assert words in result.stdout


def test_which_layers_to_exclude():
    errors = [0.1] * 8
    assert layers_to_exclude(errors) == () and layers_to_exclude([]) == ()
    errors[5], errors[2] = 0.4, 0.3
    assert layers_to_exclude(errors) == ("model.layers.5.*", "model.layers.2.*")
    assert histogram(errors).splitlines()[5] == f"layer   5   0.4000 {'█' * 40}"


def test_the_png(tmp_path):
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        with pytest.raises(RequestError, match="a PNG needs matplotlib, which is not installed"):
            save_histogram([0.1, 0.2], tmp_path / "layers.png")
        return
    save_histogram([0.1, 0.2], tmp_path / "layers.png")
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")


def test_models_of_other_vocabularies_are_refused(tmp_path):
    folder = make_checkpoint(tmp_path, "llama")
    with pytest.raises(RequestError, match="has no tokenizer, which a text needs"):
        evaluate_model(folder, device="cpu")
    with pytest.raises(RequestError, match=r"has 4096 tokens and .* 1003; only models of one vocabulary"):
        evaluate_model("demo", against=folder, device="cpu", most_windows=1)


def test_a_png_needs_a_model_to_compare_with():
    result = CliRunner().invoke(app, ["evaluate", "demo", "--png", "layers.png"])
    assert result.exit_code == 2
    assert "--png shows layers beside another model's; name it with --against" in result.stderr
