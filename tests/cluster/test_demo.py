"""The demo's pieces on their own: its data, how it follows a run, how it checks a result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from internvl_api.constants import GROUP, PLURAL, VERSION
from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster.api_server import ApiServer
from ivft_cluster.s3 import S3Server
from ivft_cluster.shell import HarnessError
from ivft_demo.checkpoint import write_checkpoint
from ivft_demo.data import load_example, upload_demo_data
from ivft_demo.display import describe
from ivft_demo.follow import RunProblem, follow
from ivft_demo.photographs import write_dataset
from ivft_demo.results import Loss, ResultProblem, learnt, list_keys, losses, verify_manifest
from kubernetes import client
from PIL import Image


def test_dataset_is_forty_pictures_each_with_its_own_caption(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in write_dataset(tmp_path).read_text().splitlines()]
    captions = {row["conversations"][1]["value"] for row in rows}
    assert len(rows) == len(captions) == 40
    for row in rows:
        with Image.open(tmp_path / row["image"]) as picture:
            picture.load()
            assert min(picture.size) >= 40
            assert len(set(picture.resize((8, 8)).tobytes())) > 8, f"{row['image']} shows nothing"


def test_checkpoint_is_one_the_trainer_loads(tmp_path: Path) -> None:
    from internvl_trainer.model.load import load_chat_model

    loaded = load_chat_model(write_checkpoint(tmp_path / "model"))
    assert (loaded.kind, loaded.template, loaded.image_size) == ("qwen2", "Hermes-2", 56)
    assert loaded.upstream_config is not None


def test_unknown_example_is_answered_with_the_known_ones() -> None:
    with pytest.raises(HarnessError, match="quickstart-full"):
        load_example("quick-start")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        pytest.param({}, "Pending: waiting", id="not-seen-yet"),
        pytest.param(
            {"phase": "Running", "stage": "preflight", "progress": {"stage": "preflight", "detail": "checking rows"}},
            "Running: checking rows",
            id="a-stage-that-tells",
        ),
        pytest.param(
            {"phase": "Pending", "stage": "train", "progress": {"stage": "preflight", "detail": "checking rows"}},
            "Pending: waiting",
            id="words-of-the-stage-before",
        ),
        pytest.param(
            {
                "phase": "Running",
                "stage": "train",
                "progress": {
                    "stage": "train",
                    "step": 20,
                    "totalSteps": 60,
                    "loss": 4.6054,
                    "tokensPerSecond": 3120.4,
                    "etaSeconds": 12.2,
                },
            },
            "step 20/60  loss 4.605  3120 tokens/s  12 s left",
            id="training",
        ),
    ],
)
def test_progress_in_words(status: dict[str, Any], words: str) -> None:
    assert describe(InternVLFineTuneStatus.model_validate(status)) == words


def test_learning_is_measured_as_last_loss_divided_by_first_loss() -> None:
    curve = [Loss(step, loss) for step, loss in enumerate([8, 8, 8, 5, 2, 2, 2], start=1)]
    assert learnt(curve) == 0.25


# --- following


@pytest.fixture
def run(served: ApiServer) -> Iterator[WrittenRun]:
    """A run whose status the test writes in the operator's place."""
    with served.namespace() as namespace:
        yield WrittenRun(served.api, namespace)


class WrittenRun:
    """Creates the run; writes one status after the other, each as soon as the one before has been seen."""

    def __init__(self, api: Any, namespace: str) -> None:
        self.api, self.namespace, self.name = api, namespace, "quickstart"
        self.seen: list[str | None] = []
        self._custom: Any = client.CustomObjectsApi(api)
        resource = yaml.safe_load(load_example(self.name).manifest.read_text(encoding="utf-8"))
        self._custom.create_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, resource)

    def follow(self, *statuses: dict[str, Any] | None) -> InternVLFineTuneStatus:
        """The last status; None among `statuses` deletes the run."""
        waiting = list(statuses)

        def on_change(status: InternVLFineTuneStatus) -> None:
            self.seen.append(status.phase)
            if waiting:
                self.write(waiting.pop(0))

        return follow(self.api, self.name, self.namespace, on_change=on_change, timeout=30)

    def write(self, status: dict[str, Any] | None) -> None:
        place = (GROUP, VERSION, self.namespace, PLURAL, self.name)
        if status is None:
            self._custom.delete_namespaced_custom_object(*place)
        else:
            self._custom.patch_namespaced_custom_object_status(*place, {"status": status})


