"""Every shipped example is what the API accepts: the CRD's schema and rules, and the operator's own resolution."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from crd_evaluator import rule_messages
from internvl_api import constants
from internvl_api.models.catalogue import CATALOGUE
from internvl_api.pipeline import stage_names
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_api.run_config import RunConfig
from internvl_api.validation.defaults import RunDefaults
from ivft_cluster.paths import CHECKOUT
from ivft_cluster.releases import binary
from ivft_cluster.shell import run

FOLDER = CHECKOUT / "examples"
EXAMPLES = [*sorted(FOLDER.glob("*.yaml")), FOLDER / "gitops/run.yaml"]
MEASURED = "preflight baseline-evaluate train evaluate"
EVERY_STAGE = "preflight baseline-evaluate train evaluate merge publish"
CAPTIONED = "preflight baseline-evaluate baseline-score train evaluate score"


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


def check(example: dict[str, Any]) -> RunConfig:
    """Accepted by the server and by the operator; what the trainer would get."""
    assert (example["apiVersion"], example["kind"]) == (constants.API_VERSION, constants.KIND)
    crd = load(CHECKOUT / "crds/internvlfinetunes.yaml")
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    jsonschema.validate(example, schema, cls=jsonschema.Draft4Validator)  # what OpenAPI 3.0 schemas are made of
    assert rule_messages(example["spec"]) == []
    config = resolve(parse_spec(example["spec"]), job=f"default/{example['metadata']['name']}", job_uid="uid")
    assert config.output == example["spec"]["output"]
    return config


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in EXAMPLES])
def test_example_is_accepted(path: Path) -> None:
    check(load(path))


@pytest.mark.parametrize(
    ("name", "model", "gpus", "stages"),
    [
        pytest.param("quickstart", None, 0, "preflight train publish", id="quickstart"),
        pytest.param("quickstart-full", None, 0, "preflight train publish", id="quickstart, full"),
        pytest.param("custom-dataset-full", "InternVL2-2B", 8, "preflight train publish", id="custom dataset, full"),
        pytest.param("custom-dataset-lora", "InternVL2-2B", 2, EVERY_STAGE, id="custom dataset, LoRA"),
        pytest.param(
            "mini-internvl", "Mini-InternVL-Chat-2B-V1-5", 2, "preflight train merge publish", id="Mini-InternVL"
        ),
        pytest.param("internvl-chat-v1-5", "InternVL-Chat-V1-5", 8, "preflight train publish", id="InternVL-Chat-V1-5"),
        pytest.param("internvl3", "InternVL3-8B", 2, EVERY_STAGE, id="InternVL3"),
        pytest.param("coco-caption", "InternVL2-2B", 8, f"{CAPTIONED} merge publish", id="COCO captions"),
        pytest.param("ui-dataset", "InternVL2-1B", 1, EVERY_STAGE, id="UI dataset"),
        pytest.param("retrieval-full", "InternVL-14B-224px", 32, f"{CAPTIONED} publish", id="retrieval, full"),
        pytest.param("retrieval-head", "InternVL-14B-224px", 4, f"{MEASURED} publish", id="retrieval, head"),
        pytest.param("retrieval-lora", "InternVL-14B-224px", 4, EVERY_STAGE, id="retrieval, LoRA"),
        pytest.param("quickstart-retrieval", "InternVL-14B-224px", 0, f"{MEASURED} publish", id="quickstart retrieval"),
        pytest.param("evaluate", "InternVL2-2B", 2, "preflight evaluate score publish", id="evaluation alone"),
        pytest.param(
            "evaluate-retrieval", "InternVL-14B-224px", 2, "preflight evaluate publish", id="retrieval evaluation alone"
        ),
        pytest.param("tracking", "InternVL2-2B", 2, "preflight train publish", id="tracking"),
        pytest.param(
            "evaluate-zero-shot", "InternVL-14B-224px", 2, "preflight evaluate score publish", id="published figures"
        ),
        pytest.param("gitops/run", "InternVL2-8B", 2, EVERY_STAGE, id="GitOps"),
    ],
)
def test_example_does_what_its_guide_says(name: str, model: str | None, gpus: int, stages: str) -> None:
    config = check(load(FOLDER / f"{name}.yaml"))
    assert config.model.name == model
    assert (config.world_size if config.device == "cuda" else 0) == gpus
    assert stage_names(config) == tuple(stages.split())


def test_ten_lines_are_enough_where_the_namespace_has_defaults() -> None:
    folder = FOLDER / "tenants"
    written = (folder / "run.yaml").read_text(encoding="utf-8")
    guide = (CHECKOUT / "docs/tenants.md").read_text(encoding="utf-8")
    assert written in guide
    assert len(written.splitlines()) <= 10
    run, text = yaml.safe_load(written), load(folder / "internvl-defaults.yaml")["data"]["defaults.yaml"]
    whole = RunDefaults(namespace=text, run="team-a/pets").under(run["spec"])
    config = check(run | {"spec": whole})
    assert config.output == "s3://team-a/runs/team-a/pets"
    assert {each.field for each in RunDefaults(text, run="team-a/pets").applied(run["spec"])} >= {
        "output", "secrets.objectStorage", "scheduling.queue", "podTemplate.image", "podTemplate.cpuNodeSelector",
    }  # fmt: skip


def test_the_run_of_the_readme_is_accepted() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (CHECKOUT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    config = check(yaml.safe_load(text))
    assert stage_names(config) == tuple(f"{CAPTIONED} merge publish".split())


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_custom_dataset_can_be_learnt_by_every_size(method: str) -> None:
    path = FOLDER / f"custom-dataset-{method}.yaml"
    named = set(re.findall(rf"internvl2-[a-z0-9-]+-{method}", path.read_text(encoding="utf-8")))
    sizes = {f"{model.lower()}-{method}": model for model in CATALOGUE if model.startswith("InternVL2-")}
    assert named == set(sizes)
    example = load(path)
    for recipe in named:
        config = check(example | {"spec": example["spec"] | {"recipe": recipe}})
        assert (config.model.name, config.method) == (sizes[recipe], method)


def test_every_recipe_listed_in_mini_internvl_works_in_its_place() -> None:
    path = FOLDER / "mini-internvl.yaml"
    named = set(re.findall(r"(?:mini-)?internvl-chat-[a-z0-9-]+-(?:full|lora)", path.read_text(encoding="utf-8")))
    assert named == {name for name in recipe_names() if "v1-5" in name}
    example = load(path)
    for recipe in named:
        check(example | {"spec": example["spec"] | {"recipe": recipe}})


def test_every_recipe_listed_in_internvl3_works_in_its_place() -> None:
    path = FOLDER / "internvl3.yaml"
    named = set(re.findall(r"internvl3-\d+b-(?:full|lora)", path.read_text(encoding="utf-8")))
    assert named == {name for name in recipe_names() if name.startswith("internvl3-")}
    example = load(path)
    for recipe in named:
        check(example | {"spec": example["spec"] | {"recipe": recipe, "merge": {"formats": ["hf"]}}})


@pytest.mark.parametrize("method", ["full", "head", "lora"])
def test_every_recipe_listed_in_a_retrieval_example_works_in_its_place(method: str) -> None:
    path = FOLDER / f"retrieval-{method}.yaml"
    named = set(re.findall(r"internvl-14b-[a-z-]+[a-z]", path.read_text(encoding="utf-8")))
    assert named == {name for name in recipe_names() if name.startswith(f"internvl-14b-{method}")}
    example = load(path)
    for recipe in named:
        assert check(example | {"spec": example["spec"] | {"recipe": recipe}}).method == method


def test_the_overlay_is_accepted_as_kustomize_renders_it() -> None:
    (rendered,) = yaml.safe_load_all(run([binary("kubectl"), "kustomize", str(FOLDER / "gitops")]))
    check(rendered)
    assert rendered["metadata"]["namespace"] == "team-a"
    assert rendered["spec"]["podTemplate"]["tolerations"][0]["key"] == "nvidia.com/gpu"


def test_both_gitops_tools_use_the_same_namespace() -> None:
    argo, flux = (load(FOLDER / "gitops" / f"{name}.yaml") for name in ("argo-application", "flux-kustomization"))
    namespaces = {argo["spec"]["destination"]["namespace"], flux["spec"]["targetNamespace"]}
    assert namespaces == {load(FOLDER / "gitops/kustomization.yaml")["namespace"]}
    assert flux["spec"]["wait"] is True
