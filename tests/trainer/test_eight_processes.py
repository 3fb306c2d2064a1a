"""Eight processes train, export and evaluate a checkpoint of 2 GB, each within a memory limit for its part of it.

The kernel keeps the limit: base + part + three layers. The base is what the same stage needs for a checkpoint of 5 MB
with as many layers, the part is the checkpoint over the processes that hold it together, and the three layers are for
weights on their way between processes. A process that holds the whole model is killed. `pytest -s` prints a table.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import ADAMW, assert_each_close
from internvl_api.constants import ExitCode
from safetensors.torch import load_file
from trainer.evaluations import draw, predictions
from trainer.limited_ranks import PhaseTable, limited_ranks
from trainer.memory_limits import NoMemoryGroups, memory_groups
from trainer.runs import losses, make_config, write_config
from trainer.synthetic_checkpoint import Size, write_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.soak]

RANKS, LAYERS, STEPS, CHECKPOINT = 8, 32, 5, 3
SIZES = {
    "small": Size(hidden=64, intermediate=128, layers=LAYERS, shards=RANKS),
    "large": Size(hidden=1024, intermediate=4096, layers=LAYERS, shards=RANKS),
}
ON_THE_WAY = 3  # layers
OF_A_COPY = (1, 2, 4)  # processes that hold a copy of the model together; each evaluation has two copies
MACHINE = 16 << 30  # bytes
WORDS = ("red", "square", "table", "cat", "white", "block", "walks", "there")
FROZEN = {"freeze": {"vision": True, "language": True}}


@dataclass
class Setting:
    """Two checkpoints, rows and questions, and the limits of a process.

    Attributes:
        size: bytes of the large checkpoint.
        base: stage to the bytes that a process needs for the small checkpoint.
    """

    folder: Path
    size: int
    base: dict[str, int] = field(default_factory=dict)
    table: PhaseTable = field(default_factory=PhaseTable)

    def limit(self, stage: str, processes: int, *, files: int = 0) -> int:
        """Bytes for one of the processes that hold the model together, with so many of the checkpoint's files."""
        layers = self.size * ON_THE_WAY // LAYERS
        return self.base[stage] + self.size // processes + self.size * files // RANKS + layers

    def run(self, name: str, ranks: int, checkpoint: str = "large", **sections: Any) -> Path:
        """The folder of a run, with its run.yaml; under ZeRO-3, unless `sections` says otherwise."""
        folder = self.folder / name
        folder.mkdir()
        task = {"task": "vqa", "annotation": str(self.folder / "questions.jsonl"), "maxNewTokens": 6, "minNewTokens": 6}
        settings: dict[str, Any] = {
            "method": "lora",
            "data": {"train": {"golden": {"annotation": str(self.folder / "rows.jsonl")}}},
            "model": {"source": str(self.folder / checkpoint)},
            "image": {"maxDynamicPatch": 1, "videoFrames": 1},
            "checkpoint": {"everySteps": CHECKPOINT},
            "evaluation": {"tasks": {"first": task, "second": task}, "baseline": False, "batchSize": 2},
            **sections,
        }
        # A rate at which the model does not yet answer every question in the same way.
        rate = {"globalBatchSize": RANKS, "microBatchSize": 1, "maxSteps": STEPS, "learningRate": 3e-4}
        training = {**rate, **zero_3(SIZES[checkpoint])}
        settings["training"] = training | sections.get("training", {})
        write_config(make_config(str(folder / "output"), workers=ranks, **settings), folder)
        return folder

    def evaluation(self, trained: Path, name: str, ranks: int, checkpoint: str = "large") -> Path:
        """The folder of a run of so many processes that has the result of another's training."""
        folder = self.run(name, ranks, checkpoint)
        shutil.copytree(trained / "output/stages/train", folder / "output/stages/train")
        shutil.copyfile(trained / "output/run.json", folder / "output/run.json")
        return folder


def zero_3(size: Size) -> dict[str, Any]:
    """As for a model that is large for its GPUs: a matrix is gathered when it is used, and all matrices are cut."""
    zero = {
        "stage3_param_persistence_threshold": 8 * size.hidden,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": size.hidden * size.intermediate,
        "stage3_max_reuse_distance": 0,
    }
    return {"zeroStage": 3, "deepspeed": {"zero_optimization": zero}}


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """Skips where memory cannot be limited, or eight processes do not fit."""
    try:
        with memory_groups(1, 1 << 30):
            pass
    except NoMemoryGroups as error:
        pytest.skip(str(error))
    if (memory := os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) < MACHINE:
        pytest.skip(f"eight processes and the models need {MACHINE >> 30} GiB of memory; found {memory >> 30} GiB")
    folder = tmp_path_factory.mktemp("eight")
    write_rows(folder)
    sizes = {name: write_checkpoint(folder / name, size) for name, size in SIZES.items()}
    for path in (folder / "large").glob("*.safetensors"):
        drop_from_page_cache(path)
    made = Setting(folder, sizes["large"])
    measure_base(made)
    yield made
    print(f"\ncheckpoint: {made.size / 1e6:.0f} MB; base: {made.base}\n{made.table}")
    shutil.rmtree(folder)