def condition(kind: str, status: str, reason: str, message: str) -> dict[str, str]:
    now = "2026-01-01T00:00:00Z"
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": now}


@pytest.mark.integration
def test_follow_sees_every_change_and_returns_the_last(run: WrittenRun) -> None:
    last = run.follow({"phase": "Pending"}, {"phase": "Running", "stage": "train"}, {"phase": "Succeeded"})
    assert run.seen == [None, "Pending", "Running", "Succeeded"]
    assert last.phase == "Succeeded"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("statuses", "told"),
    [
        pytest.param(
            [{"phase": "Stalled", "conditions": [condition("Stalled", "True", "ImageMissing", "a.jpg is absent")]}],
            "is Stalled: ImageMissing: a.jpg is absent",
            id="stalled",
        ),
        pytest.param(
            [
                {"phase": "Running"},
                {"phase": "Failed", "conditions": [condition("Failed", "True", "BackoffLimitExceeded", "3 of 3")]},
            ],
            "is Failed: BackoffLimitExceeded: 3 of 3",
            id="failed",
        ),
        pytest.param([{"phase": "Running"}, None], "was deleted", id="deleted"),
    ],
)
def test_follow_fails_with_the_operators_message(
    run: WrittenRun, statuses: list[dict[str, Any] | None], told: str
) -> None:
    with pytest.raises(RunProblem, match=told):
        run.follow(*statuses)


@pytest.mark.integration
def test_follow_goes_on_when_the_api_server_restarts(served: ApiServer, run: WrittenRun) -> None:
    restarts = [served.restart_apiserver]

    def on_change(status: InternVLFineTuneStatus) -> None:
        if restarts:
            restarts.pop()()
            run.write({"phase": "Succeeded"})

    assert follow(run.api, run.name, run.namespace, on_change=on_change, timeout=60).phase == "Succeeded"


@pytest.mark.integration
def test_follow_reports_a_missing_run(served: ApiServer) -> None:
    with pytest.raises(RunProblem, match="default/nobody does not exist"):
        follow(served.api, "nobody", timeout=5)


# --- results


@pytest.fixture(scope="module")
def storage(s3_server: S3Server) -> Any:
    upload_demo_data(s3_server)
    return s3_server.client()


def publish(storage: Any, folder: str, **files: bytes) -> str:
    """Files and their manifest, as the trainer writes them; the folder's URI."""
    entries = [
        {"path": name, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    ]
    for name, content in (*files.items(), ("manifest.json", json.dumps({"files": entries}).encode())):
        storage.put_object(Bucket="demo", Key=f"{folder}/{name}", Body=content)
    return f"s3://demo/{folder}"


@pytest.mark.integration
def test_uploaded_data_matches_the_examples(storage: Any) -> None:
    spec = yaml.safe_load(load_example("quickstart").manifest.read_text(encoding="utf-8"))["spec"]
    assert "config.json" in list_keys(storage, spec["model"]["source"])
    dataset = spec["data"]["train"]["photographs"]
    assert dataset["annotation"] == f"{dataset['root']}train.jsonl"
    assert sum(key.endswith(".jpg") for key in list_keys(storage, dataset["root"])) == 40


@pytest.mark.integration
def test_manifest_is_verified_against_what_is_stored(storage: Any) -> None:
    uri = publish(storage, "good", weights=b"abc", config=b"{}")
    assert {each.path for each in verify_manifest(storage, uri)} == {"weights", "config"}
    storage.put_object(Bucket="demo", Key="good/weights", Body=b"abd")
    with pytest.raises(ResultProblem, match="good/weights"):
        verify_manifest(storage, uri)


@pytest.mark.integration
def test_an_empty_manifest_is_an_error(storage: Any) -> None:
    with pytest.raises(ResultProblem, match="names no file"):
        verify_manifest(storage, publish(storage, "empty"))


@pytest.mark.integration
def test_losses_are_read_in_full_precision(storage: Any) -> None:
    lines = b'{"step": 1, "loss": 6.8950001, "epoch": 0.2}\n{"step": 2, "loss": 3.25, "epoch": 0.4}\n'
    storage.put_object(Bucket="demo", Key="runs/x/artifacts/metrics.jsonl", Body=lines)
    assert losses(storage, "s3://demo/runs/x") == [Loss(1, 6.8950001), Loss(2, 3.25)]
