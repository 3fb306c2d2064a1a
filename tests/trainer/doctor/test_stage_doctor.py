"""The stage `doctor`: what it stores, and how a node that fails ends it."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from internvl_api.spec.doctor import EXPECT_PATTERN
from internvl_trainer.distributed import free_port
from internvl_trainer.doctor.expectations import Expectations, parse_expectations
from internvl_trainer.stages.doctor import expectations_of
from trainer.runs import environment, make_config, pod_environment, started, write_config


def test_the_field_takes_what_the_option_takes() -> None:
    text = "gpus=8,memory=80Gi,nvlink=18,allreduce=200GB,disk=1.5G,storage=500MB,free=1Ti,shm=16Gi"
    assert re.fullmatch(EXPECT_PATTERN, text)
    assert set(re.findall(r"\w+(?==)", text)) == set(vars(parse_expectations(text)))
    wrong = ("", "gpu=8", "gpus=8,", "memory=big", "gpus=8;x", "memory=0", "disk=0.0", "shm=1iB", "free=" + "9" * 19)
    assert not any(re.fullmatch(EXPECT_PATTERN, text) for text in wrong)


@settings(max_examples=300, derandomize=True, database=None)
@given(st.from_regex(f"{EXPECT_PATTERN[:-1]}\\Z"))
def test_what_the_schema_accepts_is_understood(text: str) -> None:
    names = [part.partition("=")[0] for part in text.split(",")]
    assume(len(set(names)) == len(names))
    parse_expectations(text)


def test_the_gpus_of_a_worker_are_expected(tmp_path: Path) -> None:
    config = make_config(str(tmp_path), doctor={"enabled": True, "expect": "memory=40Gi"})
    on_gpus = config.model_copy(update={"device": "cuda", "processes_per_worker": 8})
    assert expectations_of(on_gpus) == Expectations(gpus=8, memory=40 * 2**30)
    assert expectations_of(config).gpus == 0


@pytest.mark.slow
def test_every_workers_rows_are_stored_and_a_failure_blames_the_node(tmp_path: Path) -> None:
    output = tmp_path / "output"
    config = make_config(str(output), workers=2, doctor={"enabled": True})
    path = write_config(config, tmp_path)
    port = free_port()
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                started(
                    ["doctor", "--config", str(path)],
                    environment(tmp_path / str(rank), **pod_environment(rank, 2, port)),
                    tmp_path / f"result-{rank}.json",
                )
            )
            for rank in range(2)
        ]
        assert [worker.wait() for worker in workers] == [0, 0], workers[0].output
    assert workers[0].result.message.startswith("2 workers: ")
    stored = json.loads((output / "stages/doctor/doctor.json").read_text(encoding="utf-8"))
    assert len(stored["workers"]) == 2
    for rows in stored["workers"]:
        assert {"all workers", "storage", "clock", "bf16"} <= {row["name"] for row in rows}
    assert list(output.glob("doctor-*")) == []

    wants_more = make_config(str(output), doctor={"enabled": True, "expect": "free=9000Ti"})
    path = write_config(wants_more, tmp_path)
    with started(["doctor", "--config", str(path)], environment(tmp_path), tmp_path / "result.json") as failing:
        assert failing.wait() == 1
    assert failing.result.reason == "NodeUnfit"
    assert "1 check failed on this node: disk: " in failing.result.message
    assert not (output / "stages/doctor/manifest.json").exists()
