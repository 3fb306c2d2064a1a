"""Preflight refuses a checkpoint that training would only stumble over on its GPUs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden import KINDS, checkpoint, tokenizer_of
from internvl_trainer.data.tokenize import TEMPLATES
from internvl_trainer.errors import UserError
from internvl_trainer.model.tokenizer import check_template, load_tokenizer
from internvl_trainer.stages import preflight
from internvl_trainer.stages.checkpoint_checks import check_vocabulary, check_weights
from internvl_trainer.stages.preflight import check_model, compare_tiling
from safetensors.torch import load_file, save_file
from trainer.artifacts.web_server import COMMIT
from trainer.runs import make_config

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 1234567890\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen2"), tmp_path / "model"))


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same checkpoint in two shards with an index."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, model / file)
    weight_map = {name: file for file, members in shards.items() for name in members}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return model


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


BREAK: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "pointer": (lambda _: POINTER, "git lfs pull"),
    "long pointer": (lambda _: POINTER + b"x" * 2000, "is a git-lfs pointer"),
    "empty": (lambda _: b"", "0 bytes"),
    "half": (cut, "cut short or damaged"),
    "one byte short": (lambda data: data[:-1], "cut short or damaged"),
    "longer": (lambda data: data + b"x", "cut short or damaged"),
    "html": (lambda _: b"<html>" * 500, "cut short or damaged"),
    "header cut": (lambda data: data[:1500], "cut short or damaged"),
}


@pytest.mark.parametrize("case", BREAK)
def test_broken_weights_of_one_file(model: Path, case: str) -> None:
    change, message = BREAK[case]
    path = model / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as refused:
        check_weights(model, str(model))
    assert refused.value.reason == "InvalidSafetensors"
    assert message in str(refused.value)


@pytest.mark.parametrize("case", BREAK)
@pytest.mark.parametrize("shard", ["model-1-of-2.safetensors", "model-2-of-2.safetensors"])
def test_broken_weights_of_a_shard(sharded: Path, shard: str, case: str) -> None:
    change, message = BREAK[case]
    path = sharded / shard
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError) as refused:
        check_model(make_config("/out", model={"source": str(sharded)}))
    assert message in str(refused.value)
    assert shard in str(refused.value)


def test_whole_checkpoints_pass(sharded: Path) -> None:
    check_model(make_config("/out", model={"source": str(sharded)}))


@pytest.mark.parametrize("kind", KINDS)
def test_published_pairs_of_tokenizer_and_embedding_pass(kind: str) -> None:
    check_vocabulary(tokenizer_of(checkpoint(kind)), checkpoint(kind), kind)


def test_a_tokenizer_that_was_extended_is_refused(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    rows = json.loads((model / "config.json").read_text())["llm_config"]["vocab_size"]
    tokenizer.add_tokens([f"<new-{number}>" for number in range(rows - len(tokenizer) + 3)])
    tokenizer.save_pretrained(model)
    with pytest.raises(UserError) as refused:
        check_model(make_config("/out", model={"source": str(model)}))
    assert refused.value.reason == "VocabularyTooLarge"
    assert f"the embedding has {rows} rows" in str(refused.value)
    assert "3 tokens have no row" in str(refused.value)


FAMILIES = {
    "qwen2": {"Hermes-2", "internlm2-chat", "internvl2_5"},
    "internlm2": {"Hermes-2", "internlm2-chat", "internvl2_5"},
    "internlm2-vit6b": {"Hermes-2", "internlm2-chat", "internvl2_5"},
    "yi": {"Hermes-2", "internlm2-chat", "internvl2_5"},
    "llama3": {"Hermes-2", "internlm2-chat", "internvl2_5"},
    "phi3": {"phi3-chat"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_needs_a_tokenizer_that_knows_its_marks(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(checkpoint(kind))
    if template in FAMILIES[kind]:
        check_template(tokenizer, template, "spec.model.template")
        return
    with pytest.raises(UserError) as refused:
        check_template(tokenizer, template, "spec.model.template")
    assert refused.value.reason == "TemplateMismatch"
    assert f"of the template {template}; the tokenizer fits {next(n for n in TEMPLATES if n in FAMILIES[kind])}" in str(
        refused.value
    )


def test_preflight_refuses_the_template_of_another_family(model: Path) -> None:
    with pytest.raises(UserError, match="does not know"):
        check_model(make_config("/out", model={"source": str(model), "template": "phi3-chat"}))


@pytest.mark.parametrize(
    ("key", "value", "field", "own"),
    [
        pytest.param("max_dynamic_patch", 12, "image.maxDynamicPatch", "6", id="most tiles"),
        pytest.param("min_dynamic_patch", 2, "image.minDynamicPatch", "1", id="fewest tiles"),
        pytest.param("use_thumbnail", False, "image.thumbnail", "true", id="thumbnail"),
        pytest.param("dynamic_image_size", False, "image.dynamic", "true", id="tiling"),
    ],
)
def test_a_run_that_cuts_pictures_otherwise_than_its_model_is_warned(
    model: Path, key: str, value: object, field: str, own: str
) -> None:
    image = {"maxDynamicPatch": 6, "minDynamicPatch": 1, "thumbnail": True, "dynamic": True}
    config = make_config("/out", model={"source": str(model)}, image=image)
    stored = json.loads((model / "config.json").read_text())
    same = {"max_dynamic_patch": 6, "min_dynamic_patch": 1, "use_thumbnail": True, "dynamic_image_size": True}
    (model / "config.json").write_text(json.dumps(stored | same))
    assert compare_tiling(config) == []
    (model / "config.json").write_text(json.dumps(stored | same | {key: value}))
    (finding,) = compare_tiling(config)
    assert (finding.field, finding.severity) == (field, "warning")
    assert finding.message.startswith(f"the run has {own}, the checkpoint's config.json {json.dumps(value)};")


@pytest.mark.parametrize(
    ("index", "reason", "message"),
    [
        pytest.param("[" * 100_000, "InvalidJson", "nested too deeply", id="nested"),
        pytest.param('{"weight_map": 1}', "InvalidIndex", "expected an object with weight_map", id="no map"),
        pytest.param("{", "InvalidJson", "not valid JSON", id="cut"),
        pytest.param('{"metadata": {"total_size": ' + "9" * 5000 + "}}", "InvalidJson", "4300 digits", id="digits"),
    ],
)
def test_a_broken_index_is_named(sharded: Path, index: str, reason: str, message: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError) as refused:
        check_weights(sharded, str(sharded))
    assert refused.value.reason == reason
    assert message in refused.value.message
    assert "model.safetensors.index.json" in str(refused.value)


@pytest.mark.parametrize(
    ("run", "commit", "warned"),
    [
        pytest.param({"method": "full"}, COMMIT, True, id="a-whole-model-from-a-branch"),
        pytest.param({"method": "lora", "merge": {"formats": ["upstream"]}}, COMMIT, True, id="merged"),
        pytest.param({"method": "lora", "merge": {"formats": ["hf"]}}, COMMIT, False, id="needs-no-code"),
        pytest.param({"method": "lora"}, COMMIT, False, id="an-adapter-alone"),
        pytest.param({"method": "full"}, None, False, id="pinned-or-without-code"),
    ],
)
def test_a_model_published_without_its_code_is_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: dict[str, Any], commit: str | None, warned: bool
) -> None:
    monkeypatch.setattr(preflight, "commit_to_pin", lambda *_, **__: commit)
    config = make_config(str(tmp_path), model={"source": "hf://team/tiny@main"}, **run)
    findings = preflight.check_code(config)
    assert [(each.reason, each.severity) for each in findings] == ([("CodeLeftOut", "warning")] if warned else [])
    assert all(f"set spec.model.source to hf://team/tiny@{COMMIT}" in each.message for each in findings)
