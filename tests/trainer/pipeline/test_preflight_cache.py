"""data.preflight.cache: a second run with the same data and another output checks no row again, and trusts nothing."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from internvl_api.run_config import RunConfig
from internvl_api.validation.violations import SpecError
from internvl_trainer.artifacts.storage import FolderStorage
from internvl_trainer.data.preflight_results import read_row_sizes
from internvl_trainer.stages import row_shards
from internvl_trainer.stages.preflight import run as preflight
from internvl_trainer.stages.preflight_cache import make_room
from internvl_trainer.stages.row_shards import Rows
from trainer.contexts import context_of
from trainer.retrieval.pair_runs import pair_config
from trainer.runs import make_config

ROWS = 40


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """First rows of the shards that were really checked."""
    found: list[int] = []
    real = row_shards.check_shard

    def counted(source: Rows, chosen: Any, span: range) -> row_shards.Shard:
        found.append(span.start)
        return real(source, chosen, span)

    monkeypatch.setattr(row_shards, "check_shard", counted)
    monkeypatch.setattr(row_shards, "SHARD_ROWS", 16)
    monkeypatch.setattr("internvl_trainer.stages.dataset_checks.usable_cpus", lambda: 1)
    return found


def config_of(folder: Path, output: str, **sections: Any) -> RunConfig:
    turns = [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]
    path = folder / "rows.jsonl"
    if not path.exists():
        path.write_text("".join(f"{json.dumps({'conversations': turns, 'n': 1})}\n" for _ in range(ROWS)))
    data = {"train": {"shop": {"annotation": str(path)}}, "preflight": {"cache": str(folder / "cache")}}
    data |= sections.pop("data", {})
    return make_config(str(folder / output), data=data, **sections)


def check(config: RunConfig) -> dict[str, Any]:
    context = context_of(config, "preflight")
    preflight(context)
    report: dict[str, Any] = json.loads(context.storage.read("stages/preflight/preflight.json"))
    return report


def test_another_output_checks_no_row_again(
    tmp_path: Path, checked: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = check(config_of(tmp_path, "one"))
    assert checked == [0, 16, 32]
    with caplog.at_level(logging.INFO):
        second = check(config_of(tmp_path, "two"))
    assert checked == [0, 16, 32]
    assert second["findings"] == first["findings"]
    assert "the results of 40 of 40 rows are in" in caplog.text
    sizes = [read_row_sizes(config, FolderStorage(Path(config.output), field="")) for config in _both(tmp_path)]
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert (sizes[0]["shop"] == sizes[1]["shop"]).all()
    assert sizes[0]["shop"][:, 0].all()


def _both(folder: Path) -> list[RunConfig]:
    return [config_of(folder, output) for output in ("one", "two")]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"training": {"maxSeqLength": 1024}}, id="maximum length"),
        pytest.param({"image": {"maxDynamicPatch": 3}}, id="tiles"),
        pytest.param({"base": "internlm2"}, id="model"),
        pytest.param({"data": {"preflight": {"sample": 40 - 1}}}, id="sample"),
    ],
)
def test_other_settings_are_checked_again(tmp_path: Path, checked: list[int], change: dict[str, Any]) -> None:
    check(config_of(tmp_path, "one"))
    checked.clear()
    if "data" in change:
        change["data"]["preflight"]["cache"] = str(tmp_path / "cache")
    check(config_of(tmp_path, "two", **change))
    assert checked == [0, 16, 32]


def test_another_annotation_at_the_same_place_is_checked_again(tmp_path: Path, checked: list[int]) -> None:
    config = config_of(tmp_path, "one")
    check(config)
    checked.clear()
    path = tmp_path / "rows.jsonl"
    path.write_text(path.read_text().replace("a cat", "a dog"))
    check(config_of(tmp_path, "two"))
    assert checked == [0, 16, 32]


def test_another_namespace_checks_for_itself(tmp_path: Path, checked: list[int]) -> None:
    check(config_of(tmp_path, "one"))
    checked.clear()
    check(config_of(tmp_path, "two").model_copy(update={"job": "others/run"}))
    assert checked == [0, 16, 32]


def test_a_result_that_was_changed_is_not_used(tmp_path: Path, checked: list[int]) -> None:
    check(config_of(tmp_path, "one"))
    checked.clear()
    for path in (tmp_path / "cache").rglob("000000000016.json"):
        path.write_bytes(path.read_bytes().replace(b"UnknownField", b"UnknownFjeld"))
    report = check(config_of(tmp_path, "two"))
    assert checked == [16]
    assert [finding["reason"] for finding in report["findings"]] == ["UnknownField"]


def test_pairs_are_found_again_too(tmp_path: Path, checked: list[int]) -> None:
    for output in ("one", "two"):
        data = {"preflight": {"cache": str(tmp_path / "cache")}}
        preflight(context_of(pair_config(tmp_path, str(tmp_path / output), data=data), "preflight"))
    assert checked == [0, 16]


def test_the_oldest_results_make_room_and_nothing_else_does(tmp_path: Path) -> None:
    for age, name in enumerate(("kept", "old", "newer", "newest")):
        folder = tmp_path / "internvl-preflight" / name
        folder.mkdir(parents=True)
        (folder / "0.json").write_bytes(b"x" * 100)
        os.utime(folder / "0.json", (age, age))
    (tmp_path / "mine.txt").write_bytes(b"x" * 1000)
    make_room(FolderStorage(tmp_path, field=""), kept="kept", most_bytes=200)
    assert sorted(path.parent.name for path in tmp_path.rglob("0.json")) == ["kept", "newest"]
    assert (tmp_path / "mine.txt").exists()


@pytest.mark.parametrize(
    ("cache", "text"),
    [
        ("s3://bucket/out/cache", "in the run's own output, which no other run reads"),
        ("s3://bucket/../else", "without '..'"),
        ("hf://owner/name", "preflight.cache"),
    ],
)
def test_an_address_that_cannot_be_a_cache_is_refused(cache: str, text: str) -> None:
    with pytest.raises(SpecError) as refused:
        make_config("s3://bucket/out", data={"preflight": {"cache": cache}})
    assert text in str(refused.value)
