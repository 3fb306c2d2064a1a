"""InternVL 1.0: its recipes are the published scripts, and its fields are its own."""

import json
import re
from pathlib import Path
from typing import Any

import internvl_api.recipes
import pytest
from chat_recipes import chat_recipe_names
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.recipes.summary import recipe_config
from internvl_api.validation.violations import SpecError

SCRIPTS = json.loads((Path(__file__).parents[1] / "data" / "recipes.json").read_text(encoding="utf-8"))["scripts"]
RECIPES = sorted(set(recipe_names()) - set(chat_recipe_names()))
# A script's argument, and where a run has it.
FIGURES = {
    "gpus": "world_size",
    "per_device_batch": "training.micro_batch_size",
    "grad_accum": "gradient_accumulation",
    "effective_global_batch": "training.global_batch_size",
    "force_image_size": "image.tile_size",
    "drop_path_rate": "model.drop_path_rate",
    "use_backbone_lora": "lora.vision_rank",
    "use_qllama_lora": "lora.language_rank",
    "num_train_epochs": "training.epochs",
    "learning_rate": "training.learning_rate",
    "weight_decay": "training.weight_decay",
    "warmup_steps": "training.warmup_steps",
    "lr_scheduler_type": "training.lr_schedule",
    "max_seq_length": "training.max_seq_length",
    "dataloader_num_workers": "training.data_workers",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "VIT_LAYER_DECAY_RATE": "retrieval.layer_decay",
    "QLLAMA_LAYER_DECAY_RATE": "retrieval.layer_decay",
}
NAMED = {"name": "InternVL-14B-224px"}
PAIRS = {"flickr": {"annotation": "s3://data/train.txt", "format": "flickr"}}


def _resolve(**changes: Any) -> Any:
    base = {"model": NAMED, "data": {"train": PAIRS}, "output": "s3://out/run"}
    return resolve(parse_spec(base | changes), job="team/run", job_uid="1")


def test_there_is_a_recipe_for_each_published_script() -> None:
    assert len(RECIPES) == 9
    assert len({_script_name(recipe) for recipe in RECIPES}) == 9


def _script_name(recipe: str) -> str:
    text = (Path(internvl_api.recipes.__file__).parent / f"{recipe}.yaml").read_text(encoding="utf-8")
    found = re.match(r"# Figures of upstream's (internvl_g/\S+)\n", text)
    assert found
    return found[1]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_the_figures_of_its_script(recipe: str) -> None:
    script, config = SCRIPTS[_script_name(recipe)], recipe_config(recipe)

    def value(path: str) -> Any:
        found: Any = config
        for part in path.split("."):
            found = getattr(found, part)
        return found

    expected = {key: script[key] for key in FIGURES if key in script}
    assert {key: value(FIGURES[key]) for key in expected} == expected
    method = "lora" if "use_backbone_lora" in script else "head" if "unfreeze_qllama_head" in script else "full"
    assert config.method == method
    assert config.training.zero_stage == (2 if "stage1" in script["deepspeed"] else 3), "1 does not fit 80 GB"
    assert (config.retrieval.layer_decay == 0.9) == (method == "full")


def test_the_name_decides_what_is_trained_wherever_the_weights_are() -> None:
    run = _resolve(model={"name": "InternVL-14B-224px", "source": "s3://models/tiny"})
    assert (run.model.kind, run.model.source) == ("retrieval", "s3://models/tiny")
    assert _resolve().model.source == "hf://OpenGVLab/InternVL-14B-224px"


def _task(kind: str, **more: Any) -> dict[str, Any]:
    return {"tasks": {"t": {"task": kind, "annotation": "s3://data/test.txt"} | more}}


