"""A run without a cluster: how many GPUs there are, and paths that start at the file's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from internvl_api.recipes.summary import recipe_config
from internvl_api.run_config import RunConfig
from internvl_api.types import OUTPUT_PATTERN, SOURCE_PATTERN
from internvl_trainer.__main__ import main
from internvl_trainer.cli import gpus
from internvl_trainer.cli.gpus import check_gpus, count_gpus
from internvl_trainer.cli.local_paths import PATH_FIELDS, with_absolute_paths
from internvl_trainer.cli.options import load_config
from internvl_trainer.errors import UserError
from trainer.runs import GOLDEN, make_config


class Library:
    """As much of pynvml as counting needs; `count` None: no driver."""

    class NVMLError(Exception):
        pass

    def __init__(self, count: int | None) -> None:
        self._count = count

    def nvmlInit(self) -> None:
        if self._count is None:
            raise self.NVMLError

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int | None:
        return self._count


@pytest.mark.parametrize(
    ("present", "visible", "found"),
    [
        pytest.param(None, None, 0, id="no driver"),
        pytest.param(8, None, 8, id="all"),
        pytest.param(8, "0,3", 2, id="two chosen"),
        pytest.param(2, "0,7,1", 1, id="the list ends at an unknown GPU"),
        pytest.param(8, "", 0, id="none chosen"),
        pytest.param(8, "-1", 0, id="none, as torch writes it"),
        pytest.param(1, "MIG-4c5e", 1, id="a part of one"),
        pytest.param(0, "0", 0, id="a driver without GPUs"),
    ],
)
def test_gpus_are_counted_as_cuda_would(present: int | None, visible: str | None, found: int) -> None:
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert count_gpus(Library(present), environment) == found


@pytest.mark.parametrize(
    ("found", "asked", "said"),
    [
        pytest.param(
            0,
            None,
            "found 0 GPUs, the recipe wants 8: use --nproc N on a machine with N GPUs, or --device cpu --nproc 1",
            id="none",
        ),
        pytest.param(
            2, None, "found 2 GPUs, the recipe wants 8: use --nproc 2, which keeps the global batch", id="two of eight"
        ),
        pytest.param(3, None, "found 3 GPUs, the recipe wants 8: use --nproc 2", id="three do not divide the batch"),
        pytest.param(1, 4, "found 1 GPU, --nproc wants 4: use --nproc 1", id="more asked for than there are"),
    ],
)
def test_too_few_gpus_is_one_message_with_the_next_step(
    found: int, asked: int | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = recipe_config("internvl2-2b-lora-coco")
    with pytest.raises(UserError) as error:
        check_gpus(config, asked or config.processes_per_worker, asked=asked is not None, count=lambda: found)
    assert error.value.reason == "NotEnoughGpus"
    assert said in str(error.value)


def test_the_next_step_keeps_the_global_batch_of_all_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = recipe_config("internvl2-2b-lora-coco")
    with pytest.raises(UserError, match="found 2 GPUs, the recipe wants 8: use --nproc 1, which keeps"):
        check_gpus(config, 8, asked=False, tasks=128, count=lambda: 2)


def test_enough_gpus_and_a_run_on_the_processor_pass() -> None:
    check_gpus(recipe_config("internvl2-2b-lora-coco"), 8, asked=False, count=lambda: 8)
    check_gpus(make_config("/out"), 64, asked=True, count=lambda: pytest.fail("asked for GPUs"))


def test_run_counts_gpus_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpus, "nvml", lambda: Library(None))
    path = tmp_path / "run.yaml"
    path.write_text(recipe_config("internvl2-2b-lora-coco").to_yaml(), encoding="utf-8")
    assert main(["run", str(path)]) == 78
    error = capsys.readouterr().err
    assert error.startswith("NotEnoughGpus: found 0 GPUs, the recipe wants 8: use --nproc N")
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("flags", [["--config"], []])
def test_run_takes_its_file_with_and_without_an_option(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none.yaml"
    assert main(["run", *flags, str(path)]) == 78
    assert f"{path} cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "advised"), [(3, 2), (10**12, 4)])
def test_processes_that_do_not_divide_the_batch_are_told_which_do(
    asked: int, advised: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from internvl_trainer.cli.run import run_stages

    assert run_stages(make_config("/out"), asked) == 78
    assert f"use --nproc {advised}" in capsys.readouterr().err


def source_fields(schema: dict[str, Any], definitions: dict[str, Any], at: str = "") -> list[str]:
    """Paths of the fields of a JSON schema that hold a Source or an address to write to."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    found = [at] if schema.get("pattern") in (SOURCE_PATTERN, OUTPUT_PATTERN) else []
    for each in schema.get("anyOf", ()):
        found += source_fields(each, definitions, at)
    for name, child in schema.get("properties", {}).items():
        found += source_fields(child, definitions, f"{at}.{name}" if at else name)
    if isinstance(values := schema.get("additionalProperties"), dict):
        found += source_fields(values, definitions, f"{at}.*")
    return found


