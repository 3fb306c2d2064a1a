"""The tables of docs/real-size.md and docs/network.md: what recipes need on the guides' GPUs, and how long they take.

The figures come from the functions that set requests, judge specs and derive deadlines.
`python -m internvl_api.memory.real_size docs/real-size.md docs/network.md` writes the tables between their markers;
`--check` only compares.
"""

import sys
from typing import NamedTuple

from internvl_api.generated import generate, with_tables
from internvl_api.memory.estimate import judge
from internvl_api.memory.requests import Needs, needs
from internvl_api.memory.setup import Setup, setup_of
from internvl_api.memory.step_time import bound_by_network, network_bytes, step_seconds
from internvl_api.memory.stop_time import STORAGE_RATE, checkpoint_bytes, checkpoint_share, stop_seconds
from internvl_api.memory.tables import CARD, GUIDE_ROWS, markdown
from internvl_api.quantity import GIB
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.summary import recipe_config
from internvl_api.run_config import RunConfig

GPUS_OF_A_NODE = 8
START_SECONDS = 90  # imports, rendezvous, and the first, slower steps
ETHERNET_RATE = 10e9  # bytes a second of one card of 100 Gbit/s over TCP, 80 % of its rate
FABRIC_RATE = 160e9  # of eight cards of 200 Gbit/s with GPUDirect RDMA, 80 % of their rate
# Networks of docs/network.md: bytes a second that a node sends, 80 % of the cards' rate.
_NETWORKS = {
    "10 GbE": 1e9, "100 GbE": ETHERNET_RATE, "4 x 100 Gb": 40e9, "8 x 200 Gb": FABRIC_RATE, "8 x 400 Gb": 320e9
}  # fmt: skip

_HEAD = (
    "recipe", "GPUs", "GPU, GiB", "host, GiB", "disk, GiB", "shm, GiB", "checkpoint, GB", "of a node", "step, s",
    "stop, s", "start, s", "resume, s", "network, GB/s", "100 GbE", "8 x 200 Gb",
)  # fmt: skip


class Size(NamedTuple):
    """A recipe on some GPUs, with what one of its workers needs."""

    config: RunConfig
    setup: Setup
    needs: Needs

    @property
    def start_seconds(self) -> float:
        """Seconds until the first step, when no node has the base model's weights yet."""
        return START_SECONDS + self._bytes_read(self.setup.model.parameters) / STORAGE_RATE

    @property
    def resume_seconds(self) -> float:
        """The same from a checkpoint, of which each node reads its share; it has what learns in full training."""
        restored = self.setup.trainable_parameters if self.config.method == "full" else 0
        read = self._bytes_read(self.setup.model.parameters - restored)
        return START_SECONDS + (read + checkpoint_share(self.setup, self.config.workers)) / STORAGE_RATE

    def _bytes_read(self, parameters: int) -> float:
        """Bytes that a node reads so that its ranks have these parameters of the base model; at most the whole."""
        ranks, setup = self.config.processes_per_worker, self.setup
        copies = ranks / setup.world_size if setup.zero_stage == 3 else ranks
        return setup.element_bytes * min(copies * parameters, setup.model.parameters)


def sizes() -> list[Size]:
    """Every recipe on its own GPUs, then on the others that the guides have figures for."""
    found = []
    for name in recipe_names():
        config = recipe_config(name)
        others = {row.gpus for row in GUIDE_ROWS if row.recipe == name} - {config.world_size}
        found += [_size(config), *(_size(_on(config, gpus)) for gpus in sorted(others))]
    return found


def _on(config: RunConfig, gpus: int) -> RunConfig:
    workers = -(-gpus // GPUS_OF_A_NODE)
    return config.model_copy(update={"workers": workers, "processes_per_worker": gpus // workers})


def _size(config: RunConfig) -> Size:
    setup, needed = setup_of(config), needs(config, "train")
    if setup is None or needed is None:
        raise LookupError(f"recipe {config.recipe}: its model is not in the catalogue")
    return Size(config, setup, needed)


def table() -> str:
    """The Markdown table."""
    return markdown(_HEAD, (_cells(size) for size in sizes()))


def _cells(size: Size) -> tuple[object, ...]:
    setup, workers, needed = size.setup, size.config.workers, size.needs
    found = judge(setup, CARD)
    step = step_seconds(setup)
    several = workers > 1
    return (
        size.config.recipe,
        setup.world_size,
        f"{found.typical.total / GIB:.0f} to {found.longest.total / GIB:.0f}",
        _gib(needed.memory_bytes),
        _gib(needed.disk_bytes),
        _gib(needed.shm),
        f"{checkpoint_bytes(setup) / 1e9:.0f}",
        f"{checkpoint_share(setup, workers) / 1e9:.0f}",
        f"{step:.0f}",
        stop_seconds(setup, workers),
        f"{size.start_seconds:.0f}",
        f"{size.resume_seconds:.0f}",
        f"{network_bytes(setup, workers) / step / 1e9:.0f}" if several else "",
        f"{bound_by_network(setup, workers, ETHERNET_RATE):.1f}" if several else "",
        f"{bound_by_network(setup, workers, FABRIC_RATE):.2f}" if several else "",
    )


def network_table() -> str:
    """The Markdown table of the recipes on several nodes: seconds of exchanging a step's bytes, by network."""
    head = ("recipe", "GPUs", "ZeRO", "sent, GB", "computing, s", *(f"{name}, s" for name in _NETWORKS))
    return markdown(head, (_exchange(size) for size in sizes() if size.config.workers > 1))


def _exchange(size: Size) -> tuple[object, ...]:
    sent = network_bytes(size.setup, size.config.workers)
    seconds = (f"{sent / rate:.0f}" for rate in _NETWORKS.values())
    about = (size.config.recipe, size.setup.world_size, size.setup.zero_stage)
    return (*about, f"{sent / 1e9:.0f}", f"{step_seconds(size.setup):.0f}", *seconds)


def _gib(amount: int) -> str:
    return f"{amount / GIB:.0f}"


def fill(text: str) -> str:
    """`text` with the tables between those markers that it has."""
    return with_tables(text, {"recipes": table, "networks": network_table})


def main() -> int:
    """Write the tables into the documents; with `--check` fail when one is out of date."""
    return generate(main.__doc__, lambda path: {path: fill(path.read_text(encoding="utf-8"))})


if __name__ == "__main__":
    sys.exit(main())
