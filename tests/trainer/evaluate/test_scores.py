"""Figures against what the benchmarks' own tools say of the same files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.data.boxes import box_accuracy, find_box, overlap
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate import captions
from internvl_trainer.evaluate.captions import check_tools, score_captions
from internvl_trainer.evaluate.scores import score
from internvl_trainer.evaluate.vqa import exact_match, normalise, vqa_accuracy

CAPTIONS: list[tuple[str, list[str]]] = [
    ("a man riding a wave on top of a surfboard", ["A man rides a wave.", "A surfer on a board; the sea is rough."]),
    ("two dogs are playing in the snow", ["Two dogs play in snow (outside).", "dogs running", "The dogs' game"]),
    ("a café on the street, with people's chairs", ["A cafe, with chairs", "people sit at a café\non a street"]),
    ("a red bus", ["A bus that's red is parked -- next to 3.5 cars!", "red double-decker bus ||| in town"]),
    ("", ["a white plate", "a plate of food on the table"]),
    ("a plate of food on the table with a fork", ["a plate of food on a table"]),
]


@pytest.mark.slow
def test_captions_are_scored_as_cocos_evaluation_scores_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pycocoevalcap import eval as theirs
    from pycocotools.coco import COCO

    images = [{"id": number} for number in range(len(CAPTIONS))]
    wanted = [{"image_id": image, "caption": text} for image, (_, texts) in enumerate(CAPTIONS) for text in texts]
    annotations = [{"id": number, **each} for number, each in enumerate(wanted)]
    results = [{"image_id": image, "caption": text} for image, (text, _) in enumerate(CAPTIONS)]
    (tmp_path / "references.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "results.json").write_text(json.dumps(results))
    truth = COCO(str(tmp_path / "references.json"))
    monkeypatch.setattr(theirs, "Spice", theirs.Rouge)  # it wants a download, and is not among our figures
    evaluation = theirs.COCOEvalCap(truth, truth.loadRes(str(tmp_path / "results.json")))
    evaluation.evaluate()

    totals, rows = score_captions(*zip(*CAPTIONS, strict=True))
    names = {name: name.replace("BLEU", "Bleu") for name in totals}
    assert len(names) == 7
    assert totals == pytest.approx({name: evaluation.eval[other] for name, other in names.items()}, abs=1e-9, rel=0)
    assert totals["CIDEr"] > 0.1
    for number, row in enumerate(rows):
        each = {name: evaluation.imgToEval[number][other] for name, other in names.items()}
        assert row == pytest.approx(each, abs=1e-9, rel=0)


@pytest.mark.slow
def test_captions_are_scored_without_writing_into_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod: its file system is read-only but for a scratch folder."""
    import pycocoevalcap
    from pycocoevalcap.tokenizer import ptbtokenizer

    (package,) = pycocoevalcap.__path__
    before = {path: path.stat().st_mtime_ns for path in [Path(package), *Path(package).rglob("*")] if path.is_dir()}
    monkeypatch.setattr(ptbtokenizer.PTBTokenizer, "tokenize", None)  # the one part of it that would
    monkeypatch.chdir(tmp_path)
    _, (row,) = score_captions(["a cat on a mat"], [["The cat: on a mat."]])
    assert row["ROUGE_L"] == pytest.approx(0.8, abs=0.05)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_line_ends_of_unicode_in_an_answer_part_no_rows() -> None:
    odd = ["one\u2028two", "a dog\r\nand a\x85cat", "a\x0bb"]
    _, rows = score_captions(odd, [[text] for text in odd])
    assert [row["ROUGE_L"] for row in rows] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("hidden", "reason", "message"),
    [
        pytest.param("java", "JavaMissing", "apt-get install default-jre-headless", id="no Java"),
        pytest.param("pycocoevalcap", "ScorerMissing", "internvl-trainer\\[eval\\]", id="no package"),
    ],
)
def test_a_missing_tool(monkeypatch: pytest.MonkeyPatch, hidden: str, reason: str, message: str) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None if name == hidden else f"/usr/bin/{name}")
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None if name == hidden else name)
    with pytest.raises(UserError, match=message) as refused:
        check_tools()
    assert refused.value.reason == reason


