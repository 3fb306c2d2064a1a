"""Results in object storage after `kubectl apply` on two real nodes, disturbed and undisturbed."""

from __future__ import annotations

import pytest
from e2e.dashboards import PANELS_OF_FAULTS, empty_panels
from e2e.harness import CHECKPOINT, NAMESPACE, STEPS, ChildLog, Finished, Platform, assert_same_losses
from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster.shell import wait_for
from ivft_demo.data import BUCKET
from ivft_demo.results import learnt, list_keys, losses, verify_manifest

pytestmark = pytest.mark.e2e

FIRST_CHECKPOINT = 40  # its step


def test_lora_learns_and_publishes_an_adapter(platform: Platform, undisturbed: Finished) -> None:
    assert learnt(undisturbed.curve) < 0.7
    assert [each.step for each in undisturbed.curve] == list(range(1, 121)), "every step once, in order"
    published = verify_manifest(platform.s3, f"{undisturbed.output}/artifacts")
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "run.yaml"} <= {
        f.path for f in published
    }
    assert undisturbed.status.artifacts["adapter"] == f"{undisturbed.output}/artifacts/adapter"


def test_status_has_the_conditions_for_kubectl_wait_and_gitops(undisturbed: Finished) -> None:
    conditions = {condition.type: condition.status for condition in undisturbed.status.conditions}
    assert (conditions["Ready"], conditions["Reconciling"], conditions["Stalled"]) == ("True", "False", "False")
    assert [(stage.name, stage.state) for stage in undisturbed.status.stages] == [
        ("preflight", "Succeeded"),
        ("train", "Succeeded"),
        ("publish", "Succeeded"),
    ]
    assert undisturbed.status.progress is not None
    assert undisturbed.status.progress.step == 120
    assert (undisturbed.status.restarts.user, undisturbed.status.restarts.infrastructure) == (0, 0)


def test_prometheus_has_the_trainers_and_the_operators_series(platform: Platform, undisturbed: Finished) -> None:
    ask = platform.cluster.prometheus.query
    loss = ask('last_over_time(internvl_train_loss{pod=~"undisturbed-train-.*"}[1h])')
    assert max(float(series["value"][1]) for series in loss) > 0, "rank 0's loss was scraped while it trained"
    # the next scrape after the end of the run may take seconds
    wait_for("the operator counts the run", lambda: ask('internvl_operator_jobs{phase="Succeeded"} >= 1'))
    # preflight, two workers, publish; an operator that was started again counts from 0
    wait_for(
        "the operator has counted the run's pods",
        lambda: ask('sum(max_over_time(internvl_operator_api_writes_total{kind="Pod", result="ok"}[3h])) >= 4'),
    )


def test_prometheus_answers_every_query_of_the_dashboards(platform: Platform, undisturbed: Finished) -> None:
    assert set(empty_panels(platform.cluster.prometheus, NAMESPACE, "undisturbed")) <= PANELS_OF_FAULTS


@pytest.mark.soak  # test_failure_classes disturbs one run in more ways
def test_a_lost_worker_costs_no_step(platform: Platform, undisturbed: Finished) -> None:
    output = platform.apply("quickstart", "lost", training=STEPS, checkpoint=CHECKPOINT)
    platform.wait_checkpoint("runs/lost", FIRST_CHECKPOINT)
    platform.core.delete_namespaced_pod("lost-train-1", NAMESPACE, grace_period_seconds=0)
    status = platform.follow("lost")
    assert status.attempt >= 2
    assert status.restarts.user == 0, "the run is not to blame for a pod that somebody deleted"
    assert_same_losses(losses(platform.s3, output), undisturbed.curve)


def test_full_training_survives_the_operators_death(platform: Platform, child_log: ChildLog) -> None:
    output = platform.apply("quickstart-full", "full", training=STEPS, checkpoint=CHECKPOINT)
    platform.wait("full", "training", lambda status: status.stage == "train" and status.workers.active == 2)
    platform.kill_operator()
    platform.wait_checkpoint("runs/full", FIRST_CHECKPOINT)
    platform.kill_operator()
    status = platform.follow("full")
    assert learnt(losses(platform.s3, output)) < 0.7
    assert "model/config.json" in list_keys(platform.s3, f"{output}/artifacts")
    verify_manifest(platform.s3, f"{output}/artifacts")
    assert status.attempt == 1
    assert sorted(child_log.of("full").values()) == [1] * 6, f"one of each child, ever: {child_log.of('full')}"


def test_a_run_continues_after_a_mistake_is_corrected_outside_the_cr(platform: Platform) -> None:
    good = platform.s3.get_object(Bucket=BUCKET, Key="data/train.jsonl")["Body"].read()
    rows = good.decode().splitlines(keepends=True)
    broken = "".join([rows[0], '{"id": 1, "image": \n', *rows[2:]])
    platform.s3.put_object(Bucket=BUCKET, Key="data/late.jsonl", Body=broken.encode())
    data = {"train": {"late": {"annotation": f"s3://{BUCKET}/data/late.jsonl", "root": f"s3://{BUCKET}/data/"}}}
    platform.apply("quickstart", "late", data=data, secrets={"objectStorage": "late-keys"})

    def stalled(reason: str) -> str:
        status = platform.wait("late", f"Stalled: {reason}", lambda s: _condition(s, "Stalled")[:2] == ("True", reason))
        return _condition(status, "Stalled")[2]

    assert "spec.secrets.objectStorage" in stalled("SecretMissing")
    wrong = {
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "wrong",
        "AWS_ENDPOINT_URL": platform.cluster.s3_endpoint_inside,
    }
    platform.core.create_namespaced_secret(NAMESPACE, {"metadata": {"name": "late-keys"}, "stringData": wrong})
    denied = stalled("AccessDenied")
    assert f"s3://{BUCKET}" in denied
    assert "wrong" not in denied, "no secret in a message"
    right = platform.core.read_namespaced_secret("s3-credentials", NAMESPACE).data
    platform.core.patch_namespaced_secret("late-keys", NAMESPACE, {"data": right})
    assert "late.jsonl:2: not valid JSON" in stalled("InvalidJson")
    assert not [name for name in platform.children("late") if "train" in name], "no worker was asked for so far"
    platform.s3.put_object(Bucket=BUCKET, Key="data/late.jsonl", Body=good)
    platform.wait("late", "training", lambda status: status.stage == "train")
    platform.delete("late")


def _condition(status: InternVLFineTuneStatus, kind: str) -> tuple[str, str, str]:
    found = [(c.status, c.reason, c.message) for c in status.conditions if c.type == kind]
    return found[0] if found else ("", "", "")
