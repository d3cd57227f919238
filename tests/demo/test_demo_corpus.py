"""tools/demo_corpus.py: the split is by file, depends on the path alone, and the tokenizer loses nothing."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FIGURES = json.loads((ROOT / "python/fastkernels/demo/heldout.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo_corpus() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo_corpus", ROOT / "tools" / "demo_corpus.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_heldout_files_are_those_the_script_holds_out(demo_corpus: ModuleType) -> None:
    assert len(FIGURES["files"]) == 10
    assert {demo_corpus.part_of(path) for path in FIGURES["files"]} == {"heldout"}


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("test/test_re.py", "tests"),
        ("unittest/test/test_case.py", "tests"),
        ("chunk.py", "heldout"),
        ("fractions.py", "library"),
        ("test.py", "library"),
    ],
)
def test_part_of(demo_corpus: ModuleType, path: str, part: str) -> None:
    assert demo_corpus.part_of(path) == part


def test_read_corpus_leaves_out_tables_and_what_is_not_utf8(demo_corpus: ModuleType, tmp_path: Path) -> None:
    for path, content in (
        ("fractions.py", b"x = 1\n"),
        ("empty.py", b"\n"),
        ("latin.py", b"# \xe9\n"),
        ("encodings/cp1252.py", b"y = 2\n"),
        ("site-packages/other.py", b"z = 3\n"),
        ("notes.txt", b"w = 4\n"),
    ):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    corpus = demo_corpus.read_corpus(tmp_path)
    assert {part: list(texts) for part, texts in corpus.items() if texts} == {"library": ["fractions.py"]}


def test_a_folder_without_python_is_refused(demo_corpus: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no Python files; give the Lib folder of a CPython"):
        demo_corpus.read_corpus(tmp_path)


def test_encoding_a_part_puts_the_end_before_each_file(demo_corpus: ModuleType) -> None:
    texts = {"a.py": "def f(x):\n    return x\n" * 20, "b.py": "class A:\n    pass\n" * 20}
    tokenizer = demo_corpus.train_tokenizer({"library": texts, "tests": {}})
    ids = demo_corpus.encode_part(tokenizer, texts).tolist()
    second = ids.index(0, 1)
    assert ids[0] == 0 and ids.count(0) == 2
    assert tokenizer.decode(ids[1:second]) == texts["a.py"]
    assert tokenizer.decode(ids[second + 1 :]) == texts["b.py"]