def write_rows(folder: Path) -> None:
    """Short rows and questions, with a picture each: one row for every process, so that each trains in every step."""
    rows, questions = [], []
    for name, word, other in zip(draw(folder, RANKS), WORDS, reversed(WORDS), strict=True):
        turns = ("system", "s"), ("human", f"<image>\n{word}"), ("gpt", f"a {other}")
        rows.append({"image": name, "conversations": [{"from": role, "value": value} for role, value in turns]})
        questions.append({"image": name, "question": word, "question_id": len(questions), "answer": other})
    for file, lines in (("rows.jsonl", rows), ("questions.jsonl", questions)):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))


def drop_from_page_cache(path: Path) -> None:
    """So that the processes that read the file are charged for its pages, until the kernel drops them."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_base(setting: Setting) -> None:
    trained = setting.run("base", 2, "small")
    with limited_ranks(trained, "train", 2, None, setting.table) as ranks:
        setting.base["train"] = ranks.wait(ExitCode.OK, "base: train")
    with limited_ranks(trained, "evaluate", 2, None, setting.table, of_a_copy=2) as ranks:
        setting.base["evaluate"] = ranks.wait(ExitCode.OK, "base: evaluate")


@pytest.fixture(scope="module")
def trained(setting: Setting) -> Path:
    """The folder of a run that eight processes trained, each with an eighth of the model, stopped once on the way."""
    folder, limit = setting.run("run", RANKS), setting.limit("train", RANKS)
    with limited_ranks(folder, "train", RANKS, limit, setting.table) as ranks:
        ranks.wait_for("trainable", "load")
        ranks.wait_for(f"step {CHECKPOINT}/{STEPS}", f"{CHECKPOINT} steps")
        ranks.wait_for(f"checkpoint at step {CHECKPOINT}: training stood still", "snapshot for the checkpoint")
        ranks.stop()
        ranks.wait(ExitCode.RESUME, "stop by SIGTERM, with its checkpoint")
        assert ranks.stages[0].result.checkpoint is not None
        assert ranks.stages[0].result.checkpoint.step >= CHECKPOINT
    with limited_ranks(folder, "train", RANKS, limit, setting.table) as ranks:
        ranks.wait_for(f"step {STEPS}/{STEPS}", "resume and train")
        ranks.wait(ExitCode.OK, "export of the adapter")
    return folder


def test_eighths_of_a_model_learn_what_the_whole_model_learns(setting: Setting, trained: Path) -> None:
    """Every step, those before the stop and those after it, has the loss of one process without a limit."""
    alone = setting.run("alone", 1, training={"zeroStage": 1, "deepspeed": {}})
    with limited_ranks(alone, "train", 1, None, setting.table) as ranks:
        ranks.wait(ExitCode.OK, "one process alone")
    found = losses(trained / "output")
    assert found[STEPS] < found[1]
    assert_each_close(found, losses(alone / "output"), ADAMW)


def test_parts_of_a_model_answer_what_the_whole_model_answers(setting: Setting, trained: Path) -> None:
    found = {}
    for processes in OF_A_COPY:
        count, limit = 2 * processes, setting.limit("evaluate", processes)
        folder = setting.evaluation(trained, f"of-{processes}", count)
        with limited_ranks(folder, "evaluate", count, limit, setting.table, of_a_copy=processes) as ranks:
            ranks.wait(ExitCode.OK, f"evaluate, {processes} for a copy")
        tasks = [predictions(folder, "evaluate", task) for task in ("first", "second")]
        found[processes] = [[row["prediction"] for row in rows] for rows in tasks]
    assert len({answer for rows in found[1] for answer in rows}) > 1
    assert found == dict.fromkeys(OF_A_COPY, found[1])


def test_eighths_of_a_model_are_exported_as_the_whole_model(setting: Setting) -> None:
    """A projector learns; the export is a whole checkpoint, of which each process collects one file at a time."""
    folder = setting.run("projector", RANKS, method="full", training={"maxSteps": 1, "warmupRatio": 0.0, **FROZEN})
    with limited_ranks(folder, "train", RANKS, setting.limit("train", RANKS, files=1), setting.table) as ranks:
        ranks.wait_for("step 1/1", "projector: load and train")
        ranks.wait(ExitCode.OK, "export of the model")
    files = sorted((folder / "output/stages/train/model").glob("*.safetensors"))
    assert len(files) == RANKS
    for path in files:
        exported, base = load_file(path), load_file(setting.folder / "large" / path.name)
        changed = {name for name in base if not torch.equal(exported[name], base[name])}
        assert exported.keys() == base.keys()
        assert changed == {name for name in base if name.startswith("mlp1.")}


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_process_that_holds_the_whole_model_is_killed(setting: Setting, trained: Path, stage: str) -> None:
    """The limits above are no wider than they say: ZeRO-1 does not fit into one, nor a whole copy into that of two."""
    if stage == "train":
        folder, limit = setting.run("whole", 2, training={"zeroStage": 1, "deepspeed": {}}), setting.limit(stage, RANKS)
    else:
        folder, limit = setting.evaluation(trained, "one-for-two", 1), setting.limit(stage, 2)
    with limited_ranks(folder, stage, 2 if stage == "train" else 1, limit, setting.table, of_a_copy=1) as ranks:
        ranks.wait_for_kill()
