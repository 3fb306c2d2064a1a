"""Each way a row can be broken, and the exact words the user reads."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from golden import DATASET, GOLDEN, checkpoint, read_file, settings, tokenizer_of
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.diagnostics import Finding, errors_of, findings_table
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.media import OpenMedia
from internvl_trainer.data.row_checks import Checker, check_length, check_rows
from rich.console import Console

MEDIA = GOLDEN / "data"
HUMAN, GPT = {"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}


def marked(marks: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": "<image>" * marks + "what"}, GPT]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden media and some broken ones."""
    folder = tmp_path_factory.mktemp("media")
    shutil.copytree(MEDIA, folder, dirs_exist_ok=True)
    photo, clip = (MEDIA / "images" / "photo.jpg").read_bytes(), (MEDIA / "videos" / "clip.mp4").read_bytes()
    (folder / "half.jpg").write_bytes(photo[: len(photo) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "page.jpg").write_text("<html>404</html>")
    (folder / "half.mp4").write_bytes(clip[:600])
    return folder


def checker(root: Path, **changes: object) -> Checker:
    dataset = DatasetDescription("shop", str(root), "rows.jsonl")
    return Checker(
        dataset, settings("Hermes-2", compat="default", **changes), open_media, tokenizer_of(checkpoint("qwen2"))
    )


def check_row(row: object, checker: Checker, folder: Path) -> list[Finding]:
    """Findings of one row (or of a line as it stands) without their place, which is the first line of rows.jsonl."""
    path = folder / "rows.jsonl"
    text = row if isinstance(row, bytes | str) else json.dumps(row)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    findings = check_rows(RowIndex.build(path), checker)
    assert {(finding.file, finding.line) for finding in findings} <= {("rows.jsonl", 1)}
    return [finding.at(None, None) for finding in findings]


ROOT = "{root}"
BROKEN = [
    # shape
    ("InvalidJson", "not valid JSON: Expecting ',' delimiter (column 11)", '{"id": 1  "image": "a"}'),
    ("InvalidJson", "not valid JSON: Expecting value (column 1)", "hello"),
    ("InvalidJson", "not valid UTF-8 (byte 8); convert the file: iconv -t UTF-8", b'{"id": "\xff"}'),
    ("InvalidJson", "nested too deeply to be read", "[" * 100_000),
    ("NotAnObject", "expected a JSON object, found a list", "[1, 2]"),
    ("NotAnObject", "expected a JSON object, found null", "null"),
    (
        "InvalidText",
        "conversations[0].value: found \\ud83d, half of a surrogate pair; write the whole character",
        {"conversations": [{"from": "human", "value": "\ud83d"}, GPT]},
    ),
    ("NotAnObject", "expected a JSON object, found text", '"row"'),
    ("ConversationsMissing", "conversations: expected a list of turns, found nothing", {"id": 1}),
    ("ConversationsMissing", "conversations: expected a list of turns, found an object", {"conversations": {}}),
    ("ConversationsEmpty", "conversations: the list of turns is empty", {"conversations": []}),
    (
        "TurnInvalid",
        "conversations[1]: expected an object with from and value, found text",
        {"conversations": [HUMAN, "a cat"]},
    ),
    (
        "UnknownRole",
        "conversations[1].from: found 'bot'; expected human, gpt or system",
        {"conversations": [HUMAN, {"from": "bot", "value": "hi"}]},
    ),
    (
        "UnknownRole",
        "conversations[0].from: found nothing; expected human, gpt or system",
        {"conversations": [{"value": "hi"}, GPT]},
    ),
    (
        "ValueNotText",
        "conversations[1].value: expected text, found a number",
        {"conversations": [HUMAN, {"from": "gpt", "value": 5}]},
    ),
    (
        "ValueNotText",
        "conversations[1].value: expected text, found nothing",
        {"conversations": [HUMAN, {"from": "gpt"}]},
    ),
    (
        "ValueNotText",
        "conversations[0].value: expected text, found null",
        {"conversations": [{"from": "human", "value": None}, GPT]},
    ),
    (
        "RolesNotAlternating",
        "conversations[1].from: a second human turn in a row; human and gpt must alternate",
        {"conversations": [HUMAN, HUMAN, GPT]},
    ),
    (
        "RolesNotAlternating",
        "conversations[2].from: a second gpt turn in a row; human and gpt must alternate",
        {"conversations": [HUMAN, GPT, GPT]},
    ),
    (
        "SystemTurnMisplaced",
        "conversations[2].from: a system turn may only come first",
        {"conversations": [HUMAN, GPT, {"from": "system", "value": "be brief"}]},
    ),
    ("NothingSupervised", "conversations: there is no gpt turn to learn from", {"conversations": [HUMAN]}),
    # media
    (
        "ImageInvalid",
        "image: expected a path or a list of paths, found a number",
        {"image": 7, "conversations": marked(1)},
    ),
    (
        "ImageInvalid",
        "image[1]: expected a path, found null",
        {"image": ["images/wide.png", None], "conversations": marked(2)},
    ),
    (
        "ImageAndVideo",
        "video: a row has images or a video, not both",
        {"image": "images/wide.png", "video": "videos/clip.mp4", "conversations": marked(1)},
    ),
    (
        "InvalidText",
        "image: found \\udc00, half of a surrogate pair; write the whole character",
        {"image": "a\udc00.jpg", "conversations": marked(1)},
    ),
    (
        "ImageInvalid",
        "image[0]: expected a path, found text",
        {"image": [""], "conversations": marked(1)},
    ),
    (
        "ImageUnreadable",
        "image: images is a folder; expected a picture: name each picture, or name the folder as `video`",
        {"image": "images", "conversations": marked(1)},
    ),
    (
        "ImageMissing",
        f"image: {'x' * 300}.jpg is not below {ROOT}",
        {"image": f"{'x' * 300}.jpg", "conversations": marked(1)},
    ),
    ("ImageMissing", f"image: none.jpg is not below {ROOT}", {"image": "none.jpg", "conversations": marked(1)}),
    (
        "ImageMissing",
        f"image[1]: none.jpg is not below {ROOT}",
        {"image": ["images/wide.png", "none.jpg"], "conversations": marked(2)},
    ),
    (
        "ImageUndecodable",
        "image: half.jpg: cannot be decoded (image file is truncated (",
        {"image": "half.jpg", "conversations": marked(1)},
    ),
    ("ImageUndecodable", "image: empty.png: the file is empty", {"image": "empty.png", "conversations": marked(1)}),
    (
        "ImageUndecodable",
        "image: page.jpg: cannot be decoded (cannot identify image file",
        {"image": "page.jpg", "conversations": marked(1)},
    ),
    (
        "PathLeavesRoot",
        "image: '../secret.png' leaves the dataset's root; expected a path below it",
        {"image": "../secret.png", "conversations": marked(1)},
    ),
    (
        "PathLeavesRoot",
        "image: 'images/../../secret.png' leaves the dataset's root; expected a path below it",
        {"image": "images/../../secret.png", "conversations": marked(1)},
    ),
    (
        "PathLeavesRoot",
        "image[0]: '/etc/passwd' leaves the dataset's root; expected a path below it",
        {"image": ["/etc/passwd"], "conversations": marked(1)},
    ),
    (
        "PathLeavesRoot",
        "image: 'http://example.com/a.png' leaves the dataset's root; expected a path below it",
        {"image": "http://example.com/a.png", "conversations": marked(1)},
    ),
    (
        "PathLeavesRoot",
        "video: '../clip.mp4' leaves the dataset's root; expected a path below it",
        {"video": "../clip.mp4", "conversations": [HUMAN, GPT]},
    ),
    ("VideoMissing", f"video: none.mp4 is not below {ROOT}", {"video": "none.mp4", "conversations": [HUMAN, GPT]}),
    (
        "VideoUndecodable",
        "video: half.mp4: cannot be decoded (",
        {"video": "half.mp4", "conversations": [HUMAN, GPT]},
    ),
    (
        "VideoUndecodable",
        "video: videos/clip.mp4: clip [0, 900] is not inside the video, which is ",
        {"video": "videos/clip.mp4", "clip": [0, 900], "conversations": [HUMAN, GPT]},
    ),
    (
        "ClipInvalid",
        "clip: expected [start, end] in seconds, found [3, 1]",
        {"video": "videos/clip.mp4", "clip": [3, 1], "conversations": [HUMAN, GPT]},
    ),
    # marks
    (
        "ImageMarkMismatch",
        "conversations: 2 <image> marks for 1 image; expected one for each image",
        {"image": "images/wide.png", "conversations": marked(2)},
    ),
    (
        "ImageMarkMismatch",
        "conversations: 1 <image> marks for 2 images; expected one for each image",
        {"image": ["images/wide.png", "images/tall.png"], "conversations": marked(1)},
    ),
    (
        "ImageMarkMismatch",
        "conversations: 0 <image> marks for 2 images; expected one for each image",
        {"image": ["images/wide.png", "images/tall.png"], "conversations": [HUMAN, GPT]},
    ),
    (
        "ImageMarkMismatch",
        "conversations: 1 <image> marks for 0 images; expected one for each image",
        {"conversations": marked(1)},
    ),
    (
        "VideoMarkMismatch",
        "conversations: 2 <video> marks for 1 video",
        {"video": "videos/clip.mp4", "conversations": [{"from": "human", "value": "<video>\n<video>\n"}, GPT]},
    ),
]


@pytest.mark.parametrize(
    ("reason", "message", "row"),
    [pytest.param(*case, id=f"{case[0]}-{number}") for number, case in enumerate(BROKEN)],
)
def test_a_broken_row(root: Path, tmp_path: Path, reason: str, message: str, row: object) -> None:
    (finding,) = check_row(row, checker(root), tmp_path)
    assert (finding.reason, finding.severity) == (reason, "error")
    assert str(finding).startswith(message.replace(ROOT, str(root)))


@pytest.mark.parametrize(
    ("member", "reason", "message"),
    [
        pytest.param(
            "link.jpg",
            "ImageUnreadable",
            "image: link.jpg is a link or a device in its archive; store the file itself",
            id="a link",
        ),
        pytest.param("none.jpg", "ImageMissing", f"image: none.jpg is not below {ROOT}/x.zip", id="absent"),
    ],
)
def test_a_member_of_an_archive_that_cannot_be_read(tmp_path: Path, member: str, reason: str, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("link.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    (finding,) = check_row({"image": member, "conversations": marked(1)}, checker(tmp_path / "x.zip"), tmp_path)
    assert (finding.reason, str(finding)) == (reason, message.replace(ROOT, str(tmp_path)))


@pytest.mark.parametrize(
    ("message", "options", "row"),
    [
        pytest.param(
            "conversations: its images need 28 tokens, of which 0 fit in the maximum length 150; "
            "raise the maximum length or lower the maximum number of tiles",
            {"max_length": 150},
            {"image": "images/wide.png", "conversations": marked(1)},
            id="images cut",
        ),
        pytest.param(
            "conversations: no token is supervised; the row teaches nothing",
            {"max_length": 100},
            {"conversations": [HUMAN, GPT]},
            id="answer cut away",
        ),
    ],
)
def test_a_row_that_does_not_fit(
    root: Path, tmp_path: Path, message: str, options: dict[str, object], row: object
) -> None:
    errors = errors_of(check_row(row, checker(root, **options), tmp_path))
    assert [str(error) for error in errors] == [message]


@pytest.mark.parametrize(
    ("reason", "message", "options", "row"),
    [
        pytest.param(
            "AnswerWithoutQuestion",
            "conversations[0].from: no question comes before this answer; the turn is skipped, as upstream skips it",
            {},
            {"conversations": [GPT, HUMAN, GPT]},
            id="leading answer",
        ),
        pytest.param(
            "QuestionWithoutAnswer",
            "conversations[2]: the last question has no answer",
            {},
            {"conversations": [HUMAN, GPT, HUMAN]},
            id="trailing question",
        ),
        pytest.param(
            "RowTruncated",
            "conversations: 164 tokens are more than the maximum length 162; the last 2 are cut",
            {"max_length": 162},
            {"conversations": [HUMAN, GPT]},
            id="truncated",
        ),
    ],
)
def test_a_row_with_a_warning_can_be_trained_on(
    root: Path, tmp_path: Path, reason: str, message: str, options: dict[str, object], row: object
) -> None:
    (finding,) = check_row(row, checker(root, **options), tmp_path)
    assert (finding.reason, finding.severity, str(finding)) == (reason, "warning", message)


@pytest.mark.parametrize("compat", ["default", "upstream"])
def test_the_golden_rows_are_without_errors(compat: str) -> None:
    index = RowIndex.build(DATASET.annotation)
    phi3 = Checker(DATASET, settings("phi3-chat", compat=compat), read_file, tokenizer_of(checkpoint("phi3")))
    found = [(finding.line, finding.reason, finding.severity) for finding in check_rows(index, phi3)]
    lost = [(line, "NothingSupervised", "warning") for line in (2, 4, 5)]
    assert found == (lost if compat == "upstream" else [])


def write_rows(folder: Path, *rows: object) -> DatasetDescription:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return DatasetDescription("shop", str(MEDIA), str(path), length=len(rows))


def check_all(dataset: DatasetDescription, open_media: OpenMedia, threads: int = 1) -> list[Finding]:
    checks = Checker(dataset, settings("Hermes-2"), open_media, tokenizer_of(checkpoint("qwen2")))
    return check_rows(RowIndex.build(dataset.annotation), checks, threads=threads)


@pytest.mark.parametrize("threads", [1, 4])
def test_findings_name_file_and_line_in_order(tmp_path: Path, threads: int) -> None:
    good, bad = {"conversations": [HUMAN, GPT]}, {"image": "none.jpg", "conversations": marked(1)}
    dataset = write_rows(tmp_path, *([good] * 30), bad, *([good] * 700), bad, {"id": 1})
    found = check_all(dataset, read_file, threads=threads)
    assert [(finding.file, finding.line, finding.reason) for finding in found] == [
        (dataset.annotation, 31, "ImageMissing"),
        (dataset.annotation, 732, "ImageMissing"),
        (dataset.annotation, 733, "ConversationsMissing"),
    ]
    assert str(found[0]) == f"{dataset.annotation}:31: image: none.jpg is not below {MEDIA}"


def test_an_image_of_many_rows_is_decoded_once(tmp_path: Path) -> None:
    opened: list[str] = []

    def open_media(root: str, relative: str) -> bytes:
        opened.append(relative)
        return read_file(root, relative)

    dataset = write_rows(tmp_path, *[{"image": "images/wide.png", "conversations": marked(1)}] * 20)
    assert check_all(dataset, open_media) == []
    assert opened == ["images/wide.png"]


@pytest.mark.parametrize(
    ("length", "found"), [(None, []), (3, []), (5, ["length is 5, the file has 3 rows; is it complete?"])]
)
def test_the_expected_number_of_rows(length: int | None, found: list[str]) -> None:
    findings = check_length(DatasetDescription("shop", "/data", "rows.jsonl", length=length), 3)
    assert [finding.message for finding in findings] == found
    assert [str(finding) for finding in findings] == [f"rows.jsonl: length: {message}" for message in found]


def test_a_table_for_the_terminal() -> None:
    text = io.StringIO()
    finding = Finding("ImageMissing", "cat.jpg is not below /data", "image", file="rows.jsonl", line=7)
    Console(file=text, width=200).print(findings_table([finding]))
    assert all(part in text.getvalue() for part in ("rows.jsonl", "7", "image", "ImageMissing", "cat.jpg is not below"))


def test_checking_rows_needs_no_torch() -> None:
    """The check runs in small CPU pods; torch would cost it seconds and hundreds of megabytes."""
    code = "import sys, internvl_trainer.data.row_checks; print({'torch', 'transformers'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout == "set()\n"
