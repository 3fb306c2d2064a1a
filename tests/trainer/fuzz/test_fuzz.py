"""Random and mutated inputs for everything that the trainer reads: only its own errors may come out.

Seeds are 0, 1, 2 and so on: a failure comes again. Every machine tries the same ones, unless FUZZ_SECONDS, the time of
all targets together, asks for more.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from golden import GOLDEN, checkpoint, tokenizer_of
from golden import settings as sample_settings
from growth import assert_proportional
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from internvl_api.address import Address, redact
from internvl_trainer.artifacts.archives import decompress, open_archive
from internvl_trainer.artifacts.https import shard_names
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.data.dataset_meta import DatasetDescription, read_meta
from internvl_trainer.data.diagnostics import Finding, findings_table
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.pictures import ImageProblem, decode_image
from internvl_trainer.data.row_checks import Checker, check_rows
from internvl_trainer.data.row_schema import parse_chat_row
from internvl_trainer.data.video import VideoProblem, read_frames
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.annotations import _is_lines, _read_coco, _read_line
from internvl_trainer.json_text import parse_json
from internvl_trainer.model.checkpoint_format.files import list_tensors
from internvl_trainer.model.checkpoint_source import describe_checkpoint
from internvl_trainer.report.model_card import plain
from internvl_trainer.retrieval.caption_files import read_captions
from internvl_trainer.retrieval.load import describe_retrieval_checkpoint
from internvl_trainer.terminal import printable
from PIL import Image
from rich.console import Console

pytestmark = pytest.mark.slow

Target = Callable[[Any], None]
_EXAMPLES = 50  # of one seed
_SEEDS = 20  # two minutes for all targets on two cores
_SECRET = "s3cr3t-s1gnature"


def mutated(*originals: bytes) -> st.SearchStrategy[bytes]:
    """An original with a few bytes replaced, repeated, removed or cut off; or bytes of any kind."""

    def apply(original: bytes, edits: list[tuple[int, int, bytes, int]]) -> bytes:
        data = original
        for place, removed, inserted, repeated in edits:
            start = place % (len(data) + 1)
            data = data[:start] + inserted * repeated + data[start + removed :]
        return data

    edit = st.tuples(st.integers(0, 1 << 20), st.integers(0, 9), st.binary(max_size=9), st.integers(0, 40))
    return st.one_of(st.builds(apply, st.sampled_from(originals), st.lists(edit, max_size=5)), st.binary(max_size=300))


def documents(*names: str) -> st.SearchStrategy[bytes]:
    """JSON of any form, with these names in its objects, and with numbers and texts that no user writes."""
    long = st.sampled_from([10**4000, -(10**400), 2**63, -1, 0])
    numbers = st.one_of(st.integers(), long, st.floats())
    texts = st.one_of(
        st.text(max_size=20), st.sampled_from(["human", "gpt", "system", "a.png", "../x", "<image>", "[/]"])
    )
    leaves = st.one_of(st.none(), st.booleans(), numbers, texts)
    keys = st.one_of(st.sampled_from(names), st.text(max_size=5))

    def inner(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(st.lists(values, max_size=4), st.dictionaries(keys, values, max_size=6))

    plain_documents = st.recursive(leaves, inner, max_leaves=20).map(_dump)
    nested = st.integers(1, 100_000).map(lambda depth: b"[" * depth)
    digits = st.integers(1, 20_000).map(lambda count: b"[" + b"9" * count + b"]")
    return st.one_of(plain_documents, plain_documents, nested, digits, st.binary(max_size=100))


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


_counts: list[str] = []


@pytest.fixture(autouse=True)
def _show_counts(capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Print the number of inputs of each target, whatever pytest captures."""
    yield
    with capsys.disabled():
        while _counts:
            print(f"\n{_counts.pop()}", end=" ")


def fuzz(name: str, strategy: st.SearchStrategy[Any], target: Target, *allowed: type[Exception]) -> None:
    """Feed the target with every seed, or until its share of FUZZ_SECONDS is over; print the number of inputs."""
    asked = os.environ.get("FUZZ_SECONDS")
    end = time.monotonic() + float(asked) / 11 if asked else 0
    inputs, round_number = 0, 0

    def run(value: Any) -> None:
        nonlocal inputs
        inputs += 1
        try:
            target(value)
        except (UserError, *allowed):
            return

    quiet = settings(
        max_examples=_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True
    )
    while time.monotonic() < end if asked else round_number < _SEEDS:
        seed(round_number)(quiet(given(strategy)(run)))()
        round_number += 1
    _counts.append(f"fuzz {name}: {inputs} inputs, {round_number} seeds")
    assert inputs > 0