CHAT = {"model": {"name": "InternVL2-1B"}, "data": {"train": {"a": {"annotation": "s3://data/a.jsonl"}}}}


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        pytest.param(
            {"data": {"train": {"a": {"annotation": "s3://data/a.jsonl"}}}},
            "spec.data.train.a.format",
            "found auto; InternVL-14B-224px is a retrieval model, use flickr or coco",
            id="conversations",
        ),
        pytest.param(
            {"data": {"mixingTemperature": 2, "train": PAIRS}}, "spec.data.mixingTemperature", "found 2", id="mixing"
        ),
        pytest.param(
            {"model": NAMED | {"template": "Hermes-2"}}, "spec.model.template", "found Hermes-2", id="template"
        ),
        pytest.param(
            {"training": {"freeze": {"vision": False}}}, "spec.training.freeze", "found settings", id="freeze"
        ),
        pytest.param(
            {"training": {"lossWeighting": "square"}}, "spec.training.lossWeighting", "found square", id="weighting"
        ),
        pytest.param({"training": {"samples": {}}}, "spec.training.samples", "found settings", id="answers"),
        pytest.param({"training": {"groupByLength": True}}, "spec.training.groupByLength", "found true", id="lengths"),
        pytest.param(
            {"data": {"train": {"flickr": PAIRS["flickr"] | {"dataAugment": True}}}},
            "spec.data.train.flickr.dataAugment",
            "found true",
            id="augment",
        ),
        pytest.param(
            {"runPolicy": {"onOutOfMemory": "halveMicroBatch"}},
            "spec.runPolicy.onOutOfMemory",
            "found halveMicroBatch; InternVL-14B-224px is a retrieval model, whose pairs in a micro batch are",
            id="smaller micro batches",
        ),
        pytest.param(
            {"evaluation": _task("retrieval-coco", maxNewTokens=5)},
            "spec.evaluation.tasks.t.maxNewTokens",
            "found 5; retrieval-coco compares images with captions without a prompt",
            id="an answer's length",
        ),
        pytest.param({"evaluation": _task("vqa")}, "spec.evaluation.tasks.t.task", "found vqa; Int", id="questions"),
        pytest.param(
            CHAT | {"evaluation": _task("retrieval-coco")}, "spec.evaluation.tasks.t.task", "found retr", id="retrieval"
        ),
        pytest.param(
            {"evaluation": _task("retrieval")}, "spec.evaluation.tasks.t.format", "found none; set", id="no format"
        ),
        pytest.param(
            {"evaluation": _task("caption-coco", format="coco")},
            "spec.evaluation.tasks.t.format",
            "found coco; only retrieval tasks have a format",
            id="a format of captions",
        ),
        pytest.param(
            CHAT | {"evaluation": _task("caption", beams=5)},
            "spec.evaluation.tasks.t.beams",
            "found 5; onl",
            id="beams",
        ),
        pytest.param(CHAT | {"method": "head"}, "spec.method", "found head; only a retrieval model", id="no head"),
        pytest.param(
            CHAT | {"retrieval": {"hardNegatives": True}}, "spec.retrieval", "found settings; on", id="section"
        ),
        pytest.param({"merge": {"formats": ["hf"]}}, "spec.merge.formats", "found hf; InternVL-14B", id="hf"),
        pytest.param(
            {"data": {"meta": "s3://data/meta.json", "train": PAIRS}}, "spec.data.meta", "found s3://data/m", id="meta"
        ),
        pytest.param(
            {"training": {"packing": {"enabled": True}}}, "spec.training.packing.enabled", "found true; I", id="packing"
        ),
    ],
)
def test_what_its_model_cannot_do_is_refused(changes: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        _resolve(**changes)
    assert (refused.value.reason, refused.value.field) == ("NotForThisModel", field)
    assert refused.value.message.startswith(message)


def test_a_task_knows_the_format_of_its_set() -> None:
    run = _resolve(evaluation=_task("retrieval-flickr30k-cn"))
    assert run.evaluation.tasks["t"].format == "flickr"
    assert "G_image_to_text_R1" in run.evaluation.metrics()["t"]
