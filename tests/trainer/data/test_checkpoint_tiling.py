"""What the spec leaves open about tiles follows the checkpoint, and the fingerprint follows the values in use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from golden import checkpoint
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.fingerprint import fingerprint, identity
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.data.checkpoint_tiling import follow_checkpoint
from internvl_trainer.errors import UserError
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
from internvl_trainer.model.exported_config import trained_config
from internvl_trainer.stages.preflight import compare_tiling, read_settings
from trainer.contexts import context_of
from trainer.runs import make_config

OTHER = {"dynamic_image_size": False, "min_dynamic_patch": 2, "max_dynamic_patch": 3, "use_thumbnail": False}
FIELDS = {"dynamic": "dynamic_image_size", "minDynamicPatch": "min_dynamic_patch"}
FIELDS |= {"maxDynamicPatch": "max_dynamic_patch", "thumbnail": "use_thumbnail"}
NONE_SET = {"maxDynamicPatch": None}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    return Path(shutil.copytree(checkpoint("qwen2"), folder, ignore=shutil.ignore_patterns("*.npz")))


def say(model: Path, **values: Any) -> None:
    """Set fields of config.json; None removes one."""
    document = json.loads((model / "config.json").read_text()) | values
    (model / "config.json").write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def run_of(model: Path, **image: Any) -> RunConfig:
    return make_config(str(model.parent / "out"), model={"source": str(model)}, image=NONE_SET | image)


def follow(config: RunConfig) -> RunConfig:
    return follow_checkpoint(config, open_storage(config.output, field="spec.output"))


def tiling(config: RunConfig) -> dict[str, Any]:
    return dict(zip(OTHER, config.image.tiling, strict=True))


def test_what_is_not_set_follows_the_checkpoint(model: Path) -> None:
    say(model, **OTHER)
    settled = follow(run_of(model))
    assert tiling(settled) == OTHER
    assert compare_tiling(settled) == []
    settings = read_settings(settled, model)
    assert (settings.dynamic_tiles, settings.min_tiles, settings.max_tiles, settings.thumbnail) == (False, 2, 3, False)
    exported = trained_config(
        json.loads((model / "config.json").read_text()), settled, template="Hermes-2", image_size=56
    )
    assert {key: exported[key] for key in OTHER} == OTHER
    assert "maxDynamicPatch: 3" in settled.to_yaml()


@pytest.mark.parametrize(
    ("field", "value"), [("dynamic", True), ("minDynamicPatch", 3), ("maxDynamicPatch", 7), ("thumbnail", True)]
)
def test_what_the_spec_sets_wins_and_preflight_says_so(model: Path, field: str, value: Any) -> None:
    say(model, **OTHER)
    settled = follow(run_of(model, **{field: value}))
    assert tiling(settled) == OTHER | {FIELDS[field]: value}
    (finding,) = compare_tiling(settled)
    assert (finding.field, finding.reason) == (f"image.{field}", "TilingDiffers")


def test_a_published_model_in_either_format_is_followed(model: Path, tmp_path: Path) -> None:
    say(model, **OTHER)
    convert_checkpoint(model, tmp_path / "hf", "hf")
    settled = follow(run_of(tmp_path / "hf"))
    assert tiling(settled) == OTHER
    assert compare_tiling(settled) == []


def test_a_checkpoint_that_does_not_say_gets_the_catalogues_value(model: Path) -> None:
    say(model, **dict.fromkeys(OTHER))
    assert tuple(follow(run_of(model)).image.tiling) == (True, 1, 12, True)
    named = make_config("/out", model={"source": str(model), "name": "InternVL-Chat-V1-2-Plus"}, image=NONE_SET)
    assert follow(named).image.tiling.max_tiles == 1


def test_every_stage_works_with_the_settled_run(model: Path) -> None:
    say(model, **OTHER)
    assert tiling(context_of(run_of(model), "train").config) == OTHER


def test_a_run_that_has_begun_goes_on_without_its_checkpoint(model: Path) -> None:
    say(model, **OTHER)
    config = run_of(model)
    context_of(config, "train").stages.claim_output()
    shutil.rmtree(model)
    assert tiling(follow(config)) == OTHER
    assert fingerprint(follow(config)) == fingerprint(context_of(config, "publish").config)
    with pytest.raises(UserError, match="found no folder"):
        follow(run_of(model.with_name("another")))


@pytest.mark.parametrize("record", [None, "[]", "{", '{"identity": {"model": {}}}', '{"identity": 7}'])
def test_a_checkpoint_that_is_away_is_named_without_a_record(model: Path, record: str | None) -> None:
    config = run_of(model)
    if record is not None:
        Path(config.output).mkdir()
        (Path(config.output) / "run.json").write_text(record)
    shutil.rmtree(model)
    with pytest.raises(UserError, match="found no folder"):
        follow(config)


def test_a_run_that_sets_everything_reads_no_checkpoint() -> None:
    image = {"dynamic": True, "minDynamicPatch": 1, "maxDynamicPatch": 6, "thumbnail": True}
    config = make_config("/out", model={"source": "/not/there"}, image=image)
    assert follow(config) is config


@pytest.mark.parametrize("value", ["6", 0, -1, 65, 6.0, True, [6]])
def test_a_value_that_cannot_be_used_is_named(model: Path, value: Any) -> None:
    say(model, max_dynamic_patch=value)
    with pytest.raises(UserError) as refused:
        follow(run_of(model))
    assert refused.value.reason == "InvalidConfig"
    assert str(refused.value) == (
        f"{model / 'config.json'}: max_dynamic_patch is {value!r}, expected a whole number from 1 to 64; correct the "
        "file, or set spec.image.maxDynamicPatch"
    )
    follow(run_of(model, maxDynamicPatch=6))


def test_bounds_from_two_places_must_agree(model: Path) -> None:
    with pytest.raises(UserError, match="minDynamicPatch 8 exceeds maxDynamicPatch 6") as refused:
        follow(run_of(model, minDynamicPatch=8))
    assert refused.value.where == "spec.image"


def test_the_fingerprint_is_that_of_the_values(model: Path) -> None:
    usual = {"dynamic": True, "minDynamicPatch": 1, "maxDynamicPatch": 12, "thumbnail": True}
    explicit = run_of(model, **usual)
    assert identity(explicit)["image"] == {"videoFrames": 5}, "as before these fields could be left open"
    say(model, max_dynamic_patch=12)
    assert fingerprint(follow(run_of(model))) == fingerprint(explicit)
    say(model, max_dynamic_patch=6)
    followed = follow(run_of(model))
    assert identity(followed)["image"] == {"videoFrames": 5, "maxDynamicPatch": 6}
    assert fingerprint(followed) == fingerprint(run_of(model, maxDynamicPatch=6))
