"""Preflight on other formats: what a file was taken for, its rows' sizes, and records that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.data.preflight_results import read_bad_lines, read_row_sizes
from internvl_trainer.errors import UserError
from internvl_trainer.stages.preflight import run
from trainer.contexts import context_of
from trainer.data.format_files import FORMATS, MEDIA, conversations, messages_of, write_upstream
from trainer.runs import make_config

pytestmark = pytest.mark.slow


def checked(folder: Path, annotation: Path, **data: Any) -> tuple[Any, dict[str, Any]]:
    """The run's context and preflight.json."""
    datasets = {"rows": {"annotation": str(annotation), "root": str(MEDIA)}}
    context = context_of(make_config(str(folder), data={"train": datasets, **data}), "preflight")
    run(context)
    return context, json.loads((folder / "stages" / "preflight" / "preflight.json").read_text())


@pytest.mark.parametrize("name", ["parquet shards", "webdataset", "messages"])
def test_rows_have_the_sizes_of_upstreams(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    file = next(each for each in FORMATS if each.name == name)
    upstream, _ = checked(tmp_path / "upstream", write_upstream(tmp_path, file.rows))
    context, report = checked(tmp_path / "out", file.write(tmp_path, file.rows))
    assert report["datasets"][0]["takenFor"] == file.taken_for
    assert report["findings"] == []
    expected = read_row_sizes(upstream.config, upstream.storage)
    found = read_row_sizes(context.config, context.storage)
    assert expected is not None
    assert found is not None
    assert found["rows"].tolist() == expected["rows"].tolist()


def test_bad_records_are_named_and_skipped(tmp_path: Path) -> None:
    records = [messages_of(row) for row in conversations()[:4]]
    records[1]["messages"][0]["role"] = "tool"
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(records, indent=1))
    with pytest.raises(UserError) as caught:
        checked(tmp_path / "out", path)
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if '"tool"' in text)
    assert f"{path}:" in str(caught.value)
    assert "messages[0].role: found 'tool'; expected user, assistant or system" in str(caught.value)
    context, report = checked(tmp_path / "skipping", path, badRows="skip", maxBadRows=1)
    (skipped,) = read_bad_lines(context.config, context.storage)["rows"]
    assert skipped < line
    assert report["datasets"][0]["rowsInEpoch"] == 3


def test_each_shard_counts_in_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    file = next(each for each in FORMATS if each.name == "parquet shards")
    pattern = file.write(tmp_path, file.rows)
    _, before = checked(tmp_path / "a", pattern)
    last = sorted(pattern.parent.iterdir())[-1]
    last.write_bytes(sorted(pattern.parent.iterdir())[0].read_bytes())
    _, after = checked(tmp_path / "b", pattern)
    assert before["datasets"][0]["sha256"] != after["datasets"][0]["sha256"]


def test_a_weight_that_gives_no_row_is_refused(tmp_path: Path) -> None:
    rows = str(write_upstream(tmp_path, conversations()[:2]))
    common = {"annotation": rows, "root": str(MEDIA)}
    train = {"often": {**common, "weight": 1}, "never": {**common, "weight": 1e-6}}
    with pytest.raises(UserError, match="dataset 'never' gets none of the 4 rows of an epoch; raise its weight"):
        run(context_of(make_config(str(tmp_path / "out"), data={"train": train}), "preflight"))


def test_half_a_character_in_a_fields_name_is_escaped(tmp_path: Path) -> None:
    row = {**conversations()[0], "\ud800": 1}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    _, report = checked(tmp_path / "out", tmp_path / "rows.jsonl")
    assert [finding["field"] for finding in report["findings"]] == ["\ud800"]
