"""The commands for the result of a run: what a shell makes of them, and that their options exist."""

import shlex
from typing import Any

import pytest
from internvl_trainer.artifacts.manifest import Manifest
from internvl_trainer.cli.main import parse
from internvl_trainer.report.contents import Contents
from internvl_trainer.report.record import Record
from internvl_trainer.report.use_it import commands
from trainer.runs import make_config

ADAPTER = Contents(adapter=True, upstream=False, hf=False)
UPSTREAM = Contents(adapter=True, upstream=True, hf=False)
HF = Contents(adapter=False, upstream=False, hf=True)
TRAINED = Manifest(fingerprint="x", files=[])


def made(there: Contents, *, output: str = "/data/out", trained: bool = True, **changes: Any) -> list[str]:
    base = changes.pop("base", "owner/name")
    config = make_config(output, method="lora" if there.adapter else "full", **changes.pop("sections", {}))
    config = config.model_copy(update=changes)
    config.model.source = base
    record = Record(config=config, trained=TRAINED if trained else None, final={"coco": {"CIDEr": 1.0}})
    return [use.command for use in commands(record, there)]


def words(command: str) -> list[list[str]]:
    """The commands of a line, each as the words that a shell makes of it."""
    return [shlex.split(part) for part in command.replace("\\\n", "").replace("\n", "&&").split("&&")]


def check(command: str) -> None:
    """Parse each command of the trainer's as its program does; an unknown option ends the process."""
    for first, *rest in words(command):
        if first == "internvl-trainer":
            parse(rest)


def test_a_merged_model_in_object_storage() -> None:
    chat, load, report = made(UPSTREAM, output="s3://bucket/a b/")
    assert words(chat) == [
        ["aws", "s3", "cp", "--recursive", "s3://bucket/a b/artifacts/model", "model"],
        ["internvl-trainer", "chat", "--model", "model", "--image", "photo.jpg"],
    ]
    convert, python = words(load)
    assert convert == ["internvl-trainer", "convert", "model", "model-hf", "--to", "hf"]
    compile(python[2], "command", "exec")
    assert report == "kubectl ivft report run -n team --out report.html"
    check(chat)
    check(load)


def test_a_model_of_transformers_on_a_disk_is_loaded_where_it_is() -> None:
    chat, load, report = made(HF, output="/pvc/claim/out")
    assert chat == "internvl-trainer chat --model /pvc/claim/out/artifacts/model-hf --image photo.jpg"
    ((python, option, code),) = words(load)
    assert (python, option) == ("python", "-c")
    assert '"/pvc/claim/out/artifacts/model-hf"' in code
    assert report == "kubectl ivft report run -n team"
    check(chat)


@pytest.mark.parametrize(
    ("base", "fetched", "folder"),
    [
        pytest.param("hf://o/m@v1", [["hf", "download", "o/m", "--revision", "v1", "--local-dir", "base"]], "base"),
        pytest.param("s3://b/m/", [["aws", "s3", "cp", "--recursive", "s3://b/m", "base"]], "base"),
        pytest.param("gs://b/p/m", [["gcloud", "storage", "cp", "--recursive", "gs://b/p/m", "."]], "m"),
        pytest.param(
            "az://c/p/m",
            [["az", "storage", "blob", "download-batch", "--source", "c", "--pattern", "p/m/*", "--destination", "."]],
            "p/m",
        ),
        pytest.param("/models/m", [], "/models/m"),
    ],
)
def test_an_adapter_is_put_on_its_base(base: str, fetched: list[list[str]], folder: str) -> None:
    chat, merge, _ = made(ADAPTER, base=base)
    put = ["internvl-trainer", "chat", "--model", folder, "--adapter", "/data/out/artifacts/adapter"]
    assert words(chat) == [*fetched, [*put, "--image", "photo.jpg"]]
    assert words(merge) == [
        ["cp", "/data/out/artifacts/run.yaml", "run.yaml"],
        ["internvl-trainer", "merge", "--config", "run.yaml"],
    ]
    check(chat)
    check(merge)


def test_a_model_below_its_condition_is_only_where_training_stored_it() -> None:
    evaluation = {"tasks": {"coco": {"task": "caption", "annotation": "/rows"}}, "publishIf": "CIDEr > 2"}
    chat, report = made(UPSTREAM, base="/models/m", sections={"evaluation": evaluation})
    assert "--adapter /data/out/stages/train/adapter" in chat
    assert report.startswith("kubectl ivft report")


def test_a_run_outside_of_a_cluster_asks_no_cluster() -> None:
    *_, report = made(ADAPTER, job_uid="local")
    assert report == "internvl-trainer report --config run.yaml --out report"
    check(report)


def test_before_training_is_done_there_is_only_the_report() -> None:
    assert made(ADAPTER, trained=False) == ["kubectl ivft report run -n team"]


def test_a_path_cannot_add_a_command_and_a_long_one_is_left_out() -> None:
    chat, *_ = made(HF, output="/data/$(rm -rf x); `y`'")
    assert len(words(chat.replace("; ", " "))) == 1
    assert shlex.split(chat)[3] == "/data/$(rm -rf x); `y`'/artifacts/model-hf"
    assert made(HF, output="/" + "x" * 1000) == ["kubectl ivft report run -n team"]
