"""Upstream's published figures beside a run's own: of the same model and test set only."""

from __future__ import annotations

import re
from typing import Any

import pytest
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.spec.evaluation import TASK_DEFAULTS
from internvl_trainer.report.page import render_page
from internvl_trainer.report.published import Published, published
from internvl_trainer.report.published_figures import published_figures
from internvl_trainer.report.record import Record, Row

BASE = "hf://OpenGVLab/InternVL-14B-224px"
FLICKR_FT = "hf://OpenGVLab/InternVL-14B-Flickr30K-FT-364px"


def spec_of(source: str = BASE, task: str = "retrieval-flickr30k", **changes: Any) -> dict[str, Any]:
    """An evaluation alone of one task, as the examples have it; `changes` are laid over task and spec."""
    return {
        "model": {"name": "InternVL-14B-224px", "source": source},
        "method": "none",
        "data": {"compat": "upstream"},
        "evaluation": {"tasks": {"flickr": {"task": task, "annotation": "/rows", **changes.pop("test", {})}}},
        "output": "/out",
        **changes,
    }


def answers(pictures: int = 1000, each: int = 5, name: str = "{:010d}.jpg", question: str | None = None) -> list[Row]:
    """Rows of a predictions file."""
    captions = [f"caption {number}" for number in range(each)]
    return [
        {"image": "Images/" + name.format(row), "question": question, "references": captions} for row in range(pictures)
    ]


def record_of(spec: dict[str, Any], rows: list[Row] | None = None, **record: Any) -> Record:
    """The results of a run whose every figure is 0.5."""
    config = resolve(parse_spec(spec), job="team/run", job_uid="uid-1")
    tasks = config.evaluation.tasks
    figures = {name: dict.fromkeys(TASK_DEFAULTS[task.task].metrics, 0.5) for name, task in tasks.items()}
    rows = answers() if rows is None else rows
    filled = {"final": figures, "predictions": dict.fromkeys(tasks, (rows, rows))}
    return Record(config, **{**filled, **record})


def published_of(spec: dict[str, Any], rows: list[Row] | None = None, **record: Any) -> Published:
    """What the report shows for such a run."""
    return published(record_of(spec, rows, **record))


def figures_of(found: Published) -> dict[str, float]:
    """Metric to published figure, of the only block."""
    (block,) = found.blocks
    return {line.metric: line.published for line in block.lines}


def test_a_released_model_on_its_test_set_is_shown_with_the_average_of_the_table() -> None:
    found = published_of(spec_of(FLICKR_FT, image={"tileSize": 364}))
    (block,) = found.blocks
    assert block.heading == "flickr, model"
    assert block.published_for == (
        "OpenGVLab/InternVL-14B-Flickr30K-FT-364px, Flickr30K Karpathy test; internvl_g/README.md"
    )
    assert {line.ours for line in block.lines} == {0.5}
    shown = figures_of(found)
    assert (shown["C_image_to_text_R1"], shown["G_text_to_image_R10"]) == (0.972, 0.9922)
    # upstream's column avg
    assert (round(shown["C, mean of 6 R@k"], 3), round(shown["G, mean of 6 R@k"], 3)) == (0.972, 0.976)
    assert found.reasons == []


@pytest.mark.parametrize(
    ("kinds", "means"),
    [(("retrieval-flickr30k", "retrieval-coco"), [0.866, 0.888]), (("retrieval-flickr30k",), None)],
)
def test_the_average_of_a_table_needs_all_its_test_sets(kinds: tuple[str, ...], means: list[float] | None) -> None:
    spec = spec_of()
    spec["evaluation"] = {"tasks": {kind[-4:]: {"task": kind, "annotation": "/rows"} for kind in kinds}}
    coco = answers(5000, 5, "COCO_val2014_{:012d}.jpg")
    for row in coco[:10]:
        row["references"] = [*row["references"], "one more"]
    rows = {"r30k": (None, answers()), "coco": (None, coco)}
    found = published_of(spec, predictions={name: rows[name] for name in spec["evaluation"]["tasks"]})
    assert found.reasons == []
    together = [block for block in found.blocks if " and " in block.heading]
    if means is None:
        assert together == []
    else:
        (average,) = together
        assert [round(line.published, 3) for line in average.lines] == means
        assert [line.metric for line in average.lines] == ["C, mean of 12 R@k", "G, mean of 12 R@k"]
        assert average.heading == "r30k and coco, model"


