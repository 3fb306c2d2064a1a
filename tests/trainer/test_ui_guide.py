"""The Python of docs/guides/ui-dataset.md, run as it stands on one drawn screen."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

PAGE = Path(__file__).parents[2] / "docs/guides/ui-dataset.md"


def test_the_guide_draws_the_expected_box_and_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ui-dataset/test").mkdir(parents=True)
    Image.new("RGB", (200, 100), "white").save(tmp_path / "ui-dataset/test/1.png")
    rows = tmp_path / "artifacts/predictions/evaluate/boxes.jsonl"
    rows.parent.mkdir(parents=True)
    answers = ["<box>[[500, 500, 900, 900]]</box>", "no box"]
    row = {"image": "test/1.png", "references": ["<ref>field</ref><box>[[100, 100, 400, 400]]</box>"]}
    rows.write_text(
        "".join(json.dumps(row | {"prediction": answer}) + "\n" for answer in answers[:1]), encoding="utf-8"
    )
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    drawn = Image.open(tmp_path / "drawn/test/1.png")
    assert drawn.getpixel((20, 25)) == (0, 128, 0), "the left side of the expected box"
    assert drawn.getpixel((100, 70)) == (255, 0, 0), "the left side of the answer's"
    assert drawn.getpixel((5, 5)) == (255, 255, 255)
    rows.write_text(json.dumps(row | {"prediction": answers[1]}) + "\n", encoding="utf-8")
    exec(compile(code, str(PAGE), "exec"), {})
    assert Image.open(tmp_path / "drawn/test/1.png").getpixel((100, 70)) == (255, 255, 255)
