"""`kubectl ivft mirror`: what a cluster without the Internet needs, by address, for reading and for programs."""

import json
import re
import sys

import pytest
from internvl_api.recipes.datasets import DATASETS, datasets_of
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.summary import recipe_config
from internvl_operator.kubectl_ivft.__main__ import main
from internvl_operator.kubectl_ivft.mirror import VARIANTS, entries, text
from ivft_cluster.paths import CHECKOUT

sys.path.insert(0, str(CHECKOUT / "tests/tools"))
import build_images

COCO = "internvl2-2b-lora-coco"
GUIDES = "".join(page.read_text(encoding="utf-8") for page in (CHECKOUT / "docs/guides").glob("*.md"))


def test_a_recipe_at_80_columns() -> None:
    shown = text(entries([COCO], registry="registry.example.org/ai/"), 80).splitlines()
    assert shown[:3] == [
        "IMAGES: copy them to your registry, and set global.imageRegistry",
        "  registry.example.org/ai/internvl-operator:0.1.0  the operator",
        "  registry.example.org/ai/internvl-trainer:0.1.0-cu13  every stage of a run",
    ]
    start = shown.index("MODELS: copy each folder to your store, and name it in model.source")
    assert shown[start + 1 :] == [
        "  hf://OpenGVLab/InternVL2-2B  4.4 GB",
        "",
        "DATA: copy it to your store, and name it in data and evaluation",
        "  http://images.cocodataset.org/zips/train2014.zip  COCO captions",
        "  http://images.cocodataset.org/zips/val2014.zip  COCO captions",
        "  https://github.com/OpenGVLab/InternVL/releases/download/data/coco_karpathy_train_567k.zip",
        "      COCO captions",
        "  https://github.com/OpenGVLab/InternVL/releases/download/data/coco_karpathy_test.json",
        "      COCO captions",
    ]


@pytest.mark.parametrize("width", [40, 80, 10_000])
def test_only_an_address_alone_is_wider_than_the_terminal_and_none_is_broken(width: int) -> None:
    found = entries([])
    lines = text(found, width).splitlines()
    assert all(len(line) <= width or " " not in line.strip() for line in lines)
    first_words = [line.split()[0] for line in lines if re.match(r"  \S", line)]
    assert first_words == [entry.address for entry in found]


def test_programs_read_the_same_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mirror", "--recipe", COCO, "-o", "json"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert [(each["kind"], each["address"]) for each in read] == [(e.kind, e.address) for e in entries([COCO])]
    (model,) = (each for each in read if each["kind"] == "model")
    assert model == {
        "kind": "model",
        "address": "hf://OpenGVLab/InternVL2-2B",
        "use": "",
        "size": 4_411_508_736,
        "recipes": [COCO],
    }


def test_without_a_recipe_every_model_and_each_address_once() -> None:
    found = entries([])
    assert len({entry.address for entry in found}) == len(found)
    assert sorted(name for entry in found if entry.kind == "model" for name in entry.recipes) == list(recipe_names())
    for entry in found:
        if entry.kind == "model":
            assert {recipe_config(name).model.source for name in entry.recipes} == {entry.address}


def test_an_unknown_recipe_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mirror", "--recipe", "internvl3-8b-lorra"]) == 1
    assert "did you mean 'internvl3-8b-lora'?" in capsys.readouterr().err


@pytest.mark.parametrize("variant", VARIANTS)
def test_images_and_lock_files_are_those_that_are_built(variant: str) -> None:
    found = entries([], variant, "registry.example.org")
    images = [entry.address for entry in found if entry.kind == "image"]
    built = [build_images.image_name(name, variant, "registry.example.org") for name in ("operator", "trainer")]
    assert images == built
    locked = [entry.address for entry in found if entry.kind == "lock file"][1:]
    assert [CHECKOUT / name for name in locked] == build_images.locked_files(variant)
    dockerfiles = "".join((CHECKOUT / name).read_text("utf-8") for name in build_images.DOCKERFILES.values())
    for entry in found:
        if entry.kind == "base image":
            assert entry.address.removeprefix("docker.io/library/") in dockerfiles
    if base := build_images.BASES[variant]:
        assert base in [entry.address for entry in found]


def test_data_is_that_of_the_guides() -> None:
    for dataset in DATASETS:
        assert [name for name in recipe_names() if dataset in datasets_of(name)], dataset.name
        for address in dataset.addresses:
            written = re.sub(r"_(?:train|val|test)_karpathy\.txt$", "_${split}_karpathy.txt", address)
            assert written in GUIDES, address
    assert datasets_of("internvl2-8b-full") == []
