"""Annotation files of every format to questions, and what is said of bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from internvl_api.spec.evaluation import TASK_DEFAULTS, EvaluationTask
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.tasks import OpenTask, open_task, with_marks

CAPTION = TASK_DEFAULTS["caption"].prompt


def opened(folder: Path, content: Any, kind: str = "caption", name: str = "rows.jsonl", **fields: Any) -> OpenTask:
    """A task over a file: rows as JSONL, anything else as one JSON document, text as it is."""
    path = folder / name
    if isinstance(content, str):
        path.write_text(content)
    elif name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        path.write_text(json.dumps(content))
    return open_task("mine", EvaluationTask.model_validate({"task": kind, "annotation": str(path), **fields}))


def talk(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**fields, "conversations": turns}


COCO = {
    "images": [{"id": 391895, "file_name": "val2014/a.jpg"}, {"id": 7, "image": "b.jpg"}],
    "annotations": [
        {"id": 1, "image_id": 7, "caption": "a cat"},
        {"id": 2, "image_id": 391895, "caption": "a dog"},
        {"id": 3, "image_id": 7, "caption": "the cat"},
    ],
}
KARPATHY = [{"image": "val2014/a.jpg", "caption": ["a dog", "dogs"]}, {"image": "b.jpg", "caption": "a cat"}]
VQA = {"image": "a.jpg", "question": "what?", "question_id": 5, "answer": "this"}
REFCOCO = {"image": "a.jpg", "sent": "left dog", "bbox": [20.0, 10.0, 100.0, 50.0], "width": 200, "height": 100}
TALKS = [
    talk("<image>\ndescribe", "a dog", image="a.jpg", id=3),
    talk("<image>\ndescribe", "a cat", image="b.jpg"),
    talk("<image>\ndescribe", "dogs", image="a.jpg", id=4),
]


@pytest.mark.parametrize(
    ("content", "kind", "name", "wanted"),
    [
        pytest.param(
            COCO,
            "caption-coco",
            "coco.json",
            [(391895, "val2014/a.jpg", CAPTION, ("a dog",)), (7, "b.jpg", CAPTION, ("a cat", "the cat"))],
            id="COCO, NoCaps, Flickr30K",
        ),
        pytest.param(
            json.dumps(COCO, indent=2),
            "caption",
            "coco.json",
            [(391895, "val2014/a.jpg", CAPTION, ("a dog",)), (7, "b.jpg", CAPTION, ("a cat", "the cat"))],
            id="COCO over many lines",
        ),
        pytest.param(
            KARPATHY,
            "caption-coco",
            "karpathy.json",
            [("val2014/a.jpg", "val2014/a.jpg", CAPTION, ("a dog", "dogs")), ("b.jpg", "b.jpg", CAPTION, ("a cat",))],
            id="Karpathy's list",
        ),
        pytest.param(
            TALKS,
            "caption",
            "rows.jsonl",
            [(3, "a.jpg", "<image>\ndescribe", ("a dog", "dogs")), ("b.jpg", "b.jpg", "<image>\ndescribe", ("a cat",))],
            id="conversations, two of one image",
        ),
        pytest.param(
            [talk("look", "a dog", image="a.jpg"), talk("say more", "a big dog", image="a.jpg")],
            "caption",
            "rows.jsonl",
            [("a.jpg", "a.jpg", "look", ("a dog",)), ("a.jpg", "a.jpg", "say more", ("a big dog",))],
            id="two questions on one image stay two",
        ),
        pytest.param(
            [VQA, {**VQA, "answer": None, "answers": [{"answer": "x"}, {"answer": "y"}]}],
            "vqa",
            "rows.jsonl",
            [
                (5, "a.jpg", "what? Answer the question using a single word or phrase.", ("this",)),
                (5, "a.jpg", "what? Answer the question using a single word or phrase.", ("x", "y")),
            ],
            id="upstream's VQA rows",
        ),
        pytest.param(
            [VQA],
            "vqa",
            "no-extension",
            [(5, "a.jpg", "what? Answer the question using a single word or phrase.", ("this",))],
            id="a list of one row",
        ),
        pytest.param(
            [REFCOCO],
            "grounding",
            "rows.jsonl",
            [
                (
                    "a.jpg",
                    "a.jpg",
                    "Please provide the bounding box coordinate of the region this sentence describes: "
                    "<ref>left dog</ref>",
                    ("<box>[[100, 100, 500, 500]]</box>",),
                )
            ],
            id="upstream's RefCOCO rows",
        ),
    ],
)
def test_formats(tmp_path: Path, content: Any, kind: str, name: str, wanted: list[Any]) -> None:
    task = opened(tmp_path, content, kind, name)
    found = [(each.id, each.media.image_value(), each.text, each.references) for each in task.questions]
    assert found == wanted


@pytest.mark.parametrize(
    ("row", "prompt", "wanted"),
    [
        pytest.param(TALKS[0], None, "<image>\ndescribe", id="the row's own"),
        pytest.param(TALKS[0], "Say it.", "<image>\nSay it.", id="the task's goes before it"),
        pytest.param(TALKS[0], "{} In a word.", "<image>\ndescribe In a word.", id="around the row's own"),
        pytest.param(VQA, "Q: {} A:", "<image>\nQ: what? A:", id="around the bare question"),
        pytest.param(KARPATHY[1], None, f"<image>\n{CAPTION}", id="the kind's, where the row has none"),
        pytest.param(
            talk("<image><image>both?", "yes", image=["a.jpg", "b.jpg"]),
            "Same?",
            "<image>\n<image>\nSame?",
            id="several images",
        ),
        pytest.param(talk("hello", "yes"), None, "hello", id="no image"),
    ],
)
def test_what_is_asked(tmp_path: Path, row: dict[str, Any], prompt: str | None, wanted: str) -> None:
    (question,) = opened(tmp_path, [row], prompt=prompt).questions
    assert with_marks(question, len(question.media.images)) == wanted


def test_a_system_turn_is_kept(tmp_path: Path) -> None:
    row = talk("hello", "yes")
    row["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    (question,) = opened(tmp_path, [row]).questions
    assert (question.system, question.text) == ("Be brief.", "hello")


def test_only_the_first_rows_with_all_their_references(tmp_path: Path) -> None:
    (question,) = opened(tmp_path, TALKS, limit=1).questions
    assert question.references == ("a dog", "dogs")


def test_lengths_of_answers(tmp_path: Path) -> None:
    usual, own = opened(tmp_path, TALKS), opened(tmp_path, TALKS, minNewTokens=0, maxNewTokens=7)
    assert (usual.min_new_tokens, usual.max_new_tokens) == (8, 30)
    assert (own.min_new_tokens, own.max_new_tokens) == (0, 7)


def without(field: str, row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != field}


@pytest.mark.parametrize(
    ("content", "kind", "name", "reason", "message"),
    [
        pytest.param(
            '{"image": "a.jpg", "caption": "x"}\n\n{"image": \n',
            "caption",
            "rows.jsonl",
            "InvalidJson",
            "rows.jsonl:3: not valid JSON: Expecting value (column 11)",
            id="a broken line",
        ),
        pytest.param(
            '{\n "images": [\n',
            "caption",
            "coco.json",
            "InvalidJson",
            "coco.json:3: not valid JSON: Expecting value (column 1)",
            id="a document that is cut",
        ),
        pytest.param("\n", "caption", "rows.jsonl", "AnnotationEmpty", "rows.jsonl: the annotation file", id="empty"),
        pytest.param(
            {"captions": []},
            "caption",
            "coco.json",
            "RowUnknown",
            "coco.json:1: expected one of conversations, question, sent (with bbox) or caption, found captions",
            id="another document",
        ),
        pytest.param(
            [{**KARPATHY[0], "caption": []}],
            "caption",
            "rows.jsonl",
            "ReferencesMissing",
            "rows.jsonl:1: caption: the list is empty",
            id="no reference",
        ),
        pytest.param(
            [KARPATHY[1], {"image": "a.jpg", "caption": " "}],
            "caption",
            "rows.jsonl",
            "ReferenceEmpty",
            'rows.jsonl:2: caption: expected text, found " "',
            id="a blank reference",
        ),
        pytest.param(
            [without("answer", VQA)],
            "vqa",
            "rows.jsonl",
            "ReferencesMissing",
            "rows.jsonl:1: answer: expected an answer to compare with, found none",
            id="a test split without answers",
        ),
        pytest.param(
            [talk("a?", "", image="a.jpg")],
            "caption",
            "rows.jsonl",
            "ReferenceEmpty",
            'rows.jsonl:1: conversations: expected text, found ""',
            id="an empty answer in a conversation",
        ),
        pytest.param(
            {**COCO, "annotations": COCO["annotations"][:1]},
            "caption",
            "coco.json",
            "ReferencesMissing",
            "coco.json: images[0]: id: no annotation has the image_id 391895",
            id="an image without captions",
        ),
        pytest.param(
            {**COCO, "images": COCO["images"][1:]},
            "caption",
            "coco.json",
            "ReferenceUnmatched",
            "coco.json: annotations[1]: image_id: found 391895, the id of no image",
            id="a caption of no image",
        ),
        pytest.param(
            {**COCO, "images": [{"id": 7}, {"id": 391895}]},
            "caption",
            "coco.json",
            "ImageMissing",
            "coco.json: images[0]: expected file_name or image, found neither; is this the file of the pictures? "
            "(and 1 more findings)",
            id="the file of captions only",
        ),
        pytest.param(
            {"images": [{"id": [7], "file_name": "a.jpg"}], "annotations": 5},
            "caption",
            "coco.json",
            "AnnotationInvalid",
            "coco.json: images[0]: expected an object with id and file_name (or image)",
            id="an id that is none",
        ),
        pytest.param(
            "[" * 100_000,
            "caption",
            "coco.json",
            "InvalidJson",
            "coco.json: nested too deeply to be read",
            id="nested without end",
        ),
        pytest.param(
            [{**VQA, "image": "../a.jpg"}],
            "vqa",
            "rows.jsonl",
            "PathLeavesRoot",
            "rows.jsonl:1: image: '../a.jpg' leaves the dataset's root; expected a path below it",
            id="a path that climbs out",
        ),
        pytest.param(
            [without("image", VQA)],
            "vqa",
            "rows.jsonl",
            "ImageInvalid",
            "rows.jsonl:1: image: expected a path",
            id="no image",
        ),
        pytest.param(
            [without("width", REFCOCO)],
            "grounding",
            "rows.jsonl",
            "BoxInvalid",
            "rows.jsonl:1: bbox: expected bbox [x1, y1, x2, y2], width and height, in pixels",
            id="a box without a size to scale it by",
        ),
        pytest.param(
            [talk("where?", "there", image="a.jpg")],
            "grounding",
            "rows.jsonl",
            "BoxMissing",
            "rows.jsonl:1: expected <box>[[x1, y1, x2, y2]]</box> in the reference, found 'there'",
            id="a reference without a box",
        ),
        pytest.param(
            [{"image": "a.jpg", "caption": "x"}],
            "vqa",
            "rows.jsonl",
            "QuestionMissing",
            "rows.jsonl:1: the row has no question for the task; give the task a prompt",
            id="nothing to ask",
        ),
    ],
)
def test_bad_annotations(tmp_path: Path, content: Any, kind: str, name: str, reason: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        opened(tmp_path, content, kind, name)
    assert refused.value.reason == reason
    assert str(refused.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_a_prompt_that_wants_a_question_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the row has no question for \{\} of the task's prompt"):
        opened(tmp_path, COCO, "caption-coco", "coco.json", prompt="{} please")


def test_marks_that_do_not_fit_the_pictures(tmp_path: Path) -> None:
    (question,) = opened(tmp_path, [TALKS[0]], prompt="<image> and <image>").questions
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the question has 2 <image> marks for 1 pictures"):
        with_marks(question, 1)


def test_an_annotation_that_is_not_there(tmp_path: Path) -> None:
    task = EvaluationTask.model_validate({"task": "vqa", "annotation": str(tmp_path / "none.jsonl")})
    with pytest.raises(UserError, match=r"spec\.evaluation\.tasks\.mine\.annotation: found no file"):
        open_task("mine", task)


@pytest.mark.parametrize("field", ["question", "answer"])
def test_half_a_character_is_named(field: str, tmp_path: Path) -> None:
    row = {"image": "a.png", "question": "what", "answer": "a cat"} | {field: "\ud800"}
    with pytest.raises(UserError, match=rf"{field}: found .ud800, half of a surrogate pair"):
        opened(tmp_path, [row], "vqa")
