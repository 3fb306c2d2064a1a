import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from golden import DATASET, GOLDEN, ROWS, chat_row, checkpoint, read_file, settings, tokenizer_of
from internvl_trainer.data.collate import collate
from internvl_trainer.data.dataset_meta import DatasetDescription, read_meta
from internvl_trainer.data.diagnostics import RowError
from internvl_trainer.data.media import fetch_media
from internvl_trainer.data.open_datasets import describe_datasets
from internvl_trainer.data.row_schema import MediaFile
from internvl_trainer.data.sample import Sample, build_sample
from internvl_trainer.errors import UserError
from trainer.runs import make_config

IMAGES = ["images/wide.png", "images/tall.png", "images/square.jpg"]


def row(image: object, question: str = "<image>\nwhat", **more: object) -> dict[str, object]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}]
    return {"conversations": turns, **({} if image is None else {"image": image}), **more}


def build(content: dict[str, object], dataset: DatasetDescription = DATASET, **options: object) -> Sample:
    rng = options.pop("rng", None)
    return build_sample(
        chat_row(content),
        dataset,
        settings("Hermes-2", **options),
        tokenizer_of(checkpoint("qwen2")),
        read_file,
        rng,  # type: ignore[arg-type]
    )


def test_meta_as_upstream_writes_it() -> None:
    text = json.dumps(
        {
            "coco": {
                "root": "data/coco/",
                "annotation": "coco.jsonl",
                "data_augment": True,
                "max_dynamic_patch": 6,
                "repeat_time": 0.5,
                "length": 566747,
            },
            "chat": {"root": "", "annotation": "chat.jsonl", "data_augment": False, "repeat_time": 2, "length": 7},
        }
    )
    assert read_meta(text, "meta.json") == [
        DatasetDescription("coco", "data/coco/", "coco.jsonl", 6, 0.5, True, 566747),
        DatasetDescription("chat", "", "chat.jsonl", None, 2.0, False, 7),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(
            '{"a": {',
            "meta.json:1: not valid JSON: Expecting property name enclosed in double quotes (column 8)",
            id="broken",
        ),
        pytest.param("[]", "meta.json: expected an object of the form {name: {root, annotation, ...}}", id="list"),
        pytest.param(
            "{}", "meta.json: expected an object of the form {name: {root, annotation, ...}}", id="no datasets"
        ),
        pytest.param(
            '{"a": {"root": "x", "annotation": "y"}, "a": {"root": "z", "annotation": "y"}}',
            "meta.json: found 'a' twice; rename or remove one",
            id="one name for two datasets",
        ),
        pytest.param('{"a": 1}', "meta.json: a: expected an object, found int", id="entry is a number"),
        pytest.param(
            '{"a": {"root": "x"}}',
            "meta.json: a.annotation: expected the path of a JSONL file, found nothing",
            id="no annotation",
        ),
        pytest.param('{"a": {"annotation": "x"}}', "meta.json: a.root: expected a path, found nothing", id="no root"),
        pytest.param(
            '{"a": {"root": "x", "annotation": "y", "repeat_time": "2"}}',
            'meta.json: a.repeat_time: expected a number, found "2"',
            id="text for a number",
        ),
        pytest.param(
            '{"a": {"root": "x", "annotation": "y", "repeat_time": 0}}',
            "meta.json: a.repeat_time: expected a number above 0, found 0",
            id="repeat nothing",
        ),
        pytest.param(
            '{"a": {"root": "x", "annotation": "y", "repeat_time": 1.5}}',
            "meta.json: a.repeat_time: above 1 expected a whole number, found 1.5",
            id="one and a half times",
        ),
        pytest.param(
            '{"a": {"root": "x", "annotation": "y", "data_augment": "no"}}',
            'meta.json: a.data_augment: expected true or false, found "no"',
            id="text for a boolean",
        ),
        pytest.param(
            '{"a": {"root": "x", "annotation": "y", "length": true}}',
            "meta.json: a.length: expected a whole number, found true",
            id="boolean for a number",
        ),
        pytest.param(
            '{"a": {"root": "x", "annotation": "y", "max_dynamic_patch": -1}}',
            "meta.json: a.max_dynamic_patch: expected a number above 0, found -1",
            id="negative tiles",
        ),
    ],
)
def test_broken_meta(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_meta(text, "meta.json")
    assert str(caught.value) == message


def test_a_meta_that_is_no_text_is_said_so(tmp_path: Path) -> None:
    meta = tmp_path / "meta.json"
    meta.write_bytes(b'{"\xff": {}}')
    with pytest.raises(UserError) as caught:
        describe_datasets(make_config(str(tmp_path / "out"), data={"meta": str(meta)}))
    assert str(caught.value) == f"{meta}: not valid UTF-8 (byte 2)"


@pytest.mark.parametrize(
    ("repeat_time", "expected"),
    [
        pytest.param(0.5, [0, 1], id="half keeps the first rows"),
        pytest.param(1, [0, 1, 2, 3], id="once"),
        pytest.param(2, [0, 1, 2, 3, 0, 1, 2, 3], id="twice"),
    ],
)
def test_repeat_time(repeat_time: float, expected: list[int]) -> None:
    dataset = dataclasses.replace(DATASET, repeat_time=repeat_time)
    assert dataset.source_rows(4).tolist() == expected


def test_several_images_share_the_tiles_of_one() -> None:
    marks = "<image><image><image>"
    shared = build(row(IMAGES, marks))
    alone = [build(row(path)) for path in IMAGES]
    assert len(shared.tiles) < sum(len(sample.tiles) for sample in alone)
    assert len(shared.tiles) == 3 + 3 + 1  # two of two tiles with a thumbnail, one square


def test_a_datasets_own_number_of_tiles_goes_before_the_runs() -> None:
    assert len(build(row(IMAGES[0])).tiles) == 7
    assert len(build(row(IMAGES[0]), dataclasses.replace(DATASET, max_tiles=2)).tiles) == 3


def test_without_tiling_an_image_is_one_tile() -> None:
    assert build(row(IMAGES[0]), dynamic_tiles=False).tiles.shape == (1, 3, 56, 56)


def test_the_only_image_gets_a_mark_before_the_first_question() -> None:
    marked = build(row(IMAGES[0], "<image>\nwhat"))
    unmarked = build(row(IMAGES[0], "what"))
    assert unmarked.input_ids.tolist() == marked.input_ids.tolist()


def test_a_mark_after_a_system_turn_stays_in_the_question() -> None:
    content = row(IMAGES[0], "what")
    content["conversations"] = [{"from": "system", "value": "be brief"}, *content["conversations"]]  # type: ignore[misc]
    text = tokenizer_of(checkpoint("qwen2")).decode(build(content).input_ids)
    assert "system\nbe brief<|im_end|>" in text
    assert text.index("be brief") < text.index("<img>")


@pytest.mark.parametrize("question", ["<video>\nwhat", "what", "<video>what"])
def test_a_videos_mark_becomes_one_line_a_frame(question: str) -> None:
    sample = build({**row(None, question), "video": "videos/clip.mp4"})
    text = tokenizer_of(checkpoint("qwen2")).decode(sample.input_ids)
    frames = [f"Frame-{number}: <img>{'<IMG_CONTEXT>' * 4}</img>\n" for number in range(1, 6)]
    assert f"user\n{''.join(frames)}what<|im_end|>" in text
    assert len(sample.tiles) == 5


def test_a_text_only_row_has_one_blank_tile() -> None:
    sample = build(row(None, "hello"))
    assert sample.image_flags.tolist() == [0]
    assert (sample.tiles == 255).all()


@pytest.mark.parametrize(
    "image", [pytest.param("", id="text"), pytest.param([], id="list"), pytest.param(None, id="null")]
)
def test_an_empty_image_is_no_image(image: object) -> None:
    sample = build({**row(None, "hello"), "image": image})
    assert sample.image_flags.tolist() == [0]


def test_augmentation_is_decided_by_the_generator_alone() -> None:
    augmented = dataclasses.replace(DATASET, data_augment=True)
    plain = build(row(IMAGES[0]))
    first, again, other = (build(row(IMAGES[0]), augmented, rng=np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.tiles, again.tiles)
    assert (first.tiles != other.tiles).any()
    assert (first.tiles != plain.tiles).any()
    np.testing.assert_array_equal(build(row(IMAGES[0]), rng=np.random.default_rng(1)).tiles, plain.tiles)


@pytest.mark.parametrize(
    ("content", "options", "reason", "message"),
    [
        pytest.param(
            row("images/none.jpg"),
            {},
            "ImageMissing",
            f"image: images/none.jpg is not below {GOLDEN / 'data'}",
            id="missing",
        ),
        pytest.param(
            row(IMAGES[0]),
            {"max_length": 150},
            "ImageTokensCut",
            "conversations: its images need 28 tokens, of which 0 fit in the maximum length 150; "
            "raise the maximum length or lower the maximum number of tiles",
            id="too long for its images",
        ),
    ],
)
def test_rows_that_cannot_be_built(
    content: dict[str, object], options: dict[str, object], reason: str, message: str
) -> None:
    with pytest.raises(RowError) as caught:
        build(content, **options)
    assert [finding.reason for finding in caught.value.findings] == [reason]
    assert str(caught.value) == message


@pytest.mark.parametrize("path", ["../golden.json", "/etc/passwd"])
def test_a_file_outside_of_the_root_is_never_opened(path: str) -> None:
    with pytest.raises(RowError) as caught:
        fetch_media(MediaFile(path, "image"), str(GOLDEN / "data"), read_file)
    assert str(caught.value) == f"image: {path!r} leaves the dataset's root; expected a path below it"


def test_a_batch_is_one_sequence_of_its_rows() -> None:
    samples = [build(ROWS[index], compat="default") for index in (0, 3)]
    text, picture = samples
    context = tokenizer_of(checkpoint("qwen2")).convert_tokens_to_ids("<IMG_CONTEXT>")
    batch = collate(samples, "sample", image_token_id=context)
    end, total = text.length, text.length + picture.length
    assert batch["input_ids"].tolist() == [[*text.input_ids, *picture.input_ids]]
    assert batch["position_ids"].tolist() == [[*range(end), *range(picture.length)]]
    assert batch["row_starts"].tolist() == [0, end, total]
    labels = batch["labels"][0]
    assert labels[end] == -100, "no token of another row predicts a row's first"
    assert batch["supervised"].tolist() == [place for place in range(total - 1) if labels[place + 1] != -100]
    assert (labels[batch["supervised"] + 1] != -100).all()
    assert batch["image_places"].tolist() == (batch["input_ids"][0] == context).nonzero()[:, 0].tolist() != []
    assert batch["pixel_values"].shape == (7, 3, 56, 56), "without the text row's blank tile"
    assert batch["image_flags"].tolist() == [1] * 7
    assert batch["loss_weights"][0, labels != -100].sum() == pytest.approx(2.0)
