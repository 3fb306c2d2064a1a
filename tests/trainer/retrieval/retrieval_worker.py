"""One rank of test_two_ranks.py: a few steps under each ZeRO stage and method; rank 0 writes the ranks' mean losses."""

import json
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[2]))

import deepspeed
import torch
from internvl_trainer.model.adapters import LoraSettings
from internvl_trainer.retrieval.methods import apply_retrieval_method
from retrieval_golden import batch, load

STEPS = 3
LORA = LoraSettings(language_rank=4, vision_rank=2, dropout=0.0)


def train(stage: int, method: str) -> list[dict[str, float]]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # DeepSpeed's default clips at 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    model = load("cross-attention", zero3_config=config if stage == 3 else None).model
    apply_retrieval_method(model, method, lora=LORA)
    model.set_gradient_checkpointing(True)
    # Not Adam: it turns gradients that are nothing but rounding into full steps.
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.02, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, config=config, optimizer=optimizer)
    rows = {name: tensor.chunk(ranks)[rank] for name, tensor in batch("cross-attention").items()}
    history = []
    for _ in range(STEPS):
        output = engine(**rows)
        engine.backward(output.loss)
        engine.step()
        losses = torch.stack([output.loss.detach(), output.loss_itc, output.loss_itm])
        torch.distributed.all_reduce(losses)
        history.append(dict(zip(("loss", "loss_itc", "loss_itm"), (losses / ranks).tolist(), strict=True)))
    return history


def mine_over_ranks() -> list[list[int]]:
    """The texts that a rank whose own rows are all of one picture matched with it as hard negatives."""
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    rows = {name: tensor.chunk(ranks)[rank] for name, tensor in batch("cross-attention").items()}
    rows["image_ids"] = torch.full((2,), rank)
    longest = int(rows["positive_attention_mask"].sum(1).max())
    rows |= {name: rows[name][:, :longest] for name in ("positive_input_ids", "positive_attention_mask")}
    model = load("cross-attention", hard_negatives=True).model
    seen: list[torch.Tensor] = []
    model.qllama.model.embed_tokens.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0]))
    model(**rows).loss.backward()
    _, matched = seen  # contrast reads the summaries first
    return [[token for token in row if token] for row in matched.chunk(2)[0].tolist()]


def main(output: Path, runs: list[str]) -> None:
    # Building this optional op takes a minute; gloo does without.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    (output / f"mined-{rank}.json").write_text(json.dumps(mine_over_ranks()))
    for run in runs:
        stage, method = run.split("-")
        history = train(int(stage), method)
        if rank == 0:
            (output / f"{run}.json").write_text(json.dumps(history))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
