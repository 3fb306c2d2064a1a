"""Every stage of a retrieval run on one machine: forty photographs find their captions better than before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from closeness import assert_close
from internvl_api.recipes.resolve import parse_spec, resolve
from internvl_trainer.model.trained_weights import load_trained
from internvl_trainer.retrieval.load import load_retrieval_model, open_retrieval_checkpoint
from ivft_cluster.paths import CHECKOUT
from ivft_demo.checkpoint import write_retrieval_checkpoint
from ivft_demo.photographs import write_dataset
from trainer.runs import environment, write_config

pytestmark = pytest.mark.slow


def example(folder: Path, **sections: Any) -> Any:
    """The quickstart's run, its files in a folder."""
    write_retrieval_checkpoint(folder / "model")
    write_dataset(folder / "data")
    text = (CHECKOUT / "examples/quickstart-retrieval.yaml").read_text(encoding="utf-8")
    text = text.replace("s3://demo/models/tiny-internvl-14b", str(folder / "model"))
    text = text.replace("s3://demo/data", str(folder / "data")).replace("s3://demo/runs", str(folder / "runs"))
    spec = {**yaml.safe_load(text)["spec"], "workers": 1}
    return resolve(parse_spec(spec | sections), job="default/retrieval", job_uid="uid")


def run(config: Any, folder: Path) -> str:
    """`internvl-trainer run`; what it said."""
    done = subprocess.run(
        [sys.executable, "-m", "internvl_trainer", "run", "--config", str(write_config(config, folder))],
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


@pytest.mark.soak  # e2e/test_pipeline has it on nodes
def test_pictures_find_their_captions_better_than_before(tmp_path: Path) -> None:
    said = run(example(tmp_path), tmp_path)
    artifacts = tmp_path / "runs/quickstart-retrieval/artifacts"
    figures = json.loads((artifacts / "evaluation.json").read_text())
    before, after = figures["baseline"]["photographs"], figures["final"]["photographs"]
    assert before["G_image_to_text_R1"] < 0.1
    assert after["G_image_to_text_R1"] > before["G_image_to_text_R1"]
    assert after["C_image_to_text_R10"] > 0.5 > before["C_image_to_text_R10"]
    assert "vision/layer 0/no weight decay  lr 4.0500e-03" in said  # 5e-3 x 0.9^2: layer decay is in the log
    published = load_retrieval_model(artifacts / "model", dtype=torch.float32)
    assert published.image_size == 84
    assert (artifacts / "report/index.html").exists()
    assert (artifacts / "model/tokenizer.model").exists()
    card = (artifacts / "README.md").read_text()
    for line in (
        "pipeline_tag: image-feature-extraction",
        "`model/` is in InternVL's own format, with everything its code asks for:",
        "Pictures are made square, 84 pixels a side.",
        "| Layer decay | 0.9 |",
    ):
        assert line in card.splitlines(), line
    assert "AutoModelForImageTextToText" not in card


def test_a_lora_is_trained_measured_merged_and_published(tmp_path: Path) -> None:
    """The merged model makes the features of the adapter on its base."""
    lora = {"method": "lora", "lora": {"languageRank": 4, "visionRank": 4, "dropout": 0.0}}
    run(example(tmp_path, **lora, merge={"formats": ["upstream"]}), tmp_path)
    artifacts = tmp_path / "runs/quickstart-retrieval/artifacts"
    adapted = load_retrieval_model(tmp_path / "model", dtype=torch.float32, image_size=84).model
    base = load_retrieval_model(tmp_path / "model", dtype=torch.float32, image_size=84).model
    load_trained(adapted, artifacts / "adapter", open_retrieval_checkpoint(tmp_path / "model"))
    merged = load_retrieval_model(artifacts / "model", dtype=torch.float32).model
    pixels = torch.randint(0, 256, (2, 3, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found, before = (each.eval().encode_images(pixels, ["G"])["G"] for each in (adapted, merged, base))
    assert "They are merged in `model/`." in (artifacts / "README.md").read_text()
    assert_close(found, wanted)
    assert (before - wanted).abs().max() > 0.01
