"""The model card: what the Hub reads of it, what a person reads, and that its snippets do what they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from golden import checkpoint
from huggingface_hub import ModelCard
from internvl_trainer.artifacts.fingerprint import fingerprint
from internvl_trainer.artifacts.manifest import commit, upload_files
from internvl_trainer.model.adapter_files import load_adapter, save_adapter
from internvl_trainer.model.adapters import LoraSettings, apply_method, lora_layers
from internvl_trainer.model.convert_checkpoint import convert_checkpoint
from internvl_trainer.model.load import load_chat_model
from internvl_trainer.report.contents import Contents, contents
from internvl_trainer.report.model_card import hub_card, model_card, plain
from safetensors.torch import load_file, save_file
from trainer.report.outputs import TASK, Output, evaluated, prediction

HUB_BASE = {"source": "hf://OpenGVLab/InternVL2-2B@abc123", "name": "InternVL2-2B"}


def card_of(output: Output) -> ModelCard:
    return ModelCard(model_card(output.stages))


def snippets(card: ModelCard) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.text, flags=re.S)


def test_the_hub_reads_base_figures_and_kind(tmp_path: Path) -> None:
    train = {"annotation": "hf://datasets/team/captions@v1/train.jsonl"}
    output = evaluated(tmp_path, model=HUB_BASE, data={"train": {"golden": train}}, publish_if="CIDEr >= 1")
    card = card_of(output)
    data = card.data.to_dict()
    assert data["base_model"] == "OpenGVLab/InternVL2-2B"
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")
    assert (data["pipeline_tag"], data["datasets"]) == ("image-text-to-text", ["team/captions"])
    (results,) = card.data.eval_results[:1]
    assert (results.dataset_name, results.dataset_type) == ("coco", "caption")
    assert {each.metric_type: each.metric_value for each in card.data.eval_results} == {"CIDEr": 1.5, "BLEU_4": 0.0625}
    assert data["model-index"][0]["name"] == "run"


def test_a_person_reads_figures_settings_and_lineage(tmp_path: Path) -> None:
    text = card_of(evaluated(tmp_path, publish_if="CIDEr >= 1")).text
    for line in (
        "| coco | CIDEr | 0.2500 | 1.5000 | +1.2500 | +0.9950 to +1.4900 |",
        "| coco | BLEU\\_4 | 0.1250 | 0.0625 | −0.0625 |  |",
        "Publishing condition: `CIDEr >= 1` (met).",
        "| Steps | 80 (8 epochs) |",
        "| Learning rate | 0.003, cosine, warm-up 0.03 of the steps |",
        "| Frozen | vision tower, language model |",
        "| Base model: commit | c0ffee |",
        "Pictures are cut into up to 6 tiles and a thumbnail, as in training.",
    ):
        assert line in text.splitlines(), line


@pytest.mark.parametrize(
    ("sections", "folders", "library"),
    [
        pytest.param({"method": "lora"}, {"adapter"}, "peft", id="adapter alone"),
        pytest.param(
            {"method": "lora", "merge": {"formats": ["upstream"]}}, {"adapter", "model"}, "transformers", id="merged"
        ),
        pytest.param(
            {"method": "lora", "merge": {"formats": ["upstream", "hf"]}},
            {"adapter", "model", "model-hf"},
            "transformers",
            id="merged in both formats",
        ),
        pytest.param({"method": "full"}, {"model"}, "transformers", id="full"),
        pytest.param(
            {"method": "full", "merge": {"formats": ["hf"]}}, {"model", "model-hf"}, "transformers", id="full, and hf"
        ),
    ],
)
def test_it_tells_how_to_load_what_is_there(
    tmp_path: Path, sections: dict[str, Any], folders: set[str], library: str
) -> None:
    card = card_of(Output(tmp_path, model=HUB_BASE, **sections).train(2))
    assert set(re.findall(r"^`([a-z-]+)/` is", card.text, flags=re.M)) == folders
    data = card.data.to_dict()
    assert data["library_name"] == library
    assert data["base_model_relation"] == ("adapter" if folders == {"adapter"} else "finetune")
    assert ("custom_code" in data["tags"]) == ("model" in folders)
    for code in snippets(card):
        compile(code, "snippet", "exec")


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        pytest.param([], Contents(adapter=False, upstream=False, hf=False), id="model/ in the base's format"),
        pytest.param(["upstream"], Contents(adapter=False, upstream=True, hf=False), id="model/ made upstream's"),
        pytest.param(["hf"], Contents(adapter=False, upstream=False, hf=True), id="both in transformers' format"),
    ],
)
def test_full_training_of_a_base_in_transformers_format(tmp_path: Path, formats: list[str], expected: Contents) -> None:
    output = Output(tmp_path, method="full", merge={"formats": formats})
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "internvl"}', encoding="utf-8")
    files = upload_files(output.storage, "stages/train", {"model/config.json": config})
    commit(output.storage, "stages/train", files, fingerprint(output.config), kind="model")
    assert contents(output.stages) == expected


HUB = {"publish": {"hub": {"repository": "team/coco-lora"}}, "secrets": {"huggingFace": "hf"}}


def hub_card_of(output: Output) -> ModelCard:
    return ModelCard(hub_card(output.stages))


@pytest.mark.parametrize(
    ("source", "has_code"),
    [
        pytest.param("hf://OpenGVLab/InternVL2-2B", False, id="default-branch"),
        pytest.param("hf://OpenGVLab/InternVL2-2B@v1.0", False, id="tag"),
        pytest.param(f"hf://OpenGVLab/InternVL2-2B@{'c0ffee15' * 5}", True, id="commit"),
        pytest.param("s3://models/base", True, id="own-storage"),
    ],
)
def test_it_says_where_the_code_is(tmp_path: Path, source: str, has_code: bool) -> None:
    card = card_of(Output(tmp_path, model={"source": source, "name": "InternVL2-2B"}, method="full").train(2))
    assert ("It runs the code that came with the base model" in card.text) == has_code
    missing = "It runs the base model's code, which is not here, because the run named no commit of the base."
    assert (missing in card.text) != has_code
    assert ("with everything its code asks for:" in card.text) == has_code


def test_a_hub_repository_is_downloaded_by_its_name(tmp_path: Path) -> None:
    output = Output(tmp_path, method="lora", **HUB).train(2)
    card = hub_card_of(output)
    assert 'folder = snapshot_download("team/coco-lora")' in card.text
    assert card.text.lstrip().startswith("# coco-lora\n")
    assert "snapshot_download" not in card_of(output).text, "artifacts/ are where they are"


@pytest.mark.parametrize(
    ("sections", "classes", "library", "has_code"),
    [
        pytest.param({"method": "lora"}, {"PeftModel"}, "peft", False, id="adapter alone"),
        pytest.param(
            {"method": "lora", "merge": {"formats": ["upstream", "hf"]}},
            {"AutoModel"},
            "transformers",
            True,
            id="the first of two formats",
        ),
        pytest.param(
            {"method": "full", "merge": {"formats": ["hf"]}},
            {"AutoModelForImageTextToText"},
            "transformers",
            False,
            id="full, and hf",
        ),
        pytest.param({"method": "full"}, {"AutoModel"}, "transformers", True, id="full"),
    ],
)
def test_the_hub_is_told_of_the_one_model_at_its_root(
    tmp_path: Path, sections: dict[str, Any], classes: set[str], library: str, has_code: bool
) -> None:
    card = hub_card_of(Output(tmp_path, model=HUB_BASE, **HUB, **sections).train(2))
    code = "".join(snippets(card))
    assert set(re.findall(r"^model = (\w+)", code, flags=re.M)) == classes
    for folder in ("adapter", "model", "model-hf"):
        assert f"{folder}/" not in card.text
        assert f"/{folder}" not in code
    assert card.data.to_dict()["library_name"] == library
    assert ("custom_code" in card.data.tags) == has_code


def test_a_local_base_without_evaluation_has_neither_base_nor_figures(tmp_path: Path) -> None:
    data = card_of(Output(tmp_path).train(2)).data.to_dict()
    assert "base_model" not in data
    assert "model-index" not in data
    assert "datasets" not in data


def test_weights_from_elsewhere_are_not_called_the_hubs(tmp_path: Path) -> None:
    """model.name says which model they resemble, not that they are its weights."""
    card = card_of(Output(tmp_path, model={"source": "s3://team/own-weights", "name": "InternVL2-2B"}).train(2))
    assert "base_model" not in card.data.to_dict()
    assert "OpenGVLab" not in card.content
    assert "s3://team/own-weights, fine-tuned" in card.content


def test_data_cannot_break_the_card(tmp_path: Path) -> None:
    evil = "x | y\n---\n# <b>[z](javascript:1)`"
    output = Output(tmp_path, evaluation={"tasks": {"coco": TASK}}).train(2).preflight(name=evil)
    output.evaluate({"CIDEr": 1.0}, [prediction(0, evil)])
    card = card_of(output)
    (line,) = [line for line in card.text.splitlines() if "javascript" in line]
    assert line.startswith("| Data: x \\| y --- \\# \\<b\\>\\[z\\](javascript:1)\\` | ")
    assert card.data.to_dict()["pipeline_tag"] == "image-text-to-text"


@pytest.mark.slow
def test_links_are_shown_without_what_gives_access(tmp_path: Path) -> None:
    link = "https://data.example/rows.jsonl?sig=s3cr3t"
    text = str(card_of(Output(tmp_path, data={"train": {"golden": {"annotation": link}}}).preflight().train(2)))
    assert "https://data.example/rows.jsonl?…" in text
    assert "s3cr3t" not in text


def test_plain() -> None:
    assert plain("a_b\n*c*") == "a\\_b \\*c\\*"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Here: adapter/ with weights that learned beside it, its base, and a whole model, all in transformers' form."""
    convert_checkpoint(checkpoint("internlm2"), tmp_path / "base-hf", "hf")
    convert_checkpoint(checkpoint("internlm2"), tmp_path / "model-hf", "hf")
    model = load_chat_model(tmp_path / "base-hf", dtype=torch.float32).model
    apply_method(model, "lora", lora=LoraSettings(language_rank=4), seed=1)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.lora_B["default"].weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    save_adapter(model, tmp_path / "adapter")
    others = {name: tensor + 1 for name, tensor in model.native.state_dict().items() if "projector" in name}
    save_file(others, tmp_path / "adapter" / "trained_weights.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(card: ModelCard, word: str, folder: str = ".") -> Any:
    """The `model` that the snippet with this word makes; in fp32, to compare exactly."""
    code = next(snippet for snippet in snippets(card) if word in snippet)
    names: dict[str, Any] = {"folder": folder}
    exec(code.replace("torch.bfloat16", "torch.float32"), names)
    return names["model"]


def logits(native: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = native(input_ids=torch.arange(5, 25)[None], use_cache=False).logits
    return result


@pytest.mark.slow
@pytest.mark.parametrize("on_hub", [pytest.param(False, id="in artifacts"), pytest.param(True, id="on the Hub")])
def test_the_adapter_is_loaded_as_the_card_says(published: Path, on_hub: bool) -> None:
    output = Output(published, method="lora", **HUB).train(2)
    card, folder = (hub_card_of(output), "adapter") if on_hub else (card_of(output), ".")
    loaded = run(card, "PeftModel", folder)
    reference = load_chat_model(published / "base-hf", dtype=torch.float32).model
    plain_base = logits(reference.native)
    load_adapter(reference, published / "adapter")
    assert_close(logits(loaded), logits(reference.eval().native))
    assert not torch.allclose(logits(loaded), plain_base, atol=1e-2), "the adapter does something"
    learned = load_file(published / "adapter" / "trained_weights.safetensors")
    found = loaded.get_base_model().state_dict()
    assert learned
    assert all(torch.equal(found[name], tensor) for name, tensor in learned.items())


@pytest.mark.parametrize("on_hub", [pytest.param(False, id="in artifacts"), pytest.param(True, id="on the Hub")])
def test_the_hf_form_is_loaded_as_the_card_says(published: Path, on_hub: bool) -> None:
    output = Output(published, method="lora", merge={"formats": ["hf"]}, **HUB).train(2)
    card, folder = (hub_card_of(output), "model-hf") if on_hub else (card_of(output), ".")
    reference = load_chat_model(published / "base-hf", dtype=torch.float32).model.eval()
    assert_close(logits(run(card, "AutoModelForImageTextToText", folder)), logits(reference.native))
