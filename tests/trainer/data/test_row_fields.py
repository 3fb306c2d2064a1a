"""What a row says outside of the conversation's known fields is read, or named; nothing is lost silently."""

import json

import pytest
from internvl_trainer.data.row_schema import ChatRow, MediaFile, RowMedia, Turn, parse_chat_row, place_marks

HUMAN, GPT = {"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}


def parse(**fields: object) -> tuple[ChatRow | None, list[str]]:
    row, findings = parse_chat_row(json.dumps({"conversations": [HUMAN, GPT]} | fields).encode(), "rows.jsonl", 7)
    return row, [
        f"{finding.severity}: {finding.field}: {finding.message}".replace("None: ", "") for finding in findings
    ]


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        pytest.param(name, meant, id=name)
        for meant, names in {
            "image": (
                *("images", "Image", "IMAGE", "image_path", "imagePath", "image-file", "img", "imgae", "imag", "photo"),
                *("picture", "image_url", "image_paths", "images_list"),
            ),
            "video": ("videos", "Video", "video_path", "vidoe", "videoUrl"),
            "conversations": ("messages", "conversation", "Conversations", "dialog"),
        }.items()
        for name in names
    ],
)
def test_a_field_that_looks_like_media_or_turns_is_an_error(name: str, meant: str) -> None:
    fields = {name: ["a.jpg"]} | ({"conversations": []} if meant == "conversations" else {})
    row, findings = parse(**fields)
    assert row is None
    assert f"error: {name}: the field is not known; did you mean {meant!r}?" in findings


@pytest.mark.parametrize("name", ["id", "width", "height_list", "source", "image_id", "question_id", "metadata"])
def test_notes_of_published_datasets_are_accepted_in_silence(name: str) -> None:
    assert parse(**{name: "x"})[1] == []


@pytest.mark.parametrize("name", ["weightt", "notes", "caption_model", "score"])
def test_any_other_unknown_field_is_a_warning(name: str) -> None:
    row, findings = parse(**{name: 1})
    assert row is not None
    assert findings == [f"warning: {name}: the field is not known and not read"]


def test_a_foreign_field_beside_the_known_one_is_a_warning() -> None:
    row, findings = parse(image="a.jpg", image_path="/data/a.jpg")
    assert row is not None
    assert findings == ["warning: image_path: the field is not read; 'image' is, and the row has it"]


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_foreign_field_holds_nothing_to_lose(empty: object) -> None:
    assert parse(images=empty, videos=empty)[1] == []


def test_media_in_a_turn_are_an_error() -> None:
    findings = parse(conversations=[HUMAN | {"image": "a.jpg"}, GPT])[1]
    assert findings == [
        "error: conversations[0].image: media belong to the row, not to a turn; move them to the row's 'image'"
    ]


def test_a_turn_in_another_tools_names_gets_a_hint() -> None:
    findings = parse(conversations=[{"role": "user", "content": "what"}, GPT])[1]
    assert findings[0].endswith("(did you mean 'from' where the turn has 'role'?); expected human, gpt or system")
    assert findings[1].endswith("found nothing (did you mean 'value' where the turn has 'content'?)")


def test_the_field_system_is_the_system_turn() -> None:
    row, findings = parse(system="be brief")
    assert findings == []
    assert row is not None
    assert row.turns[0] == Turn("system", "be brief")


@pytest.mark.parametrize(
    ("system", "message"),
    [
        pytest.param(5, "expected text, found a number", id="a number"),
        pytest.param(["be brief"], "expected text, found a list", id="a list"),
        pytest.param("be long", "the row has another system turn in conversations; keep one of the two", id="two"),
        pytest.param("\ud83d", "found \\ud83d, half of a surrogate pair; write the whole character", id="surrogate"),
    ],
)
def test_a_system_field_that_cannot_be_used(system: object, message: str) -> None:
    turns = [{"from": "system", "value": "be brief"}, HUMAN, GPT] if system == "be long" else [HUMAN, GPT]
    row, findings = parse(system=system, conversations=turns)
    assert row is None
    assert findings == [f"error: system: {message}"]


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_system_field_leaves_the_templates_own(empty: object) -> None:
    row, findings = parse(system=empty)
    assert findings == []
    assert row is not None
    assert row.turns[0].role == "human"


