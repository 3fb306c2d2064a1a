"""Where the relative paths of a meta JSON start, for training and for held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.fingerprint import fingerprint
from internvl_trainer.artifacts.inputs import describe_inputs
from internvl_trainer.data.open_datasets import describe_datasets, describe_validation, open_validation
from internvl_trainer.errors import UserError
from pydantic import ValidationError
from trainer.runs import make_config

ROW = '{"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": "a cat"}]}\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Upstream's layout: the meta in a folder of the working directory that its paths start at."""
    (tmp_path / "shell" / "data").mkdir(parents=True)
    (tmp_path / "playground").mkdir()
    (tmp_path / "playground" / "rows.jsonl").write_text(ROW)
    entry = {"root": "playground/", "annotation": "playground/rows.jsonl"}
    (tmp_path / "shell" / "data" / "meta.json").write_text(json.dumps({"rows": entry}))
    return tmp_path


def config_of(folder: Path, **data: Any) -> RunConfig:
    train = {} if "meta" in data else {"rows": {"annotation": str(folder / "playground" / "rows.jsonl")}}
    return make_config(str(folder / "out"), data={"train": train} | data)


def test_relative_paths_start_at_the_folder_of_the_meta_or_at_meta_root(folder: Path) -> None:
    meta = str(folder / "shell" / "data" / "meta.json")
    (beside, _) = describe_datasets(config_of(folder, meta=meta))[0]
    assert beside.annotation == f"{folder}/shell/data/playground/rows.jsonl"
    (rooted, _) = describe_datasets(config_of(folder, meta=meta, metaRoot=f"{folder}/"))[0]
    assert (rooted.annotation, rooted.root) == (f"{folder}/playground/rows.jsonl", f"{folder}/playground")


def test_held_out_rows_come_from_a_meta_too(folder: Path) -> None:
    meta = str(folder / "shell" / "data" / "meta.json")
    config = config_of(folder, validationMeta=meta, metaRoot=str(folder))
    (described, field) = describe_validation(config)[0]
    assert (described.name, field) == ("validation/rows", "spec.data.validationMeta: rows")
    assert [len(dataset.index) for dataset in open_validation(config)] == [1]
    assert any(name.startswith("data.validationMeta.rows") for name in describe_inputs(config))


def test_held_out_rows_do_not_decide_the_loss_curve(folder: Path) -> None:
    plain, held = config_of(folder), config_of(folder, validationMeta=str(folder / "shell" / "data" / "meta.json"))
    assert fingerprint(plain, "train") == fingerprint(held, "train")
    assert fingerprint(plain, "preflight") != fingerprint(held, "preflight")


def test_a_name_in_both_places_is_refused(folder: Path) -> None:
    held = {"rows": {"annotation": str(folder / "playground" / "rows.jsonl")}}
    config = config_of(folder, validation=held, validationMeta=str(folder / "shell" / "data" / "meta.json"))
    with pytest.raises(UserError, match="found dataset 'rows' in validationMeta and in validation"):
        describe_validation(config)


def test_a_meta_root_without_a_meta_is_refused(folder: Path) -> None:
    with pytest.raises((ValidationError, ValueError), match="metaRoot has no effect"):
        config_of(folder, metaRoot=str(folder))


@pytest.mark.parametrize("field", ["root", "annotation"])
@pytest.mark.parametrize("held_out", [False, True], ids=["meta", "validationMeta"])
def test_an_address_with_a_password_is_refused_in_a_meta_too(folder: Path, field: str, held_out: bool) -> None:
    meta = folder / "shell" / "data" / "meta.json"
    entry = json.loads(meta.read_text())["rows"] | {field: "https://me:planted-password@data.example/x"}
    meta.write_text(json.dumps({"rows": entry}))
    config = config_of(folder, **{"validationMeta" if held_out else "meta": str(meta)})
    with pytest.raises(UserError) as refused:
        describe_validation(config) if held_out else describe_datasets(config)
    assert refused.value.reason == "InvalidMeta"
    assert "found a user name or a password in https://data.example/x" in refused.value.message
    assert "planted-password" not in str(refused.value)
