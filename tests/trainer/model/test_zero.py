"""Two real processes under DeepSpeed give the losses of one plain process."""

import json
from pathlib import Path

import pytest
import torch
from closeness import assert_close, assert_each_close
from golden import load, sample
from internvl_trainer.data.collate import collate
from internvl_trainer.model.adapter_files import adapter_state_dict, read_adapter
from internvl_trainer.model.adapters import Freeze, LoraSettings, apply_method
from internvl_trainer.model.chat_model import ChatModel
from trainer.two_ranks import run_on_two_ranks

WORKER = Path(__file__).with_name("zero_worker.py")
RUNS = ["1-lora", "3-lora", "3-full"]  # ZeRO stage and method
# The same as in zero_worker.py, which cannot be imported here: it takes hold of DeepSpeed's accelerator.
STEPS = [(0, 3), (2, 4), (5, 1)]
LORA = LoraSettings(language_rank=4, vision_rank=2, dropout=0.0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory where both processes, started once, leave what each run made."""
    return run_on_two_ranks(WORKER, tmp_path_factory.mktemp("zero"), RUNS)


def train_alone(method: str) -> tuple[list[float], ChatModel]:
    model = load("internlm2").model
    apply_method(model, method, freeze=Freeze(vision=method == "lora"), lora=LORA)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for rows in STEPS:
        output = model.train()(**collate([sample("internlm2/internlm2-chat", row) for row in rows]))
        loss = output.loss_sum / output.weight_sum
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, model


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_two_ranks_train_as_one(two_ranks: Path, run: str) -> None:
    """With partitioned loading, adapters that share weights, and a row without an image on one rank only."""
    method = run.split("-")[1]
    losses, model = train_alone(method)
    assert losses[-1] < losses[0]
    assert_close(json.loads((two_ranks / run / "losses.json").read_text()), losses)
    if method == "lora":
        wanted, found = adapter_state_dict(model), read_adapter(two_ranks / run).tensors
        assert_each_close(found, wanted)