def test_every_field_that_holds_an_address_may_be_a_relative_path() -> None:
    schema = RunConfig.model_json_schema()
    found = {*source_fields(schema, schema["$defs"]), "output", "model.source", "model.adapter"}
    assert found == set(PATH_FIELDS)


def test_relative_paths_start_at_the_files_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "models/base").mkdir(parents=True)
    document = make_config("/out").to_dict()
    document |= {"output": "results", "model": {"source": "models/base"}}
    document["data"] = {
        "train": {"mine": {"annotation": "data/train.jsonl", "root": "../pictures/"}},
        "preflight": {"cache": "checked/"},
    }
    document["evaluation"] = {
        "tasks": {"ask": {"task": "vqa", "annotation": "./test.jsonl", "root": "s3://b/pictures"}}
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    config = load_config(path)
    assert config.output == f"{tmp_path}/results"
    assert config.model.source == f"{tmp_path}/models/base"
    assert config.data.train["mine"].annotation == f"{tmp_path}/data/train.jsonl"
    assert config.data.train["mine"].root == f"{tmp_path.parent}/pictures/"
    assert config.data.preflight.cache == f"{tmp_path}/checked/"
    assert config.evaluation.tasks["ask"].annotation == f"{tmp_path}/test.jsonl"
    assert config.evaluation.tasks["ask"].root == "s3://b/pictures"


@pytest.mark.parametrize("value", ["OpenGVLab/InternVL2-2B", "s3:/bucket/model", "hf://a/b", "/base", 7, "", None])
def test_what_is_no_relative_path_is_left_alone(value: object, tmp_path: Path) -> None:
    assert with_absolute_paths({"model": {"source": value}}, tmp_path) == {"model": {"source": value}}


@pytest.mark.parametrize("spec", [None, [], "text", {"data": []}, {"data": {"train": None}}, {"model": "base"}])
def test_a_wrong_shape_is_left_to_the_schema(spec: object, tmp_path: Path) -> None:
    assert with_absolute_paths(spec, tmp_path) == spec


def test_resolve_takes_relative_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = {
        "model": {"source": str(GOLDEN / "checkpoints/qwen2")},
        "data": {"train": {"mine": {"annotation": "train.jsonl"}}},
        "output": "out",
    }
    path = tmp_path / "cr.yaml"
    path.write_text(yaml.safe_dump({"apiVersion": "internvl.dev/v1alpha1", "kind": "InternVLFineTune", "spec": spec}))
    assert main(["resolve", str(path)]) == 0
    written = yaml.safe_load(capsys.readouterr().out)
    assert written["output"] == f"{tmp_path}/out"
    assert written["data"]["train"]["mine"]["annotation"] == f"{tmp_path}/train.jsonl"