def answered(text: str, question: str = "what") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": text}]


@pytest.mark.parametrize(
    ("media", "mark"),
    [pytest.param({"image": "a.jpg"}, "<image>", id="image"), pytest.param({"video": "a.mp4"}, "<video>", id="video")],
)
def test_the_mark_of_a_single_medium_goes_to_the_first_question_when_only_an_answer_has_one(
    media: dict[str, str], mark: str
) -> None:
    row, findings = parse(conversations=answered(f"{mark} a cat"), **media)
    assert findings == [
        f"warning: conversations[1].value: found {mark} in an answer, where it stays text; "
        "media are marked in questions"
    ]
    assert row is not None
    question, answer = place_marks(row.turns, row.media, frames=1)
    assert question.text.endswith("<image>\nwhat")
    assert answer.text == f"{mark} a cat"


def test_marks_in_answers_do_not_count_for_a_list_of_images() -> None:
    row, findings = parse(image=["a.jpg", "b.jpg"], conversations=answered("<image>", "<image>"))
    assert row is None
    assert "error: conversations: 1 <image> marks for 2 images; expected one for each image" in findings


@pytest.mark.parametrize("kind", ["image", "video"])
def test_a_mark_without_media_is_an_error_in_questions_and_answers(kind: str) -> None:
    mark = f"<{kind}>"
    assert parse(conversations=answered("yes", f"{mark} what"))[1] == [
        f"error: conversations: 1 {mark} marks for 0 {kind}s; expected one for each {kind}"
    ]
    assert parse(conversations=answered(mark))[1] == [
        f"error: conversations[1].value: found {mark} in an answer of a row without {kind}; "
        f"add the field {kind!r} or remove the mark"
    ]


def test_a_video_mark_beside_an_image_is_an_error() -> None:
    row, findings = parse(image="a.jpg", conversations=answered("yes", "<video> what"))
    assert row is None
    assert findings == ["error: conversations: 1 <video> marks for 0 videos; expected one for each video"]


def test_marks_in_the_system_field_count_as_they_are_placed() -> None:
    row, findings = parse(image=["a.jpg", "b.jpg"], system="look: <image>", conversations=answered("yes", "<image>"))
    assert findings == []
    assert row is not None
    assert row.media == RowMedia((MediaFile("a.jpg", "image[0]"), MediaFile("b.jpg", "image[1]")))


@pytest.mark.parametrize("empty", ["", "  \n", "\u3000"])
def test_an_empty_answer_is_a_warning(empty: str) -> None:
    row, findings = parse(conversations=answered(empty))
    assert row is not None
    assert findings == ["warning: conversations[1].value: the answer is empty; the row teaches to end the turn at once"]


@pytest.mark.parametrize(
    "mark", ["<Image>", "<ImageHere>", "<|image_1|>", "<|image_pad|>", "<image_placeholder>", "<image/>"]
)
def test_a_mark_of_another_tool_is_a_warning(mark: str) -> None:
    question = {"from": "human", "value": f"<image> and {mark}: what"}
    row, findings = parse(image="a.jpg", conversations=[question, GPT])
    assert row is not None
    message = f"found {mark}, a mark of another tool, which stays text; write <image> or <video>"
    assert findings == [f"warning: conversations[0].value: {message}"]


@pytest.mark.parametrize("text", ["an <img src=x> tag", "images > 3", "<image>"])
def test_other_texts_are_no_marks(text: str) -> None:
    assert parse(image="a.jpg", conversations=[{"from": "human", "value": text}, GPT])[1] == []
