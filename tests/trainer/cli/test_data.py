"""`internvl-trainer data`: converted rows equal the original, figures, and a page without active content."""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import pytest
from golden import GOLDEN, ROWS, checkpoint
from internvl_trainer.cli import data
from internvl_trainer.data.formats.open_source import open_source
from internvl_trainer.errors import UserError
from rich.console import Console
from trainer.data.format_files import FORMATS
from trainer.report.test_report import Page

MEDIA = GOLDEN / "data"


def run(*arguments: object) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    text = io.StringIO()
    code = data.run(parser.parse_args([str(each) for each in arguments]), Console(file=text, width=300))
    return code, text.getvalue()


def model(annotation: Path, *more: object) -> list[object]:
    sizes = ("--image-size", 56, "--max-tiles", 6, "--video-frames", 5)
    return ["--model", checkpoint("qwen2"), "--annotation", annotation, "--root", MEDIA, *sizes, *more]


def test_convert_writes_upstreams_rows_and_their_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    shards = next(file for file in FORMATS if file.name == "webdataset")
    code, text = run("convert", shards.write(tmp_path, shards.rows), tmp_path / "rows.jsonl")
    assert code == 0
    assert "chat rows in WebDataset shards: 20 rows in" in text
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["conversations"] for row in rows] == [row["conversations"] for row in shards.rows]
    assert (tmp_path / rows[2]["image"]).read_bytes() == (MEDIA / ROWS[2]["image"]).read_bytes()
    assert rows[5]["video"].endswith(".mp4")
    assert open_source(str(tmp_path / "rows.jsonl"), "auto", field="x").taken_for == "chat rows in JSON Lines"


def test_convert_says_which_records_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": []}) + "\n" + json.dumps({"messages": [{"role": "x"}]}))
    code, text = run("convert", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert code == 65
    assert "1 left out" in text
    assert "messages[0].role" in text


@pytest.fixture
def annotation(tmp_path: Path) -> Path:
    """The golden rows, one of them again, an answer that says nothing, and a broken row."""
    empty = {"conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "…"}]}
    evil = {"conversations": [{"from": "human", "value": "<script>alert(1)</script>"}, {"from": "gpt", "value": "no"}]}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, ROWS[0], empty, evil, {"id": 9}]))
    return path


def test_stats_count_repeated_rows_and_empty_answers(annotation: Path) -> None:
    code, text = run("stats", *model(annotation))
    assert code == 65
    cells = {parts[0].strip(): parts for line in text.splitlines() if len(parts := line.strip("│┃ ").split("│")) == 3}
    assert [cell.strip() for cell in cells["Rows"][1:]] == ["10", "1 cannot be used"]
    assert [cell.strip() for cell in cells["Repeated rows"][1:]] == ["1", "lines 7"]
    assert [cell.strip() for cell in cells["Near-empty answers"][1:]] == ["1", "lines 8"]


def test_the_preview_shows_tiles_and_labels_and_runs_nothing(annotation: Path, tmp_path: Path) -> None:
    code, _ = run("preview", *model(annotation, "--out", tmp_path / "page.html"))
    assert code == 65
    page = Page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert page.tags("script") == []
    assert "default-src 'none'" in str(page.tags("meta"))
    assert "<script>alert(1)</script>" in page.text
    assert "Row 2 (line 3): 206 tokens, 8 supervised" in page.text
    assert "<IMG_CONTEXT>×28" in page.text
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.tags("img"))
    spans = [attrs.get("class") for attrs in page.tags("span")]
    assert {"supervised", "plain", "context"} <= set(spans)


@pytest.mark.parametrize("action", ["convert", "preview"])
def test_the_annotation_is_never_overwritten(action: str, annotation: Path) -> None:
    before = annotation.read_bytes()
    words = [annotation, annotation] if action == "convert" else model(annotation, "--out", annotation)
    with pytest.raises(UserError, match="this is a file of the annotation; name another file to write"):
        run(action, *words)
    assert annotation.read_bytes() == before


def test_convert_leaves_out_a_medium_that_no_record_holds(tmp_path: Path) -> None:
    row = {"image": "@record/5/x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    code, text = run("convert", tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert (code, "ImageMissing" in text) == (65, True)


@pytest.mark.parametrize(
    "option", ["--video-frames", "--image-size", "--max-tiles", "--max-length", "--rows", "--shown"]
)
def test_options_that_count_refuse_zero(option: str, annotation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("preview", *model(annotation, "--out", annotation.with_suffix(".html"), option, 0))
    assert f"argument {option}: found 0, expected 1 or more" in capsys.readouterr().err
