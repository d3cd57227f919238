"""lm-eval on the engine: its own evaluator over small local tasks of every kind of request."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'fastkernels[lm-eval]'")
pytest.importorskip("datasets", reason="lm-eval's datasets are not installed")

from lm_eval import simple_evaluate  # type: ignore[import,unused-ignore]
from lm_eval.api.instance import Instance  # type: ignore[import,unused-ignore]
from lm_eval.tasks import TaskManager  # type: ignore[import,unused-ignore]

from fastkernels.errors import RequestError
from fastkernels.integrations.lm_eval import FastkernelsLM

pytestmark = pytest.mark.usefixtures("one_thread")

DOCUMENTS = [
    {"question": "def add(a, b):\n    return a", "choices": [" + b", " banana", " %% ("], "answer": 0},
    {"question": "import os\nimport", "choices": [" ]]", " sys", " return"], "answer": 1},
    {"question": "for i in", "choices": [" range(10):", ":::", " def"], "answer": 0},
    {"question": "class A:\n    def __init__(", "choices": ["42", "self", "import"], "answer": 1},
]
TASKS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\n"
    "doc_to_target: answer\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n",
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{question}}'\n"
    "metric_list:\n  - metric: bits_per_byte\n",
    "until": "output_type: generate_until\ndoc_to_text: '{{question}}'\n"
    "doc_to_target: '{{choices[answer]}}'\n"
    'generation_kwargs:\n  until: ["\\n"]\n  max_gen_toks: 12\nmetric_list:\n  - metric: exact_match\n',
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "docs.json").write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name, body in TASKS.items():
        (folder / f"{name}.yaml").write_text(
            f"task: fk_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files: {folder / 'docs.json'}\n"
            f"test_split: train\n{body}"
        )
    return folder


@pytest.fixture(scope="module")
def lm(one_thread: None):
    lm = FastkernelsLM("demo", device="cpu", batch_size=4, max_length=256)
    yield lm
    lm.llm.close()


def logprob(lm: FastkernelsLM, context: str, continuation: str) -> tuple[float, bool]:
    begin = lm.llm.tokenizer.encode(context) if context else [lm.prefix_token_id]
    ids = lm.llm.tokenizer.encode(context + continuation)
    assert ids[0] == lm.prefix_token_id  # which the demo's tokenizer puts before every text
    logits = lm.llm.logits(ids[:-1])[len(begin) - 1 :]
    targets = torch.tensor(ids[len(begin) :])
    taken = logits.log_softmax(-1).gather(1, targets[:, None])
    return taken.sum().item(), bool((logits.argmax(-1) == targets).all())


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, 0) for one in arguments]


@pytest.mark.timeout(300)
def test_the_harness_over_local_tasks(lm, tasks, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    names = [f"fk_{name}" for name in TASKS]
    found = simple_evaluate(
        model=lm, tasks=names, task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )  # fmt: skip
    scores = [
        [logprob(lm, document["question"], choice)[0] for choice in document["choices"]]
        for document in DOCUMENTS
    ]
    for sample, expected in zip(found["samples"]["fk_choice"], scores, strict=True):
        responses = [response[0][0] for response in sample["resps"]]
        assert responses == pytest.approx(expected, abs=1e-3)
    right = [
        row.index(max(row)) == document["answer"] for row, document in zip(scores, DOCUMENTS, strict=True)
    ]
    assert found["results"]["fk_choice"]["acc,none"] == sum(right) / 4 >= 0.75
    nats = [logprob(lm, "", document["question"])[0] for document in DOCUMENTS]
    size = sum(len(document["question"]) for document in DOCUMENTS)
    bits = -sum(nats) / size / math.log(2)
    assert found["results"]["fk_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    for sample, document in zip(found["samples"]["fk_until"], DOCUMENTS, strict=True):
        (text,) = sample["resps"][0]
        assert "\n" not in text
        assert (lm.llm.generate(document["question"])[0].text + "\n").startswith(text)


def test_likelihoods(lm):
    pairs = [("def f(x):", " return x"), ("", "import os"), ("a = 1", "\nb = 2\n"), ("x", "")]
    found = lm.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
    for one, pair in zip(found[:3], pairs, strict=False):
        expected = logprob(lm, *pair)
        assert one[0] == pytest.approx(expected[0], abs=1e-3) and one[1] is expected[1]
    assert found[3] == (0.0, True)
    greedy = lm.llm.generate("def fibonacci(n):")[0].text
    assert lm.loglikelihood(instances("loglikelihood", ("def fibonacci(n):", greedy[:20])))[0][1] in (
        True,
        False,
    )


def test_a_context_too_long_loses_its_beginning(lm):
    text = "def walk(folder):\n    return [name for name in folder]\n" * 60
    ids = lm.tok_encode(text, add_special_tokens=False)
    assert len(ids) > 2 * lm.max_length
    (found,) = lm._loglikelihood_tokens([(None, ids[:-3], ids[-3:])], disable_tqdm=True)
    kept = ids[-lm.max_length - 1 :]
    (expected,) = lm.llm.prompt_logprobs([kept], [len(kept) - 3])
    assert found[0] == pytest.approx(expected.logprobs.sum().item(), abs=1e-3)
    with pytest.raises(
        RequestError, match=f"a continuation has 300 tokens; the context takes {lm.max_length}"
    ):
        lm._loglikelihood_tokens([(None, ids[:3], ids[:300])], disable_tqdm=True)
    (rolling,) = lm.loglikelihood_rolling(instances("rolling", (text,)), disable_tqdm=True)
    windows = [[lm.prefix_token_id, *ids[: lm.max_length]]]
    for begin in range(lm.max_length, len(ids), lm.max_length):
        end = min(begin + lm.max_length, len(ids))
        windows.append(ids[end - lm.max_length - 1 : end])
    counts = [lm.max_length] * (len(windows) - 1) + [(len(ids) - 1) % lm.max_length + 1]
    scored = lm.llm.prompt_logprobs(windows, [len(w) - n for w, n in zip(windows, counts, strict=True)])
    assert rolling == pytest.approx(sum(one.logprobs.sum().item() for one in scored), rel=1e-5)


def test_generation_options(lm):
    plain = lm._params({"until": ["\n\n", "<|endoftext|>"], "max_gen_toks": 7})
    assert (plain.temperature, plain.max_tokens) == (0.0, 7)
    names = {
        lm.llm.tokenizer.decode([i], skip_special_tokens=False): i for i in lm.llm.tokenizer.special_token_ids
    }
    name, token_id = next(iter(names.items()))
    special = lm._params({"until": ["\n", name]})
    assert (special.stop, special.stop_token_ids) == (("\n",), (token_id,))
    sampled = lm._params({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "until": "x"})
    assert (sampled.temperature, sampled.top_p, sampled.stop) == (0.7, 0.9, ("x",))
    assert lm._params({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    assert lm._params({"do_sample": True}).temperature == 1.0
    texts = lm.generate_until(
        instances("generate_until", ("def f(", {"until": [")"]}), ("import", {"max_gen_toks": 3})),
        disable_tqdm=True,
    )
    assert ")" not in texts[0] and len(lm.tok_encode(texts[1], add_special_tokens=False)) == 3


@pytest.mark.timeout(300)
def test_the_command_line(tasks, tmp_path):
    """With options of the engine among the model's arguments."""
    command = [sys.executable, "-m", "fastkernels.integrations.lm_eval", "--model", "fastkernels"]
    command += ["--model_args", "pretrained=demo,quantization=int8-weight,max_seq_len=128", "--device", "cpu"]
    command += ["--tasks", "fk_choice", "--include_path", str(tasks), "--batch_size", "4"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "fk_choice" in done.stdout and "acc" in done.stdout
