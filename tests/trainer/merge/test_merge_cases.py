"""Merges of other bases, tile sizes and methods, and all that can go wrong; nothing is left that looks finished."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import ROUNDING, assert_close, assert_each_close
from golden import sample
from internvl_api.constants import ExitCode
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts import disk_space
from internvl_trainer.data.collate import collate
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_files import Adapter
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.stages.merge.chat import TOLERANCES, merge_chat_model
from safetensors.torch import load_file, save_file
from trainer.contexts import context_of
from trainer.merge.finished import expected_weights, finish_training, golden_base, trained_adapter, whole_logits
from trainer.merge.test_merge import BOTH, run, weights
from trainer.runs import environment, make_config, started, write_config
from transformers import AutoModelForImageTextToText

pytestmark = pytest.mark.slow

ADAPTER = "stages/train/adapter"


def checks(merged: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((merged / "manifest.json").read_text())["checks"]
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_is_rounded_once_to_the_dtype_of_the_base(dtype: torch.dtype, tmp_path: Path) -> None:
    base = golden_base("internlm2", tmp_path / "base", dtype)
    merged = run(trained_adapter(base, tmp_path / "out", merge=BOTH))
    expected = expected_weights(base, tmp_path / "out" / ADAPTER)
    for name, tensor in weights(merged / "model").items():
        assert tensor.dtype == dtype
        exact = expected[name]
        half_unit = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
        sum_in_fp32 = ROUNDING * exact.abs().max()
        assert bool(((tensor.double() - exact).abs() <= half_unit * 1.001 + sum_in_fp32).all()), name
    for check in checks(merged).values():
        assert check["tolerance"] == TOLERANCES[dtype]
        assert 1e-6 < check["difference"] < check["tolerance"] / 3


@pytest.mark.parametrize("kind", ["internlm2", "internlm2-vit6b", "qwen2"])
def test_another_tile_size_resizes_the_positions_as_training_did(kind: str, tmp_path: Path) -> None:
    base = golden_base(kind, tmp_path / "base")
    merged = run(trained_adapter(base, tmp_path / "out", image={"tileSize": 84}, merge=BOTH))
    trained = load_chat_model(base, dtype=torch.float32, image_size=84).model.vision_tower.embeddings
    name = "vision_model.embeddings.position_embedding"
    assert torch.equal(weights(merged / "model")[name], trained.position_embeddings)
    assert weights(merged / "model")[name].shape != weights(base)[name].shape
    config = json.loads((merged / "model/config.json").read_text())
    assert (config["force_image_size"], config["vision_config"]["image_size"]) == (84, 84)
    case = {"qwen2": "qwen2/Hermes-2"}.get(kind, f"{kind}/internlm2-chat")
    batch = collate([sample(case, 0, image_size=84, context_tokens=9)])
    loaded = load_chat_model(merged / "model", dtype=torch.float32)
    assert (loaded.image_size, loaded.context_tokens) == (84, 9)
    assert_close(whole_logits(merged / "model-hf", batch), whole_logits(merged / "model", batch))
    plain = AutoModelForImageTextToText.from_pretrained(merged / "model-hf", dtype=torch.float32)
    assert plain.config.vision_config.image_size == [84, 84]
    assert plain.config.image_seq_length == 9


@pytest.mark.parametrize("kind", ["internlm2", "phi3"])
def test_a_base_in_the_hf_format_becomes_the_same(kind: str, tmp_path: Path) -> None:
    upstream = golden_base(kind, tmp_path / "upstream")
    convert_checkpoint(upstream, tmp_path / "hf", "hf", shard_size=300_000)
    of_upstream = run(trained_adapter(upstream, tmp_path / "out", merge=BOTH))
    of_hf = run(trained_adapter(tmp_path / "hf", tmp_path / "out-hf", merge=BOTH))
    for name in ("model", "model-hf"):
        one, other = weights(of_upstream / name), weights(of_hf / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert json.loads((of_hf / name / "config.json").read_text()) == json.loads(
            (of_upstream / name / "config.json").read_text()
        )
    assert {path.name for path in (of_hf / "model").iterdir()} == {path.name for path in upstream.iterdir()}
    assert {path.name for path in (of_hf / "model-hf").glob("*.safetensors")} == {
        path.name for path in (tmp_path / "hf").glob("*.safetensors")
    }


def test_what_a_real_training_exports_is_merged(tmp_path: Path) -> None:
    """Adapters, the projector that learned beside them, and the note of the base."""
    base = golden_base("internlm2", tmp_path / "base")
    lora = {"languageRank": 4, "visionRank": 2, "dora": True}
    config = make_config(
        str(tmp_path / "out"), str(base), method="lora", lora=lora, merge=BOTH, training={"maxSteps": 3}
    )
    with started(
        ["train", "--config", str(write_config(config, tmp_path))], environment(tmp_path), tmp_path / "r"
    ) as stage:
        assert stage.wait() == ExitCode.OK, stage.output
    merged = run(config)
    expected, before = expected_weights(base, tmp_path / "out" / ADAPTER), weights(base)
    assert_each_close(weights(merged / "model"), expected)
    assert not torch.allclose(expected["mlp1.3.bias"], before["mlp1.3.bias"].double())
    (base / "config.json").write_text((base / "config.json").read_text() + "\n")
    shutil.rmtree(merged)
    broken(config, "BaseModelChanged")


def test_a_full_fine_tune_becomes_the_hf_form_too(tmp_path: Path) -> None:
    base = golden_base("internlm2", tmp_path / "base")
    config = make_config(str(tmp_path / "out"), str(base), merge=BOTH)
    trained = golden_base("internlm2", tmp_path / "trained")
    finish_training(config, {f"model/{path.name}": path for path in trained.iterdir()})
    merged = run(config)
    assert {path.name for path in merged.iterdir()} == {"model-hf", "manifest.json"}
    assert checks(merged)["model-hf"]["difference"] == 0.0
    batch = collate([sample("internlm2/internlm2-chat", 0)])
    assert torch.equal(whole_logits(merged / "model-hf", batch), whole_logits(trained, batch))


# --- what can go wrong ---


def broken(config: RunConfig, reason: str) -> UserError:
    """The refusal of a merge that leaves no manifest and keeps what was trained."""
    before = {path: path.read_bytes() for path in Path(config.output).rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        merge_chat_model(context_of(config, "merge"))
    assert caught.value.reason == reason
    assert not (Path(config.output) / "stages/merge/manifest.json").exists()
    for path, content in before.items():
        assert path.read_bytes() == content
    return caught.value


def test_a_base_that_changed_since_is_refused(tmp_path: Path) -> None:
    base = golden_base("qwen2", tmp_path / "base")
    config = trained_adapter(base, tmp_path / "out")
    shard = sorted(base.glob("*.safetensors"))[1]
    tensors = load_file(shard)
    tensors[min(tensors)] += 1e-3
    save_file(tensors, shard, metadata={"format": "pt"})
    error = broken(config, "BaseModelChanged")
    assert f"({shard.name} differs)" in error.message
    recorded = json.loads((tmp_path / "out/stages/train/manifest.json").read_text())["base"]["digest"]
    assert recorded in error.message


def test_without_a_finished_training_it_says_what_to_run(tmp_path: Path) -> None:
    config = trained_adapter(golden_base("qwen2", tmp_path / "base"), tmp_path / "out")
    (tmp_path / "out/stages/train/manifest.json").unlink()
    assert str(broken(config, "StageMissing")) == (
        f"spec.output: found no finished train stage of this run under {tmp_path}/out; "
        "run `internvl-trainer train` first"
    )


def test_a_damaged_adapter_is_refused(tmp_path: Path) -> None:
    config = trained_adapter(golden_base("qwen2", tmp_path / "base"), tmp_path / "out")
    path = tmp_path / "out" / ADAPTER / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert "adapter_model.safetensors has sha256" in broken(config, "ArtifactBroken").message


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    other = trained_adapter(golden_base("phi3", tmp_path / "phi3"), tmp_path / "other")
    base = golden_base("qwen2", tmp_path / "base")
    config = make_config(str(tmp_path / "out"), str(base), method="lora", merge={"formats": ["upstream"]})
    files = (Path(other.output) / ADAPTER).iterdir()
    finish_training(config, {f"adapter/{path.name}": path for path in files})
    error = broken(config, "AdapterMismatch")
    assert "gate_up_proj.weight; is this adapter for this model?" in error.message


@pytest.mark.parametrize(
    ("free", "message"),
    [
        pytest.param(
            10 << 20, "what was trained (adapter) needs 0.3 GiB there, 0.0 GiB are free", id="for the adapter"
        ),
        pytest.param((256 << 20) + 400_000, "a merged model needs 0.3 GiB there, 0.3 GiB are free", id="for the model"),
        pytest.param(
            400 << 20, "the merged model in 2 formats needs 0.5 GiB there, 0.4 GiB are free", id="for both formats"
        ),
    ],
)
def test_a_full_disk_is_named_before_any_work(
    free: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained_adapter(golden_base("qwen2", tmp_path / "base"), tmp_path / "out", merge=BOTH)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda _: usage._replace(free=free))
    error = broken(config, "DiskFull")
    assert message in error.message
    assert error.message.endswith("delete something, or give it a larger volume")
    assert error.where is not None
    assert Path(error.where).is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_another_fills_meanwhile_is_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.system(f"mount -t tmpfs -o size=700k tmpfs {small}") != 0:
        pytest.skip("no file system can be mounted here")
    try:
        config = trained_adapter(golden_base("qwen2", tmp_path / "base"), tmp_path / "out")
        monkeypatch.setenv("TMPDIR", str(small))
        monkeypatch.setattr("tempfile.tempdir", None)
        for module in ("chat", "shared"):  # there was room when it looked
            monkeypatch.setattr(f"internvl_trainer.stages.merge.{module}.check_space", lambda *_: None)
        assert broken(config, "DiskFull").message.startswith("the disk is full; a merged model needs 0.3 GiB there")
        assert list(small.iterdir()) == []
    finally:
        os.system(f"umount {small}")


def forget_the_adapter(self: Adapter, module: str, weight: torch.Tensor) -> torch.Tensor:
    return weight


def turn_one_weight(self: Adapter, module: str, weight: torch.Tensor) -> torch.Tensor:
    return weight.flip(0) if module == TURNED else MERGE(self, module, weight)


MERGE, TURNED = Adapter.merge, "model.language_model.layers.1.mlp.down_proj"
FIRST = "model.language_model.layers.0.mlp.gate_proj"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize(("fault", "tensor"), [(forget_the_adapter, FIRST), (turn_one_weight, TURNED)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_tensor_is_not_kept(
    dtype: torch.dtype, fault: Callable[..., torch.Tensor], tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However little the adapter moves the logits."""
    config = trained_adapter(golden_base("internlm2", tmp_path / "base", dtype), tmp_path / "out", scale=0.02)
    monkeypatch.setattr(Adapter, "merge", fault)
    assert str(broken(config, "MergeCheckFailed")) == (
        f"model/: tensor {tensor}.weight is not the base's with what was learned in it; the written model is not kept. "
        "What was trained is whole: run merge again, on another machine if it fails again"
    )
    assert not (tmp_path / "out/stages/merge").exists()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_with_other_logits_is_not_kept(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = trained_adapter(golden_base("internlm2", tmp_path / "base", dtype), tmp_path / "out")
    monkeypatch.setattr(Adapter, "merge", forget_the_adapter)
    monkeypatch.setattr("internvl_trainer.stages.merge.chat.find_wrong_tensor", lambda *_: None)
    message = str(broken(config, "MergeCheckFailed"))
    assert message.startswith(f"model/: the logits on {config.data.train['golden'].annotation}:1 differ from the ")
    assert not (tmp_path / "out/stages/merge").exists()


def test_an_adapter_that_rounding_hides_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = golden_base("internlm2", tmp_path / "base", torch.bfloat16)
    run(trained_adapter(base, tmp_path / "out", scale=1e-3))
    assert "rounding hides much of what was learned" in caplog.text


def test_a_killed_merge_starts_anew_and_ends_the_same(tmp_path: Path) -> None:
    base = golden_base("internlm2", tmp_path / "base")
    config = trained_adapter(base, tmp_path / "out", merge=BOTH)
    env, arguments = environment(tmp_path), ["merge", "--config", str(write_config(config, tmp_path))]
    for moment in ("storing model/", "checking model-hf/"):
        with started(arguments, env, tmp_path / "result") as stage:
            stage.wait_for(moment)
            stage.stop(signal.SIGKILL)
            assert stage.wait() == -signal.SIGKILL
        assert not (tmp_path / "out/stages/merge/manifest.json").exists()
    with started(arguments, env, tmp_path / "result") as stage:
        assert stage.wait() == ExitCode.OK, stage.output
        assert (stage.result.reason, set(stage.result.artifacts)) == ("Merged", {"model", "modelHf"})
    merged = tmp_path / "out/stages/merge"
    expected = expected_weights(base, tmp_path / "out" / ADAPTER)
    assert_each_close(weights(merged / "model"), expected)
    with started(arguments, env, tmp_path / "result") as stage:
        assert stage.wait() == ExitCode.OK, stage.output
        assert stage.result.reason == "AlreadyDone"
