"""Names of children: valid, stable and different for different runs, whatever a user calls a run."""

import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from internvl_api.status import StageName
from internvl_operator.core.resources import names

DNS_LABEL = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
DNS_1035_LABEL = re.compile(r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$")  # a Service's name
LABEL_VALUE = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$")
PART = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,60}[a-z0-9])?", fullmatch=True)
JOB_NAME = st.lists(PART, min_size=1, max_size=8).map(".".join).filter(lambda name: len(name) <= 253)


@pytest.mark.parametrize(
    ("run", "pod", "service"),
    [
        pytest.param("coco-lora", "coco-lora-train-0", "ivft-coco-lora", id="as-it-is"),
        pytest.param("7b", "7b-train-0", "ivft-7b", id="leading-digit"),
        pytest.param("v1.5", "v1-5-23a9684d-train-0", "ivft-v1-5-23a9684d", id="dots"),
        pytest.param("x-baseline", "x-baseline-bac1a4ef-train-0", "ivft-x-baseline-bac1a4ef", id="ends-as-a-stage"),
        pytest.param(
            "x" * 253, "x" * 29 + "-1329e1bd-train-0", "ivft-" + "x" * 29 + "-1329e1bd", id="longest-possible"
        ),
    ],
)
def test_names_a_user_will_see(run: str, pod: str, service: str) -> None:
    assert names.pod(run, "train", 0) == pod
    assert names.service(run) == service
    assert names.master_address(run, "train") == f"{pod}.{service}"


@given(JOB_NAME, st.sampled_from(["preflight", "train", "publish", "baseline-evaluate"]), st.integers(0, 1023))
def test_every_name_is_valid(run: str, stage: str, rank: int) -> None:
    assert DNS_LABEL.match(names.pod(run, stage, rank))
    assert DNS_1035_LABEL.match(names.service(run))
    assert DNS_LABEL.match(names.config_map(run))
    assert LABEL_VALUE.match(names.run_label(run))
    for value in names.worker_labels(run, "uid", stage, 7, rank).values():
        assert LABEL_VALUE.match(value)


@given(JOB_NAME, JOB_NAME)
def test_different_runs_have_different_names(one: str, other: str) -> None:
    same = names.pod(one, "train", 0) == names.pod(other, "train", 0)
    assert same == (one == other)
    assert (names.run_label(one) == names.run_label(other)) == (one == other)


NEAR = st.sampled_from(["x", "x-baseline", "x-baseline-evaluate", "x-train", "x-train-0", "v1.5", "v1-5-23a9684d"])
STAGE = st.sampled_from(get_args(StageName))


@pytest.mark.slow
@settings(max_examples=500)
@given(JOB_NAME | NEAR, STAGE, st.integers(0, 1023), JOB_NAME | NEAR, STAGE, st.integers(0, 1023))
def test_two_workers_never_have_the_same_name(
    one: str, stage: str, rank: int, other: str, other_stage: str, other_rank: int
) -> None:
    same = names.pod(one, stage, rank) == names.pod(other, other_stage, other_rank)
    assert same == ((one, stage, rank) == (other, other_stage, other_rank))


def test_no_stage_of_a_run_has_the_name_of_another_runs_stage() -> None:
    runs = ["x", "x-baseline", "x-baseline-evaluate", "v1.5", "v1-5-23a9684d", names.base("v1-5-23a9684d")]
    made = [names.pod(run, stage, 0) for run in runs for stage in get_args(StageName)]
    assert len(set(made)) == len(made)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(("a.b", "a-b"), id="dot-and-dash"),
        pytest.param(("x" * 60 + "a", "x" * 60 + "b"), id="same-beginning"),
    ],
)
def test_names_that_look_alike_stay_apart(pair: tuple[str, str]) -> None:
    assert names.base(pair[0]) != names.base(pair[1])
