"""`internvl-trainer resolve`, as a user without a cluster types it."""

from pathlib import Path

import pytest
import yaml
from internvl_api.run_config import RunConfig
from internvl_trainer.__main__ import main

RESOURCE = {
    "apiVersion": "internvl.dev/v1alpha1",
    "kind": "InternVLFineTune",
    "metadata": {"name": "pets", "namespace": "team-a"},
    "spec": {
        "recipe": "internvl2-1b-lora",
        "data": {"train": {"pets": {"annotation": "/data/pets.jsonl"}}},
        "gpusPerWorker": 1,
        "evaluation": {"tasks": {"pets": {"task": "caption", "annotation": "/data/test.jsonl"}}},
        "output": "/runs/pets",
        "secrets": {"objectStorage": "s3-credentials"},
    },
}


def write(folder: Path, *documents: object) -> str:
    path = folder / "cr.yaml"
    path.write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    return str(path)


def test_what_is_printed_is_a_run_yaml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resolve", write(tmp_path, RESOURCE)]) == 0
    run_yaml = tmp_path / "run.yaml"
    run_yaml.write_text(capsys.readouterr().out, encoding="utf-8")
    config = RunConfig.load(run_yaml)
    assert (config.job, config.output, config.world_size) == ("team-a/pets", "/runs/pets", 1)
    assert (config.lora.language_rank, config.model.source) == (16, "hf://OpenGVLab/InternVL2-1B"), "the recipe's"
    assert config.gradient_accumulation * config.training.micro_batch_size == config.training.global_batch_size == 16
    assert config.evaluation.tasks["pets"].max_new_tokens == 30, "the task's"


def test_other_documents_in_the_file_are_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3-credentials"}}
    assert main(["resolve", write(tmp_path, secret, RESOURCE)]) == 0
    assert "job: team-a/pets" in capsys.readouterr().out


def test_the_same_file_gives_the_same_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, RESOURCE)
    texts = [(main(["resolve", path]), capsys.readouterr().out) for _ in range(2)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("documents", "code", "said"),
    [
        pytest.param(
            [RESOURCE | {"spec": RESOURCE["spec"] | {"recipe": "internvl2-1b-lor"}}],
            65,
            "UnknownRecipe: spec.recipe: unknown recipe 'internvl2-1b-lor'; did you mean 'internvl2-1b-lora'?",
            id="unknown recipe",
        ),
        pytest.param(
            [RESOURCE | {"spec": RESOURCE["spec"] | {"evaluation": {"publishIf": "CIDEr > 1"}}}],
            65,
            "InvalidCondition: spec.evaluation.publishIf: publishIf 'CIDEr > 1' needs metrics, but evaluation.tasks",
            id="a condition without tasks",
        ),
        pytest.param(
            [{key: RESOURCE[key] for key in ("apiVersion", "kind")}],
            65,
            "InvalidSpec: spec: found nothing, expected an object",
            id="no spec",
        ),
        pytest.param(
            [RESOURCE | {"metadata": ["x"]}], 65, "InvalidSpec: metadata: found list, expected an object", id="metadata"
        ),
        pytest.param(
            [RESOURCE["spec"]],
            78,
            "found None None; expected one internvl.dev/v1alpha1 InternVLFineTune",
            id="a bare spec",
        ),
        pytest.param(
            [RESOURCE, RESOURCE],
            78,
            "found internvl.dev/v1alpha1 InternVLFineTune, internvl.dev/v1alpha1 InternVLFineTune; expected one",
            id="two runs",
        ),
        pytest.param([None], 78, "found no document; expected one", id="an empty file"),
    ],
)
def test_a_mistake_is_named(
    documents: list[object], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, *documents)
    assert main(["resolve", path]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(path)
    assert said in captured.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"a: [", "while parsing", id="no YAML"),
        pytest.param(b"\xff\xfe", "can't decode", id="no text"),
        pytest.param(b"a: 2024-13-45", "month must be in 1..12", id="no day"),
        pytest.param(b"[" * 20_000, "recursion", id="deeper than YAML is read"),
        pytest.param(None, "No such file", id="no such file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    content: bytes | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cr.yaml"
    if content is not None:
        path.write_bytes(content)
    assert main(["resolve", str(path)]) == 78
    error = capsys.readouterr().err
    assert f"{path} cannot be used" in error
    assert said in error