def test_references_without_a_word() -> None:
    with pytest.raises(UserError, match=r"spec\.evaluation\.tasks: no reference has a word in it") as refused:
        captions.score_captions(["a cat", "a dog"], [["..."], ["!", "?"]])
    assert refused.value.reason == "ReferenceEmpty"


def test_a_figure_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"prediction": "x", "references": ["y"]}]
    monkeypatch.setattr(
        "internvl_trainer.evaluate.scores.score_captions", lambda *_: ({"CIDEr": float("nan")}, [{"CIDEr": 0.0}])
    )
    with pytest.raises(UserError, match=r"spec\.evaluation\.tasks\.mine: CIDEr is nan") as refused:
        score("mine", "caption", rows)
    assert refused.value.reason == "MetricNotFinite"


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        pytest.param("  The Cat. ", "cat", id="article, period"),
        pytest.param("two", "2", id="a number in words"),
        pytest.param("none", "0", id="none is zero"),
        pytest.param("dont", "don't", id="a contraction"),
        pytest.param("couldnt've", "couldn't've", id="a longer contraction"),
        pytest.param("3.5", "3.5", id="a decimal point stays"),
        pytest.param("1,000 men!", "1000 men", id="thousands"),
        pytest.param("black/white", "black white", id="a slash parts words"),
        pytest.param("yes, it is", "yes it is", id="a comma before a space goes"),
        pytest.param("t-shirt\nblue", "t shirt blue", id="hyphen and line end"),
    ],
)
def test_answers_are_normalised_as_the_vqa_benchmark_does(answer: str, wanted: str) -> None:
    assert normalise(answer) == wanted


@pytest.mark.parametrize(
    ("prediction", "references", "wanted"),
    [
        pytest.param("red", ["red"] * 10, 1.0, id="all agree"),
        pytest.param("red", ["red"] * 3 + ["blue"] * 7, 0.9, id="three of ten"),
        pytest.param("red", ["red"] * 2 + ["blue"] * 8, 0.6, id="two of ten"),
        pytest.param("red", ["red"] + ["blue"] * 9, 0.3, id="one of ten"),
        pytest.param("green", ["red"] * 10, 0.0, id="none"),
        pytest.param("The red.", ["red"] * 10, 1.0, id="normalised"),
        pytest.param("Red", ["red"], 1.0, id="the only reference"),
        pytest.param("red", ["red", "red"], 1.0, id="both of two"),
        pytest.param("red", ["red", "blue", "blue"], 1 / 3, id="one of three"),
    ],
)
def test_vqa_accuracy(prediction: str, references: list[str], wanted: float) -> None:
    assert vqa_accuracy(prediction, references) == pytest.approx(wanted)


def test_exact_match_minds_all_but_case_and_space() -> None:
    assert exact_match(" Red\n", ["blue", "red "]) == 1.0
    assert exact_match("the red", ["red"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        pytest.param("<ref>the block</ref><box>[[0, 0, 100, 100]]</box>", 1.0, id="equal"),
        pytest.param("<box>[[0,0,100,50]]</box>", 1.0, id="just half"),
        pytest.param("<box>[[0, 0, 100, 49]]</box>", 0.0, id="less than half"),
        pytest.param("[50.5, 50.5, 150, 150]", 0.0, id="a corner"),
        pytest.param("<box>[[200, 200, 100, 100]]</box>", 0.0, id="inside out"),
        pytest.param("there is none", 0.0, id="no box"),
        pytest.param("<box>[[0, 0, 100]]</box>", 0.0, id="three numbers"),
        pytest.param("<box>[[500, 500, 600, 600], [0, 0, 100, 100]]</box>", 0.0, id="only the first counts"),
    ],
)
def test_boxes(prediction: str, wanted: float) -> None:
    assert box_accuracy(prediction, ["<box>[[0, 0, 100, 100]]</box>"]) == wanted


def test_overlap_is_intersection_over_union() -> None:
    assert overlap((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(50 / 150)
    assert find_box("<box>[[-1, 2.5, 3, 4]]</box>") == (-1, 2.5, 3, 4)
