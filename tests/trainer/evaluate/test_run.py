"""An evaluation as a stage: its files, its figures, and what happens when it is ended half-way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from internvl_api.run_config import RunConfig
from internvl_api.status import EvaluationStatus
from internvl_trainer.artifacts.fingerprint import fingerprint
from internvl_trainer.artifacts.manifest import check_sizes, commit, read_manifest, upload_files
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.data.pictures import decode_image
from internvl_trainer.data.tiling import cut_tiles
from internvl_trainer.errors import UserError
from internvl_trainer.evaluate.chunks import Chunk, ChunkStore, to_lines
from internvl_trainer.evaluate.vqa import exact_match
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.base_identity import describe_base
from internvl_trainer.model.greedy_answers import answer
from internvl_trainer.model.load import LoadedModel, load_chat_model
from internvl_trainer.model.trained_weights import OTHER_WEIGHTS
from internvl_trainer.signals import StopRequested
from safetensors.torch import save_file
from trainer.contexts import store_of
from trainer.evaluations import evaluation_config, load_with_adapter, predictions, run_evaluation, write_vqa
from trainer.runs import GOLDEN

pytestmark = pytest.mark.slow

ROWS = 70  # three chunks, the last of them short
BASE = GOLDEN / "checkpoints" / "internlm2"


def vqa_config(folder: Path, rows: int = ROWS, **sections: Any) -> RunConfig:
    task = {"task": "vqa", "annotation": str(write_vqa(folder, rows)), "maxNewTokens": 5, **sections.pop("task", {})}
    return evaluation_config(folder, {"colours": task}, base=str(BASE), **sections)


def expected_answer(loaded: LoadedModel, folder: Path, row: dict[str, Any]) -> str:
    """One row by itself, through the single-answer path."""
    image = decode_image((folder / row["image"]).read_bytes())
    tiles = cut_tiles(image, loaded.image_size, 1, 6, thumbnail=True)
    return answer(loaded, f"<image>\n{row['question']}", tiles, [len(tiles)], max_new_tokens=5, min_new_tokens=1)


def load(base: Path = BASE) -> LoadedModel:
    loaded = load_chat_model(base, dtype=torch.float32)
    loaded.model.eval()
    return loaded


def store_adapter(config: RunConfig, folder: Path, base: Path = BASE) -> LoadedModel:
    """A finished train stage with an adapter that changes the answers; the model with it on."""
    loaded = load_with_adapter(base)
    with torch.no_grad():
        norm = "model.multi_modal_projector.layer_norm.weight"
        loaded.model.native.get_parameter(norm).mul_(1.5)
    save_adapter(loaded.model, folder / "adapter")
    save_file({norm: loaded.model.native.get_parameter(norm).data}, folder / "adapter" / OTHER_WEIGHTS)
    storage = open_storage(config.output, field="spec.output")
    files = {f"adapter/{path.name}": path for path in (folder / "adapter").iterdir()}
    described = upload_files(storage, "stages/train", files)
    commit(storage, "stages/train", described, fingerprint(config), kind="adapter", steps=1, base=describe_base(config))
    loaded.model.eval()
    return loaded


def test_every_row_is_answered_as_it_would_be_alone(tmp_path: Path) -> None:
    run_evaluation("baseline-evaluate", vqa_config(tmp_path))
    rows = predictions(tmp_path, "baseline-evaluate", "colours")
    assert [row["id"] for row in rows] == list(range(ROWS))
    loaded = load()
    assert len({row["prediction"] for row in rows}) > 3
    assert {type(row["at_limit"]) for row in rows} == {bool}
    for row in rows[::5]:
        assert row["prediction"] == expected_answer(loaded, tmp_path, row)


def test_the_manifest_names_predictions_and_figures(tmp_path: Path) -> None:
    config = vqa_config(tmp_path, rows=5)
    result = run_evaluation("baseline-evaluate", config)
    storage = open_storage(config.output, field="spec.output")
    manifest = read_manifest(storage, "stages/baseline-evaluate")
    assert manifest is not None
    check_sizes(storage, "stages/baseline-evaluate", manifest)
    assert {file.path for file in manifest.files} == {"predictions/colours.jsonl", "scores.json"}
    figures = EvaluationStatus.model_validate(manifest.extra["evaluation"])
    assert figures == result.evaluation
    assert figures.baseline == json.loads(storage.read("stages/baseline-evaluate/scores.json"))
    rows = predictions(tmp_path, "baseline-evaluate", "colours")
    matches = [exact_match(row["prediction"], row["references"]) for row in rows]
    assert [row["scores"]["exact_match"] for row in rows] == matches
    assert figures.baseline["colours"]["exact_match"] == sum(matches) / len(rows)
    assert "colours: exact_match 0.0000" in result.message
    assert (result.progress.step, result.progress.total_steps) == (5, 5)  # type: ignore[union-attr]
    again = store_of(config).result("baseline-evaluate")
    assert again is not None
    assert again.evaluation == figures
    assert not list(storage.list("stages/baseline-evaluate/chunks/"))


def test_an_ended_evaluation_goes_on_with_the_rows_that_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vqa_config(tmp_path)
    run_evaluation("baseline-evaluate", config)
    undisturbed = predictions(tmp_path, "baseline-evaluate", "colours")
    shutil.rmtree(tmp_path / "output")
    written: list[int] = []
    write = ChunkStore.write

    def interrupted(store: ChunkStore, chunk: Chunk, answers: list[str]) -> None:
        if len(written) == 2:
            raise StopRequested("SIGTERM")
        written.append(chunk.number)
        write(store, chunk, answers)

    monkeypatch.setattr(ChunkStore, "write", interrupted)
    with pytest.raises(StopRequested):
        run_evaluation("baseline-evaluate", config)
    assert not (tmp_path / "output/stages/baseline-evaluate/manifest.json").exists()
    seen: list[int] = []
    monkeypatch.setattr(
        ChunkStore, "write", lambda store, chunk, answers: (seen.append(chunk.number), write(store, chunk, answers))
    )
    run_evaluation("baseline-evaluate", config)
    assert (written, seen) == ([0, 1], [2])
    assert predictions(tmp_path, "baseline-evaluate", "colours") == undisturbed


def test_stored_rows_of_other_settings_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise StopRequested("SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr("internvl_trainer.evaluate.run.write_result", stop)
        with pytest.raises(StopRequested):
            run_evaluation("baseline-evaluate", vqa_config(tmp_path, rows=3))
    run_evaluation("baseline-evaluate", vqa_config(tmp_path, rows=3, task={"maxNewTokens": 1}))
    before, after = expected_answer(load(), tmp_path, ASKED), predictions(tmp_path, "baseline-evaluate", "colours")[0]
    assert len(after["prediction"]) < len(before)


ASKED = {
    "image": "images/000.png",
    "question": "what colour is the table in the middle Answer the question using a single word or phrase.",
}


def test_the_trained_adapter_answers(tmp_path: Path) -> None:
    config = vqa_config(tmp_path, rows=6, method="lora")
    trained = store_adapter(config, tmp_path)
    run_evaluation("baseline-evaluate", config)
    result = run_evaluation("evaluate", config)
    before, after = (predictions(tmp_path, stage, "colours") for stage in ("baseline-evaluate", "evaluate"))
    assert [row["prediction"] for row in before] != [row["prediction"] for row in after]
    assert [row["prediction"] for row in after] == [expected_answer(trained, tmp_path, row) for row in after]
    assert result.evaluation is not None
    assert list(result.evaluation.final) == ["colours"]


def test_an_adapter_is_not_put_on_another_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    config = vqa_config(tmp_path, rows=2, method="lora", model={"source": str(base)})
    store_adapter(config, tmp_path, base)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match="the base model is not the one that was trained on") as refused:
        run_evaluation("evaluate", config)
    assert (refused.value.reason, refused.value.where) == ("BaseModelChanged", str(base))


def test_evaluating_before_training_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `internvl-trainer train` first") as refused:
        run_evaluation("evaluate", vqa_config(tmp_path, rows=2))
    assert refused.value.reason == "StageMissing"


def test_a_row_without_a_prediction_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ChunkStore.write

    def lose_one(store: ChunkStore, chunk: Chunk, answers: list[str]) -> None:
        write(store, chunk, answers)
        path = Path(store._storage.uri) / store.key(chunk)
        path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))

    monkeypatch.setattr(ChunkStore, "write", lose_one)
    with pytest.raises(UserError, match=r"vqa\.jsonl:3: 2 has no prediction") as refused:
        run_evaluation("baseline-evaluate", vqa_config(tmp_path, rows=3))
    assert refused.value.reason == "PredictionMissing"


def test_an_image_that_went_away_names_its_row(tmp_path: Path) -> None:
    config = vqa_config(tmp_path, rows=3)
    (tmp_path / "images/001.png").unlink()
    with pytest.raises(UserError, match=r"vqa\.jsonl:2: image: images/001\.png is not below") as refused:
        run_evaluation("baseline-evaluate", config)
    assert refused.value.reason == "ImageMissing"


def test_a_row_is_one_line_whatever_the_model_says() -> None:
    row = {"prediction": "a\x1cb\x85c\u2028d\u2029e고"}
    (line,) = to_lines([row]).decode().splitlines()
    assert json.loads(line) == row
    assert "고" in line
