"""Evaluation of a retrieval model as a stage: R@k of stored features, captions by beams, and going on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from internvl_api.publish_condition import RETRIEVAL_METRICS
from internvl_api.run_config import RunConfig
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.data.pictures import decode_image
from internvl_trainer.evaluate import run
from internvl_trainer.evaluate.chunks import Chunk, ChunkStore
from internvl_trainer.model.tokenizer import decode_answer, read_tokenizer
from internvl_trainer.retrieval.caption_text import (
    CAPTION_PROMPT,
    SUMMARIZE,
    encode_caption,
    encode_prompt,
    normalise_caption,
)
from internvl_trainer.retrieval.load import load_retrieval_model
from internvl_trainer.retrieval.pair_batch import pad_captions, resize_image
from internvl_trainer.retrieval.recall import rank, shares
from internvl_trainer.signals import StopRequested
from trainer.evaluations import predictions, run_evaluation
from trainer.retrieval.pair_runs import pair_config, write_pairs

pytestmark = pytest.mark.slow

IMAGES = 40  # two chunks, the last of them short


def retrieval_config(folder: Path, **sections: Any) -> RunConfig:
    annotation = write_pairs(folder / "data", IMAGES)
    task = {"task": "retrieval", "format": "flickr", "annotation": str(annotation)}
    evaluation = {"tasks": {"drawn": task}, "baseline": True, "batchSize": 7}
    return pair_config(folder, str(folder / "output"), **{"evaluation": evaluation, **sections})


def by_hand(folder: Path, *, normalised: bool) -> dict[str, float]:
    """Both models' figures, picture by picture and caption by caption."""
    model = load_retrieval_model(folder / "model", dtype=torch.float32).model.eval()
    tokenizer = read_tokenizer(folder / "model")
    pairs = [line.split(",", 1) for line in (folder / "data/captions.txt").read_text().splitlines()[1:]]
    names = list(dict.fromkeys(image for image, _ in pairs))
    owners = torch.tensor([names.index(image) for image, _ in pairs])
    figures = {}
    with torch.no_grad():
        captions = [normalise_caption(caption) if normalised else caption for _, caption in pairs]
        ids = [pad_captions([encode_caption(tokenizer, SUMMARIZE + caption)])[0] for caption in captions]
        texts = torch.nn.functional.normalize(torch.cat([model.encode_texts(each) for each in ids]))
        pictures = [resize_image(decode_image((folder / "data" / name).read_bytes()), 42) for name in names]
        for variant in ("C", "G"):
            pixels = [torch.from_numpy(each)[None] for each in pictures]
            images = torch.cat([model.encode_images(each, [variant])[variant] for each in pixels])
            found = rank(torch.nn.functional.normalize(images), texts, torch.arange(len(names)), owners)
            for way, ranks in found.by_way().items():
                figures |= {f"{variant}_{way}_R{k}": share for k, share in shares(ranks).items()}
    return figures


def test_figures_are_those_of_features_made_one_by_one(tmp_path: Path) -> None:
    found = run_evaluation("baseline-evaluate", retrieval_config(tmp_path)).evaluation
    assert found is not None
    assert tuple(found.baseline["drawn"]) == RETRIEVAL_METRICS
    assert found.baseline["drawn"] == pytest.approx(by_hand(tmp_path, normalised=True))


def test_captions_are_compared_as_they_were_trained_on(tmp_path: Path) -> None:
    """Unless upstream's figures are to be matched, whose evaluation takes captions as they stand."""
    found = run_evaluation("baseline-evaluate", retrieval_config(tmp_path, data={"compat": "upstream"})).evaluation
    assert found is not None
    assert found.baseline["drawn"] == pytest.approx(by_hand(tmp_path, normalised=False))
    assert by_hand(tmp_path, normalised=False) != by_hand(tmp_path, normalised=True)


def test_a_prediction_is_a_picture_with_the_caption_found_for_it(tmp_path: Path) -> None:
    figures = run_evaluation("baseline-evaluate", retrieval_config(tmp_path)).evaluation
    assert figures is not None
    rows = predictions(tmp_path, "baseline-evaluate", "drawn")
    assert [row["image"] for row in rows] == [f"images/{number:03d}.png" for number in range(IMAGES)]
    assert all(len(row["references"]) == 2 and "features" not in row for row in rows)
    hits = [row["prediction"] in row["references"] for row in rows]
    assert [row["scores"]["G_image_to_text_R1"] for row in rows] == hits
    for metric, value in figures.baseline["drawn"].items():
        assert sum(row["scores"][metric] for row in rows) / IMAGES == pytest.approx(value)


def test_an_evaluation_goes_on_where_it_was_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = retrieval_config(tmp_path)
    written, write = [], ChunkStore.write

    def stop_after_one(store: ChunkStore, chunk: Chunk, answers: Any) -> None:
        if written:
            raise StopRequested
        write(store, chunk, answers)
        written.append(chunk.number)

    monkeypatch.setattr(ChunkStore, "write", stop_after_one)
    with pytest.raises(StopRequested):
        run_evaluation("baseline-evaluate", config)
    monkeypatch.setattr(ChunkStore, "write", write)
    asked: list[int] = []
    answer_chunks = run.answer_chunks

    def listen(context: Any, answerer: Any, pending: Any, store: Any, **shard: Any) -> None:
        asked.extend(chunk.number for chunk in pending)
        answer_chunks(context, answerer, pending, store, **shard)

    monkeypatch.setattr(run, "answer_chunks", listen)
    found = run_evaluation("baseline-evaluate", config).evaluation
    assert asked == [1]
    assert found is not None
    assert found.baseline["drawn"] == pytest.approx(by_hand(tmp_path, normalised=True))
    assert not list(open_storage(config.output, field="spec.output").list("stages/baseline-evaluate/chunks/"))


def test_captions_are_searched_with_five_beams(tmp_path: Path) -> None:
    """From upstream's prompt; another stage scores them."""
    annotation = tmp_path / "captions.json"
    write_pairs(tmp_path / "data", 3)
    names = [f"images/{number:03d}.png" for number in range(3)]
    rows = ", ".join(f'{{"image": "{name}", "caption": ["A dog.", "One dog."]}}' for name in names)
    annotation.write_text(f"[{rows}]")
    task = {"task": "caption", "annotation": str(annotation), "root": str(tmp_path / "data")}
    config = retrieval_config(tmp_path, evaluation={"tasks": {"words": task}, "batchSize": 2})
    run_evaluation("baseline-evaluate", config)
    loaded = load_retrieval_model(tmp_path / "model", dtype=torch.float32)
    tokenizer = read_tokenizer(tmp_path / "model")
    prompt = torch.tensor([encode_prompt(tokenizer, CAPTION_PROMPT)])
    for row, name in zip(predictions(tmp_path, "baseline-evaluate", "words"), names, strict=True):
        pixels = torch.from_numpy(resize_image(decode_image((tmp_path / "data" / name).read_bytes()), 42))[None]
        search = {"num_beams": 5, "do_sample": False, "min_new_tokens": 8, "max_new_tokens": 30}
        ids = loaded.model.eval().generate(pixels, prompt, torch.ones_like(prompt), pad_token_id=0, **search)[0]
        assert row["prediction"] == decode_answer(tokenizer, ids.tolist()).strip()
        assert row["question"] == CAPTION_PROMPT
        assert row["at_limit"] == (tokenizer.eos_token_id not in ids.tolist())
        assert len(tokenizer(row["prediction"], add_special_tokens=False).input_ids) >= 8
