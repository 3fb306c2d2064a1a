"""An adapter knows its base model: by its weights, wherever they lie and in whichever format."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import KINDS, checkpoint, load
from internvl_api.constants import ExitCode
from internvl_trainer.__main__ import main
from internvl_trainer.errors import UserError
from internvl_trainer.model.adapter_base import (
    AdapterBase,
    check_adapter_base,
    identify_base,
    read_adapter_base,
    weights_digest,
)
from internvl_trainer.model.adapter_files import read_adapter, save_adapter
from internvl_trainer.model.adapters import LoraSettings, apply_method
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
from internvl_trainer.model.trained_weights import read_trained_weights
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from trainer.merge.finished import golden_base

WEIGHTS = "model.safetensors"


def copy_of(kind: str, folder: Path) -> Path:
    return Path(shutil.copytree(checkpoint(kind), folder, ignore=shutil.ignore_patterns("*.npz")))


def digest(directory: Path) -> str:
    return weights_digest(open_checkpoint(directory))


def adapter_of(base: Path, folder: Path, kind: str = "qwen2") -> Path:
    """An adapter that records its base."""
    loaded = load(kind)
    apply_method(loaded.model, "lora", lora=LoraSettings(4))
    save_adapter(loaded.model, folder, base=identify_base(open_checkpoint(base), "hf://OpenGVLab/InternVL2-1B"))
    return folder


@pytest.mark.parametrize("kind", ["qwen2", "internlm2", "phi3"])
def test_one_model_has_one_digest_in_every_form(kind: str, tmp_path: Path) -> None:
    wanted = digest(checkpoint(kind))
    convert_checkpoint(checkpoint(kind), tmp_path / "hf", "hf")
    assert digest(tmp_path / "hf") == wanted
    assert digest(golden_base(kind, tmp_path / "shards")) == wanted
    assert digest(golden_base(kind, tmp_path / "bf16", torch.bfloat16)) == wanted


def test_every_model_has_its_own_digest() -> None:
    assert len({digest(checkpoint(kind)) for kind in KINDS}) == len(KINDS)


def test_training_changes_the_digest(tmp_path: Path) -> None:
    """Any tensor's change is seen, also one of a single vector or of a fused projection."""
    base = copy_of("internlm2", tmp_path / "base")
    tensors, before = load_file(base / WEIGHTS), digest(base)
    for part in ("wqkv.weight", "norm1.weight", "mlp1.3.bias", "tok_embeddings.weight", "position_embedding"):
        name = next(name for name in tensors if name.endswith(part))
        save_file(tensors | {name: tensors[name] * 1.02 + 0.001}, base / WEIGHTS, metadata={"format": "pt"})
        assert digest(base) != before, name


def test_an_adapter_of_another_base_is_refused_with_both(tmp_path: Path) -> None:
    base, other = copy_of("qwen2", tmp_path / "base"), copy_of("qwen2", tmp_path / "other")
    tensors = load_file(other / WEIGHTS)
    save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, other / WEIGHTS, metadata={"format": "pt"})
    adapter = adapter_of(base, tmp_path / "adapter")
    check_adapter_base(adapter, open_checkpoint(base))
    with pytest.raises(UserError) as refused:
        read_trained_weights(adapter, open_checkpoint(other), positions=17)
    assert refused.value.reason == "AdapterMismatch"
    assert str(refused.value) == (
        f"{adapter}: the adapter was trained on OpenGVLab/InternVL2-1B (weights {digest(base)[:12]}), and {other} has "
        f"other weights ({digest(other)[:12]}); use the model that the adapter was trained on"
    )


def test_chat_refuses_an_adapter_of_a_model_of_equal_shapes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    base = copy_of("qwen2", tmp_path / "base")
    adapter = adapter_of(base, tmp_path / "adapter")
    words = ["chat", "--model", str(base), "--adapter", str(adapter), "--question", "what?", "--max-new-tokens", "2"]
    assert main(words) == ExitCode.OK
    tensors = load_file(base / WEIGHTS)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, base / WEIGHTS, metadata={"format": "pt"})
    assert main(words) == ExitCode.USER_ERROR
    assert "AdapterMismatch" in capsys.readouterr().err


def _forget(config: dict[str, object]) -> None:
    config["auto_mapping"] = None


def _distort(config: dict[str, object]) -> None:
    config["auto_mapping"] = {"base_model_digest": 7}


def _replace(config: dict[str, object]) -> None:
    config["auto_mapping"] = ["base_model_digest"]


@pytest.mark.parametrize("change", [_forget, _distort, _replace])
def test_an_adapter_without_a_base_is_a_warning(
    change: Callable[[dict[str, object]], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = adapter_of(checkpoint("qwen2"), tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    change(config)
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with caplog.at_level(logging.WARNING):
        check_adapter_base(adapter, open_checkpoint(checkpoint("internlm2")))
    assert "does not record the model that it was trained on" in caplog.text


@pytest.mark.parametrize(
    ("source", "name", "revision"),
    [
        ("hf://OpenGVLab/InternVL2-1B@4e1c", "OpenGVLab/InternVL2-1B", "4e1c"),
        ("hf://OpenGVLab/InternVL2-1B", "OpenGVLab/InternVL2-1B", None),
        ("/models/a@b", "/models/a@b", None),
        ("s3://models/base", "s3://models/base", None),
    ],
)
def test_the_base_is_named_as_peft_names_models(source: str, name: str, revision: str | None) -> None:
    fields = AdapterBase(source, "d1").in_config(object())
    assert (fields["base_model_name_or_path"], fields["revision"]) == (name, revision)


def test_peft_reads_the_record_without_a_warning(tmp_path: Path) -> None:
    adapter = adapter_of(checkpoint("qwen2"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = LoraConfig.from_pretrained(str(adapter))
    assert config.base_model_name_or_path == "OpenGVLab/InternVL2-1B"
    assert config.auto_mapping["base_model_class"] == "InternVLForConditionalGeneration"
    assert config.auto_mapping["parent_library"] == "transformers.models.internvl.modeling_internvl"
    config.save_pretrained(str(tmp_path))  # as a tool does that changes a setting
    recorded = read_adapter_base(tmp_path)
    assert recorded is not None
    assert recorded.digest == digest(checkpoint("qwen2"))
    assert read_adapter(tmp_path).modules
