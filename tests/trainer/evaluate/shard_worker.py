"""One rank of test_sharded_answers.py: models that several ranks hold together answer; also answers alone."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from golden import checkpoint, load, sample
from internvl_api.run_config import RunConfig
from internvl_trainer.data.row_schema import Turn
from internvl_trainer.distributed import Group, Rendezvous, join_group, prepare_environment
from internvl_trainer.evaluate import weights
from internvl_trainer.evaluate.run import evaluate
from internvl_trainer.model.checkpoint_source import open_checkpoint
from internvl_trainer.model.greedy_answers import Prompt, make_prompt
from internvl_trainer.model.language_shard import LanguageShard
from internvl_trainer.model.load import LoadedModel
from internvl_trainer.model.trained_weights import load_trained
from trainer.answers import answer_all
from trainer.contexts import group_context

ONES_OF_EACH = ("internlm2", "llama3", "phi3", "qwen2")
SIZES = (2, 4)  # of heads there are 4, of key-value heads 2, but 4 in phi3


def answers(kind: str, adapter: Path, size: int = 1, group: Group | None = None) -> dict[str, list[str]]:
    """Of the base model and with the adapter; `size` ranks hold a model together."""
    neighbours = group.neighbours(size) if group else None
    rank = group.rank % size if group else 0
    loaded = load(kind, make_shard=lambda text: LanguageShard(rank, size, text, neighbours) if size > 1 else None)
    base = _answer(loaded)
    load_trained(loaded.model, adapter, open_checkpoint(checkpoint(kind)), shard=loaded.shard)
    return {"base": base, "adapted": _answer(loaded)}


def _answer(loaded: LoadedModel) -> list[str]:
    loaded.model.eval()
    return answer_all(loaded, _prompts(loaded), batch_size=3, max_new_tokens=10, min_new_tokens=5)


def _prompts(loaded: LoadedModel) -> list[Prompt]:
    """Text only, one image, several images."""
    made = [make_prompt(loaded, [Turn("human", text)], None, ()) for text in ("hello there", "describe")]
    for row, tiles_per_image in ((3, [7]), (4, [3, 3, 2])):
        kept = sample("qwen2/Hermes-2", row).tiles[: sum(tiles_per_image)]
        counts = [len(part) for part in np.array_split(kept, len(tiles_per_image))]
        made.append(make_prompt(loaded, [Turn("human", "<image>\n" * len(counts) + "what is it")], kept, counts))
    return made


def main(output: Path, runs: list[str]) -> None:
    prepare_environment("cpu", 2)
    group = join_group(Rendezvous.from_environment(os.environ), "cpu")
    torch.set_num_threads(1)
    for run in runs:
        if run == "stage":
            vars(weights)["choose_copy"] = lambda *_: 2
            evaluate(group_context(RunConfig.load(output / "run.yaml"), "baseline-evaluate", group))
            continue
        found = {size: answers(run, output / run / "adapter", size, group) for size in SIZES}
        (output / run / f"answers-{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