def test_captions_are_compared_too() -> None:
    found = published_of(spec_of(task="caption-flickr30k"), answers(question="English caption:"))
    assert figures_of(found)["CIDEr"] == 0.792
    chat = spec_of("hf://OpenGVLab/InternVL2-2B@" + "a" * 40, "caption-coco", image={"maxDynamicPatch": 6})
    chat["model"]["name"] = "InternVL2-2B"
    asked = "Provide a one-sentence caption for the provided image."
    rows = answers(5000, 5, "COCO_val2014_{:012d}.jpg", asked)
    assert figures_of(published_of(chat, rows))["CIDEr"] == 0.793


@pytest.mark.parametrize(
    ("changes", "rows", "reason"),
    [
        ({"test": {"limit": 500}}, answers(500), "limit is 500, so only part of the test set was evaluated"),
        (
            {},
            answers(999),
            "found 999 pictures with 4,995 captions; Flickr30K Karpathy test has 1,000 with 5,000",
        ),
        ({}, answers(each=4), "found 1,000 pictures with 4,000 captions; Flickr30K Karpathy test has 1,000 with 5,000"),
        ({}, answers(name="photo-{}.jpg"), "'photo-0.jpg' is not the name of a picture of Flickr30K Karpathy test"),
        ({}, [], "found 0 pictures with 0 captions; Flickr30K Karpathy test has 1,000 with 5,000"),
        (
            {"data": {}},
            answers(),
            "captions were read in lower case and without punctuation; set data.compat: upstream",
        ),
        ({"image": {"tileSize": 448}}, answers(), "image.tileSize is 448; upstream's figures are with 224"),
        ({"image": {"exif": "apply"}}, answers(), "image.exif is apply; upstream ignores it"),
        (
            {"training": {"maxSeqLength": 64}},
            answers(),
            "training.maxSeqLength is 64; upstream's figures are with 80",
        ),
    ],
)
def test_another_evaluation_has_no_column_but_a_reason(changes: Any, rows: list[Row], reason: str) -> None:
    found = published_of(spec_of(**changes), rows)
    assert found.blocks == []
    assert found.reasons == [f"flickr, model: {reason}"]


@pytest.mark.parametrize(
    ("test", "question", "reason"),
    [
        ({"prompt": "A photo of"}, "A photo of", "the prompt is not 'English caption:'"),
        ({"beams": 3}, "English caption:", "beams is set; upstream's figures are with the default"),
        ({"maxNewTokens": 64}, "English caption:", "minNewTokens or maxNewTokens is not the task's default"),
    ],
)
def test_other_prompts_and_lengths_have_no_column(test: Any, question: str, reason: str) -> None:
    found = published_of(spec_of(task="caption-flickr30k", test=test), answers(question=question))
    assert (found.blocks, found.reasons) == ([], [f"flickr, model: {reason}"])


@pytest.mark.parametrize(
    "spec",
    [
        spec_of("s3://models/InternVL-14B-224px"),
        spec_of("hf://team/InternVL-14B-224px"),
        spec_of(task="retrieval", test={"format": "flickr"}),
        spec_of("hf://OpenGVLab/InternVL-14B-FlickrCN-FT-364px"),
        spec_of() | {"model": {"name": "InternVL-14B-224px", "source": BASE, "adapter": "s3://models/adapter"}},
    ],
    ids=["a copy", "another owner", "own pairs", "another test set", "an adapter"],
)
def test_of_another_model_or_test_set_nothing_is_shown(spec: dict[str, Any]) -> None:
    assert not published_of(spec)


