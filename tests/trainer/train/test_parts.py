"""The pure parts of training: schedule, DeepSpeed configuration, order of the data, identity, metrics."""

from __future__ import annotations

import json
import re
import urllib.request
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from internvl_api.run_config import RunConfig
from internvl_api.spec import Training
from internvl_api.status import CheckpointStatus
from internvl_trainer.artifacts.fingerprint import fingerprint
from internvl_trainer.data.sampler import GlobalOrder, Position, count_steps
from internvl_trainer.distributed import free_port
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.train.deepspeed_config import deepspeed_config, fit_buckets
from internvl_trainer.train.engine import parameter_groups, seed_micro_batch
from internvl_trainer.train.schedule import learning_rate, warmup_steps
from internvl_trainer.train.step_report import straggler
from trainer.contexts import store_of
from trainer.runs import GOLDEN, make_config
from transformers import get_scheduler


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.03), (7, 0.0), (1106, 0.03), (10, 0.5)])
def test_learning_rates_are_those_of_transformers(schedule: Any, steps: int, warmup: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-5)
    theirs = get_scheduler(schedule, optimizer, int(np.ceil(steps * warmup)), steps)
    ours = warmup_steps(Training(warmup_ratio=warmup), steps)
    for step in range(steps):
        expected = theirs.get_last_lr()[0]
        found = learning_rate(step, steps, 4e-5, ours, schedule)
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-20)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"warmup_ratio": 0.2}, id="a part of all steps"),
        pytest.param({"warmup_ratio": 0.9, "warmup_steps": 2}, id="steps take the place of a part"),
    ],
)
def test_a_constant_rate_warms_up_and_stays(given: dict[str, Any]) -> None:
    rates = [learning_rate(step, 10, 1.0, warmup_steps(Training(**given), 10), "constant") for step in range(10)]
    assert rates == [0.0, 0.5] + [1.0] * 8


def test_a_users_deepspeed_settings_are_merged_key_by_key() -> None:
    overrides = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}, "gradient_clipping": 0.5}
    result = deepspeed_config(make_config("/out", training={"deepspeed": overrides}), 1)
    assert result["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert result["zero_optimization"]["stage"] == 1
    assert result["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("trainable", "fitted"),
    [
        pytest.param(125_829_120, 125_829_120, id="adapter"),
        pytest.param(31, 32, id="odd"),
        pytest.param(2_000_000_000, 1_000_000_000, id="large model"),
    ],
)
def test_no_bucket_is_larger_than_all_gradients(trainable: int, fitted: int) -> None:
    for stage, keys in ((1, ("reduce_bucket_size", "allgather_bucket_size")), (3, ("reduce_bucket_size",))):
        settings = deepspeed_config(make_config("/out", training={"zeroStage": stage}), 1)
        result = fit_buckets(settings, trainable)
        zero, usual = result["zero_optimization"], settings["zero_optimization"]
        assert {**zero, **{key: usual[key] for key in keys}} == usual, "nothing else changes"
        assert [zero[key] for key in keys] == [fitted] * len(keys)
        assert zero.keys() == usual.keys()
        assert {**result, "zero_optimization": usual} == settings


def test_vectors_do_not_decay_unless_upstream_is_to_be_matched() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
    decayed, kept = parameter_groups(model, 0.1, decay_all=False)
    assert [parameter.shape for parameter in decayed["params"]] == [(2, 2)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    (everything,) = parameter_groups(model, 0.1, decay_all=True)
    assert len(everything["params"]) == 4


def test_dropout_depends_on_the_place_in_the_run_alone() -> None:
    def draw(step: int, number: int) -> float:
        seed_micro_batch(42, step, number)
        return float(torch.rand(1))

    draws = {(step, number): draw(step, number) for step in range(5) for number in range(5)}
    assert len(set(draws.values())) == 25
    assert draw(3, 2) == draws[3, 2]


def everything(order: GlobalOrder, first: int, steps: int, world_size: int, micro_batch: int) -> list[list[Position]]:
    """Each global batch, put together from what the ranks get."""
    ranks = [
        list(chain(*order.windows(first, steps, rank=rank, world_size=world_size, micro_batch=micro_batch)))
        for rank in range(world_size)
    ]
    rounds = [[draw for part in parts for draw in part] for parts in zip(*ranks, strict=True)]
    per_step = len(rounds) // (steps - first)
    return [list(chain(*rounds[start : start + per_step])) for start in range(0, len(rounds), per_step)]


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 1), (2, 1), (4, 2), (1, 8), (2, 4)])
def test_any_world_draws_the_same_batches_in_the_same_order(world_size: int, micro_batch: int) -> None:
    order = GlobalOrder(rows=37, global_batch=8, seed=1)
    assert everything(order, 0, 20, world_size, micro_batch) == [order.batch(step) for step in range(20)]


