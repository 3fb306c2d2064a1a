"""The files that a pattern or a repository stands for."""

from __future__ import annotations

from pathlib import Path

import pytest
from internvl_trainer.artifacts import shards
from internvl_trainer.artifacts.shards import list_shards
from internvl_trainer.errors import UserError

FIELD = "spec.data.train.x"


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """What folders of remote addresses hold."""
    names: dict[str, list[str]] = {}
    monkeypatch.setattr(shards, "list_sizes", lambda uri, field: dict.fromkeys(names[uri], 1))
    return names


@pytest.mark.parametrize("uri", ["/data/a.jsonl", "s3://b/a.parquet", "hf://datasets/o/n/a.jsonl", "pvc://c/a.tar"])
def test_a_file_stands_for_itself(uri: str) -> None:
    assert list_shards(uri, field=FIELD) == [uri]


def test_a_pattern_on_a_disk(tmp_path: Path) -> None:
    for name in ("b-1.tar", "b-0.tar", "c.tar", "b-0.txt"):
        (tmp_path / name).touch()
    assert list_shards(f"{tmp_path}/b-*.tar", field=FIELD) == [f"{tmp_path}/b-0.tar", f"{tmp_path}/b-1.tar"]


def test_a_pattern_in_a_bucket(listed: dict[str, list[str]]) -> None:
    listed["s3://b/x"] = ["t-1.parquet", "t-0.parquet", "other"]
    assert list_shards("s3://b/x/t-*.parquet", field=FIELD) == ["s3://b/x/t-0.parquet", "s3://b/x/t-1.parquet"]


def test_a_pattern_in_a_repository(listed: dict[str, list[str]]) -> None:
    listed["hf://datasets/o/n@main"] = ["data/train-0.parquet", "data/test-0.parquet", "README.md"]
    found = list_shards("hf://datasets/o/n@main/data/train-*", field=FIELD)
    assert found == ["hf://datasets/o/n@main/data/train-0.parquet"]


def test_a_repository_stands_for_its_split_train(listed: dict[str, list[str]]) -> None:
    listed["hf://datasets/o/n"] = ["data/train-1.parquet", "data/train-0.parquet", "data/test-0.parquet", "README.md"]
    found = list_shards("hf://datasets/o/n", field=FIELD)
    assert found == ["hf://datasets/o/n/data/train-0.parquet", "hf://datasets/o/n/data/train-1.parquet"]


def test_a_repository_of_several_sets_is_ambiguous(listed: dict[str, list[str]]) -> None:
    listed["hf://datasets/o/n"] = ["de/train-0.parquet", "en/train-0.parquet"]
    with pytest.raises(UserError) as caught:
        list_shards("hf://datasets/o/n", field=FIELD)
    assert caught.value.reason == "AnnotationAmbiguous"
    assert "name one, such as hf://datasets/o/n/en/*" in str(caught.value)


def test_a_pattern_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        list_shards(f"{tmp_path}/*.tar", field=FIELD)
    assert str(caught.value) == f"{tmp_path}/*.tar: found no file *.tar in {tmp_path}"