def trained(**changes: Any) -> dict[str, Any]:
    """A run of upstream's recipe for Flickr30K; `changes` are laid over the spec."""
    spec = spec_of(data={"compat": "upstream", "train": {"pairs": {"annotation": "/train", "format": "flickr"}}})
    for name in ("method", "model"):
        del spec[name]
    spec["recipe"] = "internvl-14b-full-flickr"
    spec["evaluation"]["baseline"] = True
    return {**spec, **changes}


def epoch_of(rows: int) -> dict[str, Any]:
    """What preflight says of the training rows."""
    return {"datasets": [{"name": "pairs", "rowsInEpoch": rows}, {"name": "validation/own", "rowsInEpoch": 7}]}


def test_a_recipes_run_is_beside_upstreams_result_of_the_recipe() -> None:
    found = published_of(trained(), preflight=epoch_of(144_990))
    assert found.blocks[0].heading == "flickr, trained model"
    assert figures_of(found)["C_image_to_text_R1"] == 0.972


@pytest.mark.parametrize(
    ("changes", "rows", "reason"),
    [
        ({"training": {"epochs": 3}}, 145_000, "training.epochs is not the recipe's"),
        ({"retrieval": {"hardNegatives": True}}, 145_000, "retrieval is not the recipe's"),
        ({"workers": 2}, 145_000, "the number of pairs in one forward pass (512) is not the recipe's"),
        ({}, 5_000, "an epoch of training has 5,000 rows; upstream's has 145,000"),
        ({}, 150_000, "an epoch of training has 150,000 rows; upstream's has 145,000"),
    ],
)
def test_a_changed_recipe_has_no_column_but_a_reason(changes: Any, rows: int, reason: str) -> None:
    found = published_of(trained(**changes), preflight=epoch_of(rows))
    assert (found.blocks, found.reasons) == ([], [f"flickr, trained model: {reason}"])


def test_the_base_model_of_a_run_is_beside_its_own_figures() -> None:
    spec = trained(image={"tileSize": 224}, training={"epochs": 3})
    figures = dict.fromkeys(TASK_DEFAULTS["retrieval-flickr30k"].metrics, 0.25)
    found = published_of(spec, baseline={"flickr": figures}, final={})
    assert found.blocks[0].heading == "flickr, base model"
    assert figures_of(found)["C_image_to_text_R1"] == 0.947


def text_of(record: Record) -> str:
    """The text of the page."""
    return " ".join(re.sub(r"(?s)<style>.*?</style>|<[^>]+>", " ", render_page(record, {}, [], [])).split())


def test_the_page_has_published_figures_beside_the_runs_own() -> None:
    text = text_of(record_of(spec_of(FLICKR_FT, image={"tileSize": 364})))
    for shown in (
        "Metric Published This run Difference",
        "flickr, model Published: OpenGVLab/InternVL-14B-Flickr30K-FT-364px, Flickr30K Karpathy test",
        "C_image_to_text_R1 0.9720 0.5000 −0.4720",
        "C, mean of 6 R@k 0.9722 0.5000 −0.4722",
    ):
        assert shown in text


def test_the_page_says_why_there_are_no_published_figures() -> None:
    text = text_of(record_of(spec_of(test={"limit": 500}), answers(500)))
    assert "0.9720" not in text
    expected = "No published figures beside flickr, model: limit is 500, so only part of the test set was evaluated."
    assert expected in text
    assert "Published figures" not in text_of(record_of(spec_of("s3://models/own")))


def test_every_figure_has_a_recipe_or_a_model_and_is_a_share() -> None:
    for table in published_figures().tables:
        assert table.model or table.recipe
        for kind in table.figures:
            for metric, figure in table.of(kind).items():
                assert 0 < figure <= (10 if metric == "CIDEr" else 1), (table.source, metric)