def test_each_epoch_has_every_row_once_in_another_order() -> None:
    order = GlobalOrder(rows=37, global_batch=8, seed=1)
    draws = [draw for step in range(14) for draw in order.batch(step)]
    epochs = [[draw.row for draw in draws if draw.epoch == epoch] for epoch in (0, 1, 2)]
    assert [sorted(rows) for rows in epochs] == [list(range(37))] * 3
    assert epochs[0] != epochs[1]
    assert [draw.epoch for draw in draws] == [0] * 37 + [1] * 37 + [2] * 37 + [3]


def test_resuming_goes_on_where_it_stopped() -> None:
    order = GlobalOrder(rows=10, global_batch=4, seed=7)
    whole = everything(order, 0, 9, 2, 1)
    assert everything(GlobalOrder(rows=10, global_batch=4, seed=7), 5, 9, 2, 1) == whole[5:]


def test_grouping_by_length_makes_batches_of_like_rows() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    grouped, plain = (GlobalOrder(4000, 8, 3, given) for given in (lengths, None))

    def spread(order: GlobalOrder) -> float:
        return float(np.mean([np.ptp(lengths[[draw.row for draw in order.batch(step)]]) for step in range(500)]))

    assert spread(grouped) < 0.1 * spread(plain)
    assert sorted(draw.row for step in range(500) for draw in grouped.batch(step)) == list(range(4000))


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "limit", "expected"),
    [
        pytest.param(566_747, 512, 1.0, None, 1106, id="the guide's COCO run"),
        pytest.param(100, 10, 2.5, None, 25, id="part of an epoch"),
        pytest.param(3, 16, 1.0, None, 1, id="fewer rows than a batch"),
        pytest.param(100, 10, 1.0, 4, 4, id="maxSteps ends it"),
        pytest.param(100, 10, 1.0, 40, 10, id="maxSteps does not prolong"),
    ],
)
def test_number_of_steps(rows: int, batch: int, epochs: float, limit: int | None, expected: int) -> None:
    assert count_steps(rows, batch, epochs, limit) == expected


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        pytest.param({"training": {"learningRate": 1.0e-4}}, "spec.training.learningRate", id="learning rate"),
        pytest.param({"method": "lora"}, "spec.lora", id="method"),
        pytest.param({"image": {"maxDynamicPatch": 3}}, "spec.image.maxDynamicPatch", id="tiles"),
        pytest.param({"model": {"source": "/other"}}, "spec.model.source", id="model"),
        pytest.param({"data": {"meta": "/meta.json"}}, "spec.data.meta", id="data"),
        pytest.param({"training": {"seed": 1}}, "spec.training.seed", id="seed"),
        pytest.param({"training": {"zeroStage": 3, "microBatchSize": 2, "dataWorkers": 9}}, None, id="speed only"),
        pytest.param({"workers": 4}, None, id="workers"),
        pytest.param({"checkpoint": {"everySteps": 1, "keep": 9}}, None, id="checkpoints"),
        pytest.param(
            {"checkpoint": {"keepBest": True}, "data": {"validation": {"a": {"annotation": "/held.jsonl"}}}},
            "spec.checkpoint",
            id="the best step",
        ),
        pytest.param(
            {"training": {"earlyStopping": {}}, "data": {"validation": {"a": {"annotation": "/held.jsonl"}}}},
            "spec.data.validation",
            id="early stopping",
        ),
    ],
)
def test_another_run_is_told_from_another_attempt(tmp_path: Path, changes: Any, difference: str | None) -> None:
    ours, theirs = make_config(str(tmp_path)), make_config(str(tmp_path), **changes)
    store_of(ours).check_output()
    store_of(theirs).claim_output()
    if difference is None:
        assert fingerprint(ours) == fingerprint(theirs)
        store_of(ours).check_output()
        return
    assert fingerprint(ours) != fingerprint(theirs)
    with pytest.raises(UserError) as caught:
        store_of(ours).check_output()
    assert caught.value.reason == "OutputHoldsAnotherRun"
    assert f"differs in {difference}" in caught.value.message


HELD_OUT = {"held": {"annotation": str(GOLDEN / "data" / "samples.jsonl")}}


