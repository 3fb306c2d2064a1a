"""Two real processes under DeepSpeed give the losses of one plain process with the whole batch."""

import json
from pathlib import Path

import pytest
import torch
from closeness import assert_each_close
from internvl_trainer.model.adapters import LoraSettings
from internvl_trainer.retrieval.methods import apply_retrieval_method
from retrieval_golden import batch, load
from trainer.two_ranks import run_on_two_ranks

WORKER = Path(__file__).with_name("retrieval_worker.py")
RUNS = [f"{stage}-{method}" for method in ("full", "head", "lora") for stage in (1, 3)]  # ZeRO stage and method
# The same as in retrieval_worker.py, which cannot be imported here: it takes hold of DeepSpeed's accelerator.
STEPS = 3
LORA = LoraSettings(language_rank=4, vision_rank=2, dropout=0.0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory where both processes, started once, leave what each run gave."""
    return run_on_two_ranks(WORKER, tmp_path_factory.mktemp("ranks"), RUNS)


def train_alone(method: str) -> list[dict[str, float]]:
    model = load("cross-attention").model
    apply_retrieval_method(model, method, lora=LORA)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.02, momentum=0.9)
    history = []
    for _ in range(STEPS):
        output = model.train()(**batch("cross-attention"))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        history.append({name: float(getattr(output, name).detach()) for name in ("loss", "loss_itc", "loss_itm")})
    return history


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_as_one(two_ranks: Path, run: str) -> None:
    """Each image meets the other rank's texts, and each rank's features get the other's gradients."""
    alone = train_alone(run.split("-")[1])
    assert alone[-1]["loss_itc"] < alone[0]["loss_itc"]
    together = json.loads((two_ranks / f"{run}.json").read_text())
    for found, wanted in zip(together, alone, strict=True):
        assert_each_close(found, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_hard_negatives_are_found_on_the_other_rank(two_ranks: Path, rank: int) -> None:
    """Each rank has captions of one picture only; texts are not equally long on both."""
    inputs = batch("cross-attention")
    lengths = [int(mask.sum(1).max()) for mask in inputs["positive_attention_mask"].chunk(2)]
    assert lengths[0] != lengths[1]
    others = inputs["positive_input_ids"].chunk(2)[1 - rank].tolist()
    mined = json.loads((two_ranks / f"mined-{rank}.json").read_text())
    assert len(mined) == 2
    assert all(text in [[token for token in other if token] for other in others] for text in mined)
