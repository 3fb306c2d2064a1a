"""How long a step takes: by arithmetic, and by the bytes that its nodes exchange.

Both are estimates for deadlines and for advice, from the dimensions of the catalogue. Real speed is in
`internvl_train_step_seconds`, which a run reports.
"""

from math import ceil

from internvl_api.memory.setup import Row, Setup, setup_on_gpus, typical_row
from internvl_api.models.catalogue import count_patches
from internvl_api.models.retrieval import RetrievalCatalogueModel
from internvl_api.run_config import RunConfig

# bf16 without sparsity of an A100, on which upstream's scripts ran (NVIDIA A100 data sheet, 2021).
GPU_FLOPS = 312e12
# Part of it that training reaches, recomputation counted as work. Megatron's models of 22 to 175 billion parameters
# reach 44 to 52 % (Korthikanti et al. 2022, arXiv:2205.05198, table 5); rows of different length reach less.
UTILISATION = 0.4


def step_seconds(setup: Setup, row: Row | None = None) -> float:
    """Seconds of computation in one optimizer step, with rows like `row`; by default typical rows."""
    row = row or typical_row(setup)
    rows = setup.global_batch / setup.world_size
    return rows * row_flops(setup, row) / (GPU_FLOPS * UTILISATION)


def row_flops(setup: Setup, row: Row) -> float:
    """Floating point operations of one row's forward and backward pass, attention's own products not counted.

    A parameter takes two operations for each token in a forward pass, two for the gradients of the inputs and two for
    its own gradient (Kaplan et al. 2020, arXiv:2001.08361, section 2.1); recomputation is one more forward pass.
    """
    model = setup.model
    vision_learns = setup.learns_vision or setup.vision_rank > 0
    language_learns = setup.learns_language or setup.language_rank > 0 or setup.learns_projector or vision_learns
    patches = row.tiles * (count_patches(setup.tile_size) + 1)
    body = model.language.linear_parameters
    if isinstance(model, RetrievalCatalogueModel):
        body += model.projector_parameters
    vision = 2 * patches * model.vision.parameters * _passes(setup, gradients=vision_learns, own=setup.learns_vision)
    language = 2 * row.tokens * body * _passes(setup, gradients=language_learns, own=setup.learns_language)
    head = 2 * row.supervised * model.language.vocab * model.language.hidden * (3 if setup.learns_language else 2)
    return vision + language + head


def _passes(setup: Setup, *, gradients: bool, own: bool) -> int:
    """Passes through a tower, in units of a forward pass."""
    return 1 + (1 + own + setup.gradient_checkpointing if gradients else 0)


def network_bytes(setup: Setup, nodes: int) -> int:
    """Bytes that one node sends (and receives) over the network in an optimizer step; 0 for one node.

    In a ring over all ranks every node passes on whole buffers, but for its own part: (nodes - 1) / nodes. Volumes:
    Rajbhandari et al. 2020, arXiv:1910.02054, section 7. ZeRO-1 reduces gradients once a step, ZeRO-2 and 3 in each
    micro batch; ZeRO-3 gathers the weights for each forward and each backward pass.
    """
    if nodes < 2:
        return 0
    passes = ceil(setup.global_batch / (setup.world_size * setup.rows(typical_row(setup))))
    trained, size = setup.trainable_parameters, setup.element_bytes
    elements = {
        1: 2 * trained,
        2: (passes + 1) * trained,
        3: passes * (2 * setup.model.parameters + trained),
    }[setup.zero_stage]
    # An all-reduce in stage 1 is a reduce-scatter and an all-gather; the weights are gathered after the step.
    elements += trained if setup.zero_stage == 1 else 0
    return size * elements * (nodes - 1) // nodes


def bound_by_network(setup: Setup, nodes: int, bytes_a_second: float) -> float:
    """Times that exchanging a step's bytes takes as long as computing the step; above 1 the network decides.

    Args:
        bytes_a_second: that one node sends; the row `all workers` of the stage doctor measures them.
    """
    return network_bytes(setup, nodes) / bytes_a_second / step_seconds(setup)


def network_warning(config: RunConfig, bytes_a_second: float) -> str | None:
    """A sentence with the sum when exchanging a step's bytes takes longer than computing it; else None.

    None also for a run on the CPU or on one node, and for a model without known dimensions.

    Args:
        bytes_a_second: that one node sends: the bus bandwidth of an all-reduce over all ranks.
    """
    setup = setup_on_gpus(config)
    if setup is None or bound_by_network(setup, config.workers, bytes_a_second) <= 1:
        return None
    sent, computing = network_bytes(setup, config.workers), step_seconds(setup)
    return (
        f"the network decides how long a step takes: each node sends {_gigabytes(sent)}, which takes "
        f"{sent / bytes_a_second:.0f} s at the measured {_gigabytes(bytes_a_second)}/s, and computing takes "
        f"{computing:.0f} s. Use a faster network (spec.network.profile)" + _ADVICE[setup.zero_stage]
    )


_ADVICE = {
    1: ", or raise spec.training.globalBatchSize, which changes the result",
    2: ", or raise spec.training.microBatchSize",
    3: ", raise spec.training.microBatchSize, or set spec.training.zeroStage to 2 where it fits",
}


def _gigabytes(amount: float) -> str:
    return f"{amount / 1e9:.0f} GB" if amount >= 10e9 else f"{amount / 1e9:.2g} GB"