@pytest.mark.parametrize(
    ("chooses", "changes", "difference"),
    [
        pytest.param(False, {"evaluation": {"everySteps": 2}}, None, id="losses that are only shown"),
        pytest.param(True, {"evaluation": {"everySteps": 2}}, "spec.evaluation.everySteps", id="when they are taken"),
        pytest.param(True, {"checkpoint": {"everySteps": 2}}, "spec.evaluation.everySteps", id="the default of that"),
        pytest.param(True, {"data": {"validation": {"other": HELD_OUT["held"]}}}, "spec.data.validation", id="rows"),
        pytest.param(True, {"checkpoint": {"keep": 9}}, None, id="how many are kept"),
    ],
)
def test_what_chooses_the_exported_step_tells_runs_apart(
    tmp_path: Path, chooses: bool, changes: Any, difference: str | None
) -> None:
    base: dict[str, Any] = {"data": {"validation": HELD_OUT}, "checkpoint": {"everySteps": 5, "keepBest": chooses}}
    merged = {name: {**base.get(name, {}), **changes.get(name, {})} for name in {*base, *changes}}
    ours, theirs = make_config(str(tmp_path), **base), make_config(str(tmp_path), **merged)
    assert (fingerprint(ours) == fingerprint(theirs)) is (difference is None)
    store_of(theirs).claim_output()
    if difference:
        with pytest.raises(UserError, match=f"differs in {re.escape(difference)}"):
            store_of(ours).check_output()


def test_changed_held_out_rows_are_noticed_where_they_choose_the_exported_step(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    data = {"validation": {"held": {"annotation": str(held)}}}
    for keeps, noticed in ((True, True), (False, False)):
        config = make_config(str(tmp_path / f"{keeps}"), data=data, checkpoint={"keepBest": keeps})
        held.write_text("{}\n")
        store_of(config).claim_output()
        held.write_text("{}\n{}\n")
        if noticed:
            with pytest.raises(UserError, match=r"spec\.data\.validation\.held\.annotation .* has changed"):
                store_of(config).check_output(reads_rows=True)
        else:
            store_of(config).check_output(reads_rows=True)


def test_a_version_with_a_new_field_knows_the_runs_of_an_older_one(tmp_path: Path) -> None:
    class NewTraining(Training):
        brand_new: bool = False

    config = make_config(str(tmp_path))
    newer = config.model_copy(update={"training": NewTraining(**config.training.model_dump())})
    assert fingerprint(newer) == fingerprint(config)
    changed = newer.model_copy(update={"training": newer.training.model_copy(update={"brand_new": True})})
    store_of(config).claim_output()
    with pytest.raises(UserError, match=r"spec\.training\.brandNew: it has the default, this run True"):
        store_of(changed).check_output()


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        body: bytes = answer.read()
        return body.decode()


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    port = free_port()
    monkeypatch.setenv("INTERNVL_METRICS_PORT", str(port))
    return port


def test_metrics_and_progress_over_http(port: int) -> None:
    reporter = Reporter("team/run", "train")
    reporter.serve()
    try:
        reporter.loss.set(1.25)
        reporter.data_wait.inc(2)
        reporter.update(step=3, total_steps=10, loss=1.25)
        reporter.checkpoint = CheckpointStatus(step=2, uri="s3://b/c", sha256="0" * 64, verified_at="now")
        progress = json.loads(get(port, "/progress"))
        metrics = get(port, "/metrics")
        assert get(port, "/healthz") == "ok\n"
    finally:
        reporter.close()
    assert (progress["step"], progress["totalSteps"], progress["checkpoint"]["step"]) == (3, 10, 2)
    assert 'internvl_train_loss{job_name="run",job_namespace="team"} 1.25' in metrics
    assert 'internvl_train_data_wait_seconds_total{job_name="run",job_namespace="team"} 2.0' in metrics


def test_every_process_says_where_in_its_step_it_is(port: int) -> None:
    reporter = Reporter("team/run", "train")
    reporter.serve(local_rank=1)
    try:
        assert "heartbeat" not in json.loads(get(port + 1, "/progress"))
        reporter.update(step=3)
        reporter.enter("data")
        reporter.enter("meeting")
        said = json.loads(get(port + 1, "/progress"))
    finally:
        reporter.close()
    assert (said["step"], said["heartbeat"]["phase"]) == (3, "meeting")
    assert 0 <= said["heartbeat"]["idleSeconds"] < 60


@pytest.mark.parametrize(
    ("waits", "rank"),
    [
        pytest.param([0.0, 0.3], 1, id="one of two"),
        pytest.param([0.0, 0.05], None, id="not worth a word"),
        pytest.param([0.4, 0.4, 0.4, 0.4], None, id="all wait alike"),
        pytest.param([0.1, 0.1, 0.9, 0.8], 2, id="the worst of two late ones"),
        pytest.param([2.0], None, id="alone"),
    ],
)
def test_the_rank_that_the_others_wait_for(waits: list[float], rank: int | None) -> None:
    assert straggler(waits, step_seconds=1.0) == rank


def test_a_taken_port_does_not_stop_training(port: int, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Reporter("a/b", "train"), Reporter("a/b", "train")
    first.serve()
    try:
        second.serve()
    finally:
        first.close()
    assert f"port {port} cannot be used" in caplog.text


def test_run_config_survives_yaml(tmp_path: Path) -> None:
    config = make_config("/out")
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert fingerprint(RunConfig.load(path)) == fingerprint(config)
