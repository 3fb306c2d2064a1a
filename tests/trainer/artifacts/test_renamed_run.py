"""A run made again under another name: its output is its own, and no stage is done twice."""

from pathlib import Path

import pytest
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName
from internvl_trainer.artifacts.fingerprint import fingerprint
from trainer.contexts import store_of


def config(output: Path, name: str, uid: str) -> RunConfig:
    spec = {
        "recipe": "internvl2-2b-lora",
        "data": {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}},
        "output": str(output),
    }
    return resolve(parse_spec(spec), job=f"team-a/{name}", job_uid=uid)


@pytest.mark.parametrize("stage", StageName.__args__)
def test_a_stage_is_known_whatever_the_runs_name(stage: StageName, tmp_path: Path) -> None:
    old, new = config(tmp_path, "old", "uid-1"), config(tmp_path, "new", "uid-2")
    assert fingerprint(old, stage) == fingerprint(new, stage)


def test_the_output_is_taken_over(tmp_path: Path) -> None:
    old, new = config(tmp_path, "old", "uid-1"), config(tmp_path, "new", "uid-2")
    store_of(old).claim_output()
    store_of(new).check_output()
