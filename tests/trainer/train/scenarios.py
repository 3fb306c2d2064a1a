"""Many trainings in one pair of processes: DeepSpeed takes seconds to start and milliseconds a step.

Run by the launcher as `python scenarios.py FOLDER`; each scenario leaves its output in FOLDER/<name>, and its outcome
in FOLDER/outcomes.json.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from internvl_trainer.distributed import Rendezvous, join_group, prepare_environment
from internvl_trainer.errors import UserError
from internvl_trainer.metrics import Reporter
from internvl_trainer.signals import StopFlag
from internvl_trainer.stages.preflight import run as preflight

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from trainer.contexts import context_of, group_context
from trainer.runs import GOLDEN, make_config

LORA = {"method": "lora", "lora": {"languageRank": 4, "visionRank": 2, "dropout": 0.05}}
PACKED = {
    "packing": {"enabled": True, "maxTokens": 512, "maxTiles": 9, "bufferSize": 2},
    "lossWeighting": "square",
    "maxSeqLength": 512,
}
# Five rows: over two ranks, one has fewer. Their loss is taken after steps 3, 6, 9 and the last.
VALIDATED = {
    "data": {"validation": {"held": {"annotation": str(GOLDEN / "data" / "samples.jsonl"), "repeatTime": 0.84}}},
    "evaluation": {"everySteps": 3},
}
LIMITED = {"microBatchSize": 2, "maxTokensPerMicroBatch": 450, "maxSeqLength": 450}
"""Of the six golden rows, of 170 to 280 tokens, some pairs are one micro-batch and some are two."""
STOPPED_AFTER = 4


class StopAfter(StopFlag):
    """Asks to stop once the loop has looked that many times: before each micro-batch, and each batch of validation."""

    def __init__(self, looks: int) -> None:
        super().__init__(leave=sys.exit)
        self._left = looks

    @property
    def requested(self) -> bool:
        self._left -= 1
        return self._left < 0

    @requested.setter
    def requested(self, _: bool) -> None:
        """Nobody else asks."""


def main(folder: Path) -> None:
    rendezvous = Rendezvous.from_environment(os.environ)
    prepare_environment("cpu", rendezvous.processes)
    group = join_group(rendezvous, "cpu")
    from internvl_trainer.train.trainer import train

    outcomes: dict[str, Any] = {}

    def run(
        name: str, base: str = "qwen2", *, stop_after: int = 500, looks: int = 0, attempt: str = "", **sections: Any
    ) -> None:
        """`looks`: of the loop at the flag, beyond those of `stop_after` steps."""
        config = make_config(str(folder / name), base, workers=2, **sections)
        looks += stop_after * config.gradient_accumulation
        reporter = Reporter(config.job, "train")
        try:
            result = train(group_context(config, "train", group, reporter), StopAfter(looks))
            _, metrics = reporter.answer("/metrics") or ("", b"")
            outcomes[name + attempt] = {**result.to_dict(), "metrics": metrics.decode()}
        except UserError as error:
            outcomes[name + attempt] = {"reason": error.reason, "message": str(error)}

    def run_packed(name: str, **options: Any) -> None:
        config = make_config(str(folder / name), workers=2, **options)
        if group.leads:  # packs are planned from the sizes that preflight counts
            preflight(context_of(config, "preflight"))
        group.barrier()
        run(name, **options, stop_after=STOPPED_AFTER, attempt="-first")
        run(name, **options)

    def run_limited(stage: int) -> None:
        name, training = f"limited-zero{stage}", {"zeroStage": stage, **LIMITED}
        if group.leads:
            preflight(context_of(make_config(str(folder / name), workers=2, training=training), "preflight"))
        group.barrier()
        if stage == 1:
            run(name, training=training, stop_after=STOPPED_AFTER, attempt="-first")
        run(name, training=training)

    def run_broken(stage: int) -> None:
        """One rank's part of the only checkpoint is damaged, so training starts from the base model again."""
        name, training = f"all-broken-zero{stage}", {"zeroStage": stage}
        run(name, training=training, stop_after=STOPPED_AFTER, attempt="-first")
        if group.leads:
            damage(folder / name / "checkpoints" / f"step-0000000{STOPPED_AFTER}" / "rank-00001-000.safetensors")
        group.barrier()
        run(name, training=training)

    def run_stage(stage: int) -> None:
        run(f"lora-zero{stage}", "internlm2", **LORA, training={"zeroStage": stage})
        run(f"full-zero{stage}", training={"zeroStage": stage})
        run(f"validated-zero{stage}", "internlm2", **LORA, **VALIDATED, training={"zeroStage": stage})
        # Between the two micro-batches of step 5, which is abandoned.
        run(f"resumed-zero{stage}", training={"zeroStage": stage}, stop_after=STOPPED_AFTER, looks=1, attempt="-first")
        run(f"resumed-zero{stage}", training={"zeroStage": stage})
        # It stops in the validation after step 3, at the second batch.
        validated: dict[str, Any] = {**LORA, **VALIDATED, "training": {"zeroStage": stage}}
        run(f"late-zero{stage}", "internlm2", **validated, stop_after=3, looks=1, attempt="-first")
        run(f"late-zero{stage}", "internlm2", **validated)

    run_stage(1)
    run_broken(1)
    run_limited(1)
    run_limited(2)
    run("limited-without-preflight", training=LIMITED)
    run_stage(2)
    run("full-bf16", training={"precision": "bf16"})
    run("resumed-bf16", training={"precision": "bf16"}, stop_after=STOPPED_AFTER, attempt="-first")
    run("resumed-bf16", training={"precision": "bf16"})
    run("lora-stopped", "internlm2", **LORA, stop_after=STOPPED_AFTER, attempt="-first")
    run("from-two-to-one", stop_after=STOPPED_AFTER, attempt="-first")
    run("broken-newest", stop_after=7, attempt="-first")
    if group.leads:
        damage(folder / "broken-newest" / "checkpoints" / "step-00000007" / "rank-00001-000.safetensors")
    group.barrier()
    run("broken-newest")
    run("packed-without-preflight", training=PACKED)
    run_packed("packed-again", training=PACKED)
    run_packed("packed-two-a-forward", training={**PACKED, "microBatchSize": 2})
    run("upstream-loss", data={"compat": "upstream"}, training={"maxSteps": 1})
    if group.leads:
        poison(folder / "poisoned")
        convert(folder / "native")
    group.barrier()
    run("native-base", str(folder / "native"), model={"template": "Hermes-2"}, training={"maxSteps": 2})
    run("not-finite", str(folder / "poisoned"))
    # Last, as ZeRO-3 replaces torch's linear function for good, and with it the rounding of bf16.
    run_stage(3)
    run_broken(3)
    run_limited(3)
    run("lora-stopped", "internlm2", **LORA, training={"zeroStage": 3})
    if group.leads:
        (folder / "outcomes.json").write_text(json.dumps(outcomes), encoding="utf-8")


def damage(path: Path) -> None:
    """Change one byte, so that the size stays and the digest does not."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def poison(folder: Path) -> None:
    """A checkpoint with one weight that is no number."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(GOLDEN / "checkpoints" / "qwen2", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def convert(folder: Path) -> None:
    """The qwen2 checkpoint in transformers' own format."""
    from internvl_trainer.model.load import load_chat_model

    base = GOLDEN / "checkpoints" / "qwen2"
    load_chat_model(base, dtype=torch.float32).model.native.save_pretrained(folder)
    for path in base.iterdir():
        if path.suffix in (".json", ".txt") and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