ROW = {"id": 1, "image": "images/photo.jpg", "conversations": [{"from": "human", "value": "<image>what"}]}
ROW["conversations"] += [{"from": "gpt", "value": "a cat"}]  # type: ignore[operator]


def test_rows(tmp_path: Path) -> None:
    dataset = DatasetDescription("fuzz", str(GOLDEN / "data"), "rows.jsonl")
    checker = Checker(
        dataset, sample_settings("Hermes-2", compat="default"), open_media, tokenizer_of(checkpoint("qwen2"))
    )

    def check(data: bytes) -> None:
        (tmp_path / "rows.jsonl").write_bytes(data)
        for finding in check_rows(RowIndex.build(tmp_path / "rows.jsonl"), checker):
            assert finding.file == "rows.jsonl"
            assert finding.line is not None

    names = ("id", "image", "video", "clip", "conversations", "from", "value")
    fuzz("rows", st.one_of(documents(*names), mutated(_dump(ROW))), check)


def test_annotations_of_tasks() -> None:
    def read(data: bytes) -> None:
        if _is_lines(data, "tasks.json"):
            _read_line(data, "tasks.jsonl:1")
        else:
            document = parse_json(data, "tasks.json")
            if isinstance(document, dict) and isinstance(document.get("images"), list):
                list(_read_coco(document, "tasks.json"))

    names = (
        "image",
        "question",
        "answer",
        "sent",
        "bbox",
        "caption",
        "conversations",
        "height",
        "width",
        "from",
        "value",
    )
    coco = _dump({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": "b"}]})
    coco_documents = documents("images", "annotations", "id", "image_id", "file_name", "caption")
    strategy = st.one_of(documents(*names), coco_documents, mutated(_dump(ROW), coco))
    fuzz("annotations of tasks", strategy, read)


def test_caption_files(tmp_path: Path) -> None:
    coco = _dump([{"image": "a.jpg", "caption": ["a", "b"], "image_id": "coco_1"}])

    def read(data: bytes) -> None:
        (tmp_path / "captions").write_bytes(data)
        for form in ("flickr", "coco"):
            read_captions(tmp_path / "captions", form)

    strategy = st.one_of(documents("image", "caption", "image_id"), mutated(coco, b"image,caption\na.jpg,one\n"))
    fuzz("caption files", strategy, read)


def test_meta_json() -> None:
    meta = _dump({"a": {"root": "/r", "annotation": "/a.jsonl", "repeat_time": 2, "length": 5}})
    names = ("root", "annotation", "repeat_time", "max_dynamic_patch", "data_augment", "length")
    strategy = st.one_of(documents(*names), mutated(meta))
    fuzz("meta JSON", strategy, lambda data: read_meta(data.decode("utf-8", "replace"), "meta.json") and None)


def test_config_json(tmp_path: Path) -> None:
    original = (checkpoint("qwen2") / "config.json").read_bytes()
    document = json.loads(original)

    def changed(path: list[str], value: bytes) -> bytes:
        copy = json.loads(original)
        place = copy
        for name in path[:-1]:
            place = place[name] if isinstance(place.get(name), dict) else place
        place[path[-1]] = "\0"
        return json.dumps(copy).encode().replace(b'"\\u0000"', value)

    inner = [[name, key] for name, part in document.items() if isinstance(part, dict) for key in part]
    paths = st.sampled_from([*([name] for name in document), *inner])
    values = documents("llm_config", "vision_config", "architectures", "hidden_size")

    def describe(data: bytes) -> None:
        (tmp_path / "config.json").write_bytes(data)
        for use in (describe_checkpoint, describe_retrieval_checkpoint):
            try:
                use(tmp_path)
            except UserError:
                continue

    fuzz("config.json", st.one_of(st.builds(changed, paths, values), mutated(original)), describe)


def test_index_json(tmp_path: Path) -> None:
    index = _dump({"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})

    def read(data: bytes) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(data)
        for use in (lambda: shard_names(data, "index"), lambda: list_tensors(tmp_path)):
            try:
                use()
            except UserError:
                continue

    fuzz("index.json", st.one_of(documents("weight_map", "metadata"), mutated(index)), read)


def test_safetensors(tmp_path: Path) -> None:
    header = _dump({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}})
    whole = len(header).to_bytes(8, "little") + header + bytes(16)

    def with_header(document: bytes) -> bytes:
        return len(document).to_bytes(8, "little") + document + bytes(16)

    def read(data: bytes) -> None:
        (tmp_path / "model.safetensors").write_bytes(data)
        list_tensors(tmp_path)

    headers = documents("a", "dtype", "shape", "data_offsets", "__metadata__").map(with_header)
    fuzz("safetensors", st.one_of(headers, mutated(whole)), read)


def test_archives(tmp_path: Path) -> None:
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images/a.jpg", b"picture" * 20)
    with tarfile.open(fileobj=tarred, mode="w") as tar:
        info = tarfile.TarInfo("images/a.jpg")
        info.size = 7
        tar.addfile(info, io.BytesIO(b"picture"))

    def index(write: Callable[[Path], None]) -> Path:
        write(tmp_path / "index")
        return tmp_path / "index"

    def read(data: bytes) -> None:
        path = tmp_path / "archive"
        path.write_bytes(data)
        for name in ("a.zip", "a.tar"):
            try:
                open_archive(path, name, index).read("images/a.jpg")
            except (UserError, FileNotFoundError):
                continue
        decompress(path, tmp_path / "unpacked", "a.tar.gz")

    packed = gzip.compress(tarred.getvalue())
    fuzz("archives", mutated(zipped.getvalue(), tarred.getvalue(), packed), read)


def test_pictures() -> None:
    originals = []
    for form in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000"):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((16, 16)).convert("RGB").save(buffer, form)
        originals.append(buffer.getvalue())
    fuzz("pictures", mutated(*originals), lambda data: decode_image(data) and None, ImageProblem)


def test_videos() -> None:
    clip = (GOLDEN / "data" / "videos" / "clip.mp4").read_bytes()

    def read(data: bytes) -> None:
        read_frames(data, min_frames=2, max_frames=2, sampling="middle", clip=(0.0, 0.5))

    fuzz("videos", mutated(clip), read, VideoProblem)


def test_strings_of_a_report() -> None:
    def show(text: str) -> None:
        address = f"https://data.example/x?X-Amz-Signature={_SECRET}"
        for shown in (redact(f"{text} {address} {text}"), str(Address(address)), repr(Address(f"{address}{text}"))):
            assert _SECRET not in shown
        plain(text)
        assert "\x1b" not in printable(text)
        finding = Finding(text, text, text, file=text, line=1)
        Console(width=80, file=io.StringIO()).print(findings_table([finding]))

    pieces = st.sampled_from(
        ["http://", "HTTPS://", "s3://k:v@", "?", "#", ";", "@", "[/", "[bold]", "\x1b[2J", "\ud83d", "]"]
    )
    texts = st.lists(st.one_of(pieces, st.text(max_size=5)), max_size=30).map("".join)
    fuzz("strings", texts, show)


def _repeated(piece: bytes) -> Callable[[int], bytes]:
    return lambda size: piece * (size // len(piece))


def _rows(make: Callable[[int], Any]) -> Callable[[int], bytes]:
    return lambda size: _dump([make(number) for number in range(size)])


def _named(make: Callable[[int], Any]) -> Callable[[int], bytes]:
    return lambda size: _dump({f"n{number}": make(number) for number in range(size)})


def _turns(size: int) -> bytes:
    turns = [{"from": "human" if number % 2 == 0 else "gpt", "value": "<image>"} for number in range(size)]
    return _dump({"conversations": turns})


def _header(size: int) -> bytes:
    """A safetensors file of small tensors, one after the other."""
    parts = {f"t{n}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * n, 4 * n + 4]} for n in range(size)}
    document = _dump(parts)
    return len(document).to_bytes(8, "little") + document + bytes(4 * size)


def _index(size: int) -> bytes:
    return _dump({"weight_map": {f"t{n}": f"model-{n}.safetensors" for n in range(size)}})


def _coco(size: int) -> bytes:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(size)]
    return _dump({"images": images, "annotations": [{"image_id": number, "caption": "a"} for number in range(size)]})


def _text(read: Callable[[str], object]) -> Callable[[Path], Target]:
    return lambda _: lambda data: read(data.decode())


def _in_a_file(read: Callable[[Path], object], name: str) -> Callable[[Path], Target]:
    """A target that gets a folder with this file."""

    def at(folder: Path) -> Target:
        def act(data: bytes) -> None:
            (folder / name).write_bytes(data)
            read(folder)

        return act

    return at


_ROW = _text(lambda text: parse_chat_row(text.encode(), "f", 1))
_COCO = _text(lambda text: list(_read_coco(parse_json(text.encode(), "f"), "f")))
_META = _text(lambda text: list(read_meta(text, "meta.json")))
_SHARDS = _text(lambda text: shard_names(text.encode(), "index"))
_FINDING = _text(lambda text: Console(width=80, file=io.StringIO()).print(findings_table([Finding("R", text, "f")])))
_CAPTIONS = _in_a_file(lambda folder: read_captions(folder / "captions", "coco"), "captions")
_LINES = _in_a_file(lambda folder: read_captions(folder / "captions", "flickr"), "captions")
_TENSORS = _in_a_file(list_tensors, "model.safetensors")
_CONFIG = _in_a_file(describe_checkpoint, "config.json")


@pytest.mark.parametrize(
    ("target", "make", "large"),
    [
        pytest.param(_text(redact), _repeated(b"http://"), 2_000_000, id="addresses"),
        pytest.param(_text(redact), _repeated(b"https://a:b"), 2_000_000, id="passwords"),
        pytest.param(_text(redact), _repeated(b"https://a?b;"), 2_000_000, id="queries"),
        pytest.param(_text(plain), _repeated(b"[`*"), 2_000_000, id="markdown"),
        pytest.param(_text(printable), _repeated(b"\x1b["), 2_000_000, id="control sequences"),
        pytest.param(_FINDING, _repeated(b"[bold]x[/] "), 200_000, id="markup in a finding"),
        pytest.param(_ROW, _turns, 100_000, id="turns"),
        pytest.param(_ROW, _repeated(b'{"a":1,'), 2_000_000, id="broken rows"),
        pytest.param(_LINES, _repeated(b"a.jpg,one\n"), 400_000, id="caption lines"),
        pytest.param(_LINES, _repeated(b".jpg ,"), 2_000_000, id="one caption line of many names"),
        pytest.param(_CAPTIONS, _rows(lambda n: {"image": f"{n}.jpg", "caption": f"a {n}"}), 50_000, id="captions"),
        pytest.param(_COCO, _coco, 50_000, id="annotations of tasks"),
        pytest.param(_META, _named(lambda n: {"annotation": f"/{n}.jsonl", "root": "/"}), 20_000, id="meta JSON"),
        pytest.param(_CONFIG, _named(lambda n: n), 100_000, id="config.json"),
        pytest.param(_SHARDS, _index, 50_000, id="index.json"),
        pytest.param(_TENSORS, _header, 20_000, id="safetensors"),
    ],
)
def test_work_grows_with_the_input_and_not_with_its_square(
    tmp_path: Path, target: Callable[[Path], Target], make: Callable[[int], bytes], large: int
) -> None:
    assert_proportional(target(tmp_path), make, large=large, allowed=(UserError,))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_work_grows_with_the_members_of_an_archive(tmp_path: Path, kind: str) -> None:
    def make(size: int) -> Path:
        path = tmp_path / f"{size}.{kind}"
        names = [f"images/{number}.jpg" for number in range(size)]
        if kind == "zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name in names:
                    archive.writestr(name, b"")
        else:
            with tarfile.open(path, "w") as tar:
                for name in names:
                    tar.addfile(tarfile.TarInfo(name))
        return path

    def index(write: Callable[[Path], None]) -> Path:
        write(tmp_path / "index")
        return tmp_path / "index"

    assert_proportional(lambda path: open_archive(path, path.name, index), make, large=20_000)
