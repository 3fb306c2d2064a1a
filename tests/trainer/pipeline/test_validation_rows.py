"""The preflight stage looks at data.validation as it looks at the training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import UserError
from internvl_trainer.stages.preflight import run as preflight
from trainer.contexts import context_of
from trainer.runs import GOLDEN, make_config

GOOD = (GOLDEN / "data" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
BAD = '{"image": "images/none.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}'


def check(folder: Path, lines: list[str], **data: Any) -> tuple[str, dict[str, Any]]:
    """The stage's message and its preflight.json, of a run with these held-out rows."""
    held = folder / "held.jsonl"
    held.write_text("\n".join(lines) + "\n", encoding="utf-8")
    validation = {"golden": {"annotation": str(held), "root": str(GOLDEN / "data")}}
    config = make_config(str(folder / "out"), data={"validation": validation, **data})
    storage = open_storage(config.output, field="spec.output")
    message = preflight(context_of(config, "preflight")).message
    return message, json.loads(storage.read("stages/preflight/preflight.json"))


def test_both_kinds_of_rows_are_counted(tmp_path: Path) -> None:
    message, report = check(tmp_path, GOOD[:4])
    assert message == "6 rows an epoch, 4 rows to validate on, in 2 datasets, 0 skipped, 0 warnings"
    assert {each["name"]: each["rowsInEpoch"] for each in report["datasets"]} == {"golden": 6, "validation/golden": 4}


def test_a_bad_held_out_row_stops_the_run_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"held\.jsonl:2: image: images/none\.png is not below"):
        check(tmp_path, [GOOD[0], BAD])


def test_a_bad_held_out_row_can_be_skipped(tmp_path: Path) -> None:
    _, report = check(tmp_path, [GOOD[0], BAD], badRows="skip", maxBadRows=1)
    assert report["skippedLines"] == {"validation/golden": [2]}


def test_held_out_rows_that_are_all_bad_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"spec\.data\.validation: no row is left in it"):
        check(tmp_path, [BAD], badRows="skip", maxBadRows=1)
