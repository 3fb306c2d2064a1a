"""Caption files of the retrieval guides: what is read, and what is said about what cannot be."""

import json
from pathlib import Path

import pytest
from golden import checkpoint
from internvl_trainer.errors import UserError
from internvl_trainer.model.tokenizer import read_tokenizer
from internvl_trainer.retrieval.caption_files import PairRow, read_captions
from internvl_trainer.retrieval.caption_text import encode_caption, normalise_caption

FLICKR = "image,caption\n1000.jpg,Two dogs, one brown, run.\n1000.jpg,Dogs.\n\n36.JPG , A man in a hat.jpg,ok\n"


def write(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "captions"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_flickr(tmp_path: Path) -> None:
    """Commas stay in captions; blank lines count; an id is an image's."""
    found = read_captions(write(tmp_path, FLICKR), "flickr")
    assert found.findings == []
    assert found.rows == [
        PairRow("1000.jpg", 0, "Two dogs, one brown, run.", str(tmp_path / "captions"), 2),
        PairRow("1000.jpg", 0, "Dogs.", str(tmp_path / "captions"), 3),
        PairRow("36.JPG", 1, "A man in a hat.jpg,ok", str(tmp_path / "captions"), 5),
    ]


def test_flickr_cn_from_windows(tmp_path: Path) -> None:
    found = read_captions(write(tmp_path, "\ufeffimage,caption\r\n1.jpg,一只狗\r\n2.jpg,两只猫\r\n"), "flickr")
    assert [row.caption for row in found.rows] == ["一只狗", "两只猫"]
    assert found.findings == []


def test_coco_train_and_test_files(tmp_path: Path) -> None:
    """Training files have a caption a row, test files all captions of an image; both on one line or on many."""
    rows = [
        {"image": "val2014/a.jpg", "caption": "A dog.", "image_id": "coco_522418"},
        {"image": "val2014/b.jpg", "caption": ["A cat.", "Two cats."], "image_id": "coco_7"},
    ]
    wanted = [("val2014/a.jpg", 522418, "A dog."), ("val2014/b.jpg", 7, "A cat."), ("val2014/b.jpg", 7, "Two cats.")]
    for indent, lines in ((None, [1, 1, 1]), (1, [2, 7, 7])):
        found = read_captions(write(tmp_path, json.dumps(rows, indent=indent)), "coco")
        assert [(each.image, each.image_id, each.caption) for each in found.rows] == wanted
        assert [each.line for each in found.rows] == lines
        assert found.findings == []


def test_coco_without_ids_counts_images(tmp_path: Path) -> None:
    rows = [{"image": name, "caption": caption} for name, caption in (("b.jpg", "B"), ("a.jpg", "A"), ("b.jpg", "C"))]
    assert [each.image_id for each in read_captions(write(tmp_path, json.dumps(rows)), "coco").rows] == [0, 1, 0]


TWO = "image,caption\n1.jpg,a\n2.jpg,b\n"


def coco(*rows: object) -> str:
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]"


A = {"image": "a.jpg", "caption": "A", "image_id": 1}
B = {"image": "b.jpg", "caption": "B", "image_id": 2}


@pytest.mark.parametrize(
    ("format", "content", "reason", "line", "message"),
    [
        pytest.param("flickr", TWO + "3.jpg,\n", "CaptionMissing", 4, "3.jpg has no caption", id="no caption"),
        pytest.param("flickr", TWO + "3.jpg, . !\n", "CaptionMissing", 4, "found '. !'", id="punctuation alone"),
        pytest.param("flickr", "1.jpg,a\n2.jpg,b\n", "HeaderMissing", 1, "found '1.jpg,a'; add it", id="no header"),
        pytest.param("flickr", TWO + "just words\n", "InvalidLine", 4, "found 'just words'", id="no image"),
        pytest.param("flickr", TWO.encode() + b"3.jpg,\xff\n", "InvalidEncoding", 4, "not UTF-8", id="encoding"),
        pytest.param("flickr", TWO + "1.jpg,a\n", "CaptionRepeated", 4, "on line 2 already", id="twice"),
        pytest.param("flickr", "image,caption\n", "EmptySplit", None, "split and language", id="empty split"),
        pytest.param("flickr", TWO.replace("2.jpg", "1.jpg"), "OneImage", None, "captions of other", id="one image"),
        pytest.param("flickr", "", "HeaderMissing", 1, "found ''", id="empty file"),
        pytest.param("coco", "[]", "EmptySplit", None, "no captions", id="empty array"),
        pytest.param("coco", TWO, "InvalidJson", 1, "Expecting value", id="flickr as coco"),
        pytest.param("coco", "[{\n\n", "InvalidJson", 3, "complete", id="cut short"),
        pytest.param("coco", '{"images": []}', "InvalidRow", 1, "expected an array", id="an object"),
        pytest.param("coco", "[" * 100_000, "InvalidJson", None, "nested too deeply", id="nested"),
        pytest.param("coco", coco(A, B, 5), "InvalidRow", 4, "found 5", id="no object"),
        pytest.param("coco", coco(A, B, {"image": "c.jpg"}), "CaptionMissing", 4, "c.jpg has no", id="key absent"),
        pytest.param("coco", coco(A, B, A | {"caption": []}), "CaptionMissing", 4, "found []", id="empty list"),
        pytest.param(
            "coco", coco(A, B, B | {"image_id": "x"}), "InvalidImageId", 4, "found 'x'", id="id without number"
        ),
        pytest.param(
            "coco", coco(A, B | {"image_id": "coco_1"}), "ImageIdRepeated", 3, "of a.jpg and of b", id="one id"
        ),
        pytest.param(
            "coco", coco(A, B, B | {"caption": "C", "image_id": 3}), "ImageIdChanged", 4, "ids 2 and 3", id="two ids"
        ),
    ],
)
def test_findings(
    tmp_path: Path, format: str, content: str | bytes, reason: str, line: int | None, message: str
) -> None:
    found = read_captions(write(tmp_path, content), format, name="s3://data/captions")
    assert [(each.reason, each.line, each.file) for each in found.findings] == [(reason, line, "s3://data/captions")]
    assert message in found.findings[0].message
    assert (found.findings[0].severity == "warning") == (reason == "CaptionRepeated")


