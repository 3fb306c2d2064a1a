"""The COCO guide as one CR on two real nodes: evaluated, merged and published, or refused by its condition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from e2e.harness import Platform
from internvl_api.publish_condition import ANSWER_METRICS, RETRIEVAL_METRICS
from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster.shell import wait_for
from ivft_demo.data import BUCKET
from ivft_demo.results import download, list_keys, read_object, verify_manifest

pytestmark = pytest.mark.e2e

STAGES = ["preflight", "baseline-evaluate", "baseline-score", "train", "evaluate", "score", "merge", "publish"]


class Finished(NamedTuple):
    status: InternVLFineTuneStatus
    output: str


@pytest.fixture(scope="module")
def evaluated(platform: Platform) -> Finished:
    output = platform.apply("quickstart-evaluated", "evaluated")
    return Finished(platform.follow("evaluated"), output)


def test_one_cr_runs_every_stage_and_the_captions_get_better(evaluated: Finished) -> None:
    status = evaluated.status
    assert [(stage.name, stage.state) for stage in status.stages] == [(name, "Succeeded") for name in STAGES]
    assert all(stage.started_at and stage.finished_at for stage in status.stages)
    assert status.evaluation is not None
    before, after = status.evaluation.baseline["photographs"], status.evaluation.final["photographs"]
    assert (
        set(before)
        == set(after)
        == {"BLEU_1", "BLEU_2", "BLEU_3", "BLEU_4", "METEOR", "ROUGE_L", "CIDEr", *ANSWER_METRICS}
    )
    assert after["CIDEr"] > before["CIDEr"] + 0.1
    assert all(after[metric] > before[metric] for metric in ("BLEU_1", "METEOR", "ROUGE_L"))


def test_published_files_are_complete_and_in_status(platform: Platform, evaluated: Finished) -> None:
    files = {file.path for file in verify_manifest(platform.s3, f"{evaluated.output}/artifacts")}
    for expected in (
        "adapter/adapter_model.safetensors",
        "model/config.json",
        "model-hf/config.json",
        "evaluation.json",
        "report/index.html",
        "README.md",
        "run.yaml",
    ):
        assert expected in files, sorted(files)
    assert any(path.startswith("tensorboard/") for path in files)
    for name in ("adapter", "model", "modelHf", "evaluation", "report"):
        uri = evaluated.status.artifacts[name]
        assert uri.startswith(f"{evaluated.output}/artifacts/")
        assert list_keys(platform.s3, uri) or read_object(platform.s3, uri)


def test_metrics_are_available_after_the_pods_are_gone(platform: Platform, evaluated: Finished) -> None:
    query = 'internvl_job_evaluation{job_name="evaluated",task="photographs",metric="CIDEr",model="final"}'
    (series,) = wait_for("Prometheus has the figure", lambda: platform.cluster.prometheus.query(query), timeout=60)
    assert evaluated.status.evaluation is not None
    assert float(series["value"][1]) == pytest.approx(evaluated.status.evaluation.final["photographs"]["CIDEr"])


def test_the_merged_model_loads_without_the_project(platform: Platform, evaluated: Finished, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    download(platform.s3, f"{evaluated.output}/artifacts/model-hf", tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000


def test_the_report_is_one_page_with_pictures(platform: Platform, evaluated: Finished) -> None:
    page = read_object(platform.s3, evaluated.status.artifacts["report"]).decode()
    assert "CIDEr" in page
    assert "data:image/" in page
    card = read_object(platform.s3, f"{evaluated.output}/artifacts/README.md").decode()
    assert card.startswith("---\n")


def test_an_unmet_condition_publishes_nothing_and_keeps_the_adapter(platform: Platform, evaluated: Finished) -> None:
    """With the same output, earlier stages are already done, so only the condition is evaluated again."""
    platform.delete("evaluated")
    platform.s3.delete_object(Bucket=BUCKET, Key="runs/evaluated/artifacts/manifest.json")
    evaluation = {"publishIf": "CIDEr >= 100"}
    platform.apply("quickstart-evaluated", "evaluated", evaluation=evaluation)
    status = platform.wait(
        "evaluated", "Failed", lambda s: any((c.type, c.status) == ("Failed", "True") for c in s.conditions)
    )
    (failed,) = [condition for condition in status.conditions if condition.type == "Failed"]
    assert failed.reason == "EvaluationBelowThreshold"
    assert "CIDEr >= 100" in failed.message
    assert [stage.state for stage in status.stages] == ["Succeeded"] * 5 + ["Failed"] + ["Pending"] * 2
    assert not list_keys(platform.s3, f"{evaluated.output}/artifacts/manifest.json")
    assert "condition" in json.dumps(read_object(platform.s3, status.artifacts["report"]).decode()).lower()
    assert list_keys(platform.s3, status.artifacts["adapter"])


def test_retrieval_training_improves_recall(platform: Platform) -> None:
    """A retrieval model runs through the same stages on two nodes; two pods share preflight."""
    output = platform.apply("quickstart-retrieval", "retrieval", data={"preflight": {"workers": 2}})
    wait_for("both pods of preflight", lambda: len(platform.pods("retrieval", stage="preflight")) == 2)
    status = platform.follow("retrieval")
    ended = {pod.metadata.name: pod.status.phase for pod in platform.pods("retrieval", stage="preflight")}
    assert ended.pop("retrieval-preflight-0") == "Succeeded"
    assert ended in ({}, {"retrieval-preflight-1": "Succeeded"}), "one that still runs at the end is deleted"
    assert [stage.name for stage in status.stages] == [
        name for name in STAGES if name not in ("baseline-score", "score", "merge")
    ]
    assert status.evaluation is not None
    before, after = status.evaluation.baseline["photographs"], status.evaluation.final["photographs"]
    assert set(before) == set(after) == set(RETRIEVAL_METRICS)
    assert after["G_image_to_text_R1"] > before["G_image_to_text_R1"]
    assert after["C_text_to_image_R10"] > before["C_text_to_image_R10"]
    files = {file.path for file in verify_manifest(platform.s3, f"{output}/artifacts")}
    assert {"model/config.json", "model/tokenizer.model", "predictions/evaluate/photographs.jsonl"} <= files
