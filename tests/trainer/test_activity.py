"""What a stage says it is doing, before, during and after a download."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import internvl_trainer.train
from internvl_api import constants
from internvl_trainer.artifacts.download_progress import announced, told_to
from internvl_trainer.metrics import Reporter


def test_after_a_download_the_stage_does_again_what_it_did_before(tmp_path: Path) -> None:
    """Otherwise the operator would hold an index that takes long for a download that hangs."""
    reporter = Reporter("team/run", "train")
    heard: list[str | None] = []

    def listen(text: str | None) -> None:
        reporter.downloading(text)
        heard.append(reporter.progress.detail)

    reporter.doing("indexing the data")
    with told_to(listen):
        with announced("s3://data/rows.jsonl", tmp_path, 4_100):
            pass
        assert heard[0] == "downloading s3://data/rows.jsonl: 0.0 kB of 4.1 kB"
        assert reporter.progress.detail == "indexing the data"
        reporter.update(detail="training")
        with announced("s3://data/photo.tar", tmp_path, 0):
            pass
    assert reporter.progress.detail == "training"


def test_a_download_before_anything_else_leaves_a_stage_that_starts() -> None:
    reporter = Reporter("team/run", "train")
    reporter.downloading("downloading s3://data/rows.jsonl")
    reporter.downloading(None)
    assert reporter.progress.detail == "starting"


def _activities(folder: Path) -> Iterator[tuple[str, ast.expr]]:
    """File and first argument of every `doing(...)` below a folder; of an f-string, its first part."""
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "doing":
                said = node.args[0]
                first = said.values[0] if isinstance(said, ast.JoinedStr) else said
                yield path.name, first.value if isinstance(first, ast.FormattedValue) else first


def test_training_says_what_it_is_doing_in_the_words_that_the_operator_knows() -> None:
    """A word of its own would have no progress deadline, whatever hangs behind it."""
    found = list(_activities(Path(internvl_trainer.train.__file__).parent))
    assert len(found) > 10
    unknown = [(name, ast.unparse(said)) for name, said in found if not hasattr(constants, getattr(said, "id", ""))]
    assert unknown == []