def test_usable_rows_stay_beside_findings(tmp_path: Path) -> None:
    found = read_captions(write(tmp_path, "1.jpg,a\n2.jpg,\n3.jpg,c\n1.jpg,a\n"), "flickr")
    assert [each.image for each in found.rows] == ["1.jpg", "3.jpg"]
    assert [(each.reason, each.line) for each in found.findings] == [
        ("HeaderMissing", 1),
        ("CaptionMissing", 2),
        ("CaptionRepeated", 4),
    ]


def test_unknown_format_and_absent_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format is 'voc'; expected flickr or coco") as error:
        read_captions(write(tmp_path, TWO), "voc")
    assert error.value.reason == "UnknownFormat"
    with pytest.raises(UserError, match="not there") as error:
        read_captions(tmp_path / "absent", "flickr")
    assert error.value.reason == "AnnotationMissing"


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        pytest.param("Two DOGS run.", "two dogs run", id="case and full stop"),
        pytest.param('A "red" (car): #1; ~fast*!', "a red car 1 fast", id="all that goes"),
        pytest.param("don't stop, half-way?", "don't stop, half-way?", id="all that stays"),
        pytest.param(" a \t b\n", "a b", id="spaces"),
        pytest.param("一只狗。", "一只狗。", id="Chinese"),
        pytest.param(" ".join(map(str, range(60))), " ".join(map(str, range(50))), id="fifty words"),
        pytest.param(r"a\b", r"a\b", id="backslash"),
    ],
)
def test_normalisation(text: str, normalised: str) -> None:
    assert normalise_caption(text) == normalised


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"video": "a.mp4"}, "FieldUnsupported"),
        ({"caption": "a dog \ud800"}, "InvalidText"),
        ({"image": "\ud800.jpg"}, "InvalidText"),
        ({"image_id": "9" * 40}, "InvalidImageId"),
    ],
)
def test_a_row_that_cannot_be_used_is_a_finding(fields: dict[str, str], reason: str, tmp_path: Path) -> None:
    row = {"image": "a.jpg", "caption": "A dog.", "image_id": "coco_1"} | fields
    other = {"image": "b.jpg", "caption": "A cat.", "image_id": "coco_2"}
    found = read_captions(write(tmp_path, json.dumps([row, other])), "coco")
    assert [row.image for row in found.rows] == ["b.jpg"]
    assert reason in [finding.reason for finding in found.findings]


def test_a_file_of_another_kind_gets_the_next_step(tmp_path: Path) -> None:
    lines = write(tmp_path, '{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "caption": "y"}\n')
    assert "; expected one array of" in read_captions(lines, "coco").findings[0].message
    with pytest.raises(UserError, match="is a git-lfs pointer; run `git lfs pull`"):
        read_captions(write(tmp_path, "version https://git-lfs.github.com/spec/v1\n"), "flickr")


def test_special_tokens_in_captions_are_plain_text() -> None:
    tokenizer = read_tokenizer(checkpoint("phi3"))
    ids = encode_caption(tokenizer, "a dog </s> <s> a cat")
    assert [ids.count(tokenizer.bos_token_id), ids.count(tokenizer.eos_token_id)] == [1, 1]
    plain = tokenizer("a dog", add_special_tokens=False).input_ids
    assert encode_caption(tokenizer, "a dog")[1:-1] == plain
