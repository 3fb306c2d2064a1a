"""git-lfs pointers under the names of other files: each is called a pointer, with the next step."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from golden import checkpoint
from internvl_trainer.artifacts.archives import decompress, open_archive
from internvl_trainer.errors import UserError
from internvl_trainer.json_text import parse_json
from internvl_trainer.model.tokenizer import load_tokenizer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"


@pytest.mark.parametrize(
    ("kind", "file"), [("qwen2", "vocab.json"), ("qwen2", "merges.txt"), ("phi3", "tokenizer.model")]
)
def test_files_of_a_tokenizer(kind: str, file: str, tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint(kind), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (model / file).write_bytes(POINTER)
    with pytest.raises(UserError, match=rf"{file}: is a git-lfs pointer, not the file itself; run `git lfs pull`"):
        load_tokenizer(model)


def test_a_broken_vocabulary_is_no_traceback(tmp_path: Path) -> None:
    model = shutil.copytree(checkpoint("qwen2"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    (model / "vocab.json").write_text('{"a":')
    with pytest.raises(UserError, match=r"the tokenizer \(Qwen2Tokenizer\) cannot be read"):
        load_tokenizer(model)


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz"])
def test_archives(name: str, tmp_path: Path) -> None:
    path, target = tmp_path / name, tmp_path / "out"
    path.write_bytes(POINTER)

    def index(write: Callable[[Path], None]) -> Path:
        write(target)
        return target

    read = decompress if name.endswith("gz") else open_archive
    last = (target, name) if name.endswith("gz") else (name, index)
    with pytest.raises(UserError, match=r"it is a git-lfs pointer: run `git lfs pull` where it comes from"):
        read(path, *last)


@pytest.mark.parametrize("text", [POINTER, POINTER.decode()])
def test_json(text: str | bytes) -> None:
    with pytest.raises(UserError, match=r"config\.json: it is a git-lfs pointer, not the file itself"):
        parse_json(text, "config.json")
