"""One rank of test_zero.py: a few steps under each ZeRO stage asked for; rank 0 writes losses and adapters."""

import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import torch
from golden import load, sample
from internvl_trainer.data.collate import collate
from internvl_trainer.model.adapter_files import save_adapter
from internvl_trainer.model.adapters import Freeze, LoraSettings, apply_method, is_adapter

# What each of the two ranks sees in each step. Step 0 has a row without an image on one rank only.
STEPS = [(0, 3), (2, 4), (5, 1)]
CASE = "internlm2/internlm2-chat"
LORA = LoraSettings(language_rank=4, vision_rank=2, dropout=0.0)
CHUNK = 5  # supervised positions at a time: in step 0 one chunk on rank 0, and eleven on rank 1


def optimizer_for(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Not Adam: it turns gradients that are nothing but rounding into full steps."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learning, lr=0.1, momentum=0.9)


def load_partitioned(config: dict[str, Any]) -> torch.nn.Module:
    """Each rank makes and reads its own shares; nothing of the model goes from one rank to another."""
    with patch.object(torch.distributed, "broadcast", side_effect=AssertionError("a parameter was sent to all ranks")):
        model = load("internlm2", zero3_config=config).model
    check_loaded(model)
    return model


def check_loaded(model: torch.nn.Module) -> None:
    """The shares that the ranks have read, gathered, are what one process reads."""
    wanted = dict(load("internlm2").model.named_parameters())
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            assert torch.equal(parameter, wanted.pop(name)), name
    assert not wanted


def train(stage: int, method: str, directory: Path) -> None:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default clips at 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    model = load_partitioned(config) if stage == 3 else load("internlm2").model
    apply_method(model, method, freeze=Freeze(vision=method == "lora"), lora=LORA)
    model.set_gradient_checkpointing(True)
    model.head_loss.positions = CHUNK
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer_for(model))
    losses = []
    for rows in STEPS:
        batch = collate([sample(CASE, rows[rank])])
        engine.eval()  # a validation between steps
        with torch.no_grad():
            validated = engine(**batch)
        engine.train()
        output = engine(**batch)
        torch.testing.assert_close(validated.loss_sum, output.loss_sum.detach())
        total = torch.stack([output.loss_sum.detach(), output.weight_sum])
        torch.distributed.all_reduce(total)
        # DeepSpeed takes the mean of the ranks' gradients; the loss is the mean of all ranks' tokens.
        engine.backward(output.loss_sum / total[1] * ranks)
        engine.step()
        losses.append(float(total[0] / total[1]))
    state = {}
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                state[name] = parameter.detach().clone()
    if rank == 0:
        directory.mkdir()
        (directory / "losses.json").write_text(json.dumps(losses))
        if method == "lora":
            save_adapter(model, directory, state)


def main(output: Path, runs: list[str]) -> None:
    # Building this optional op takes a minute; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for run in runs:
        stage, method = run.split("-")
        train(int(stage), method, output / run)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
