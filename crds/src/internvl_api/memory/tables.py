"""The tables of docs/memory.md: the estimate beside the guides' figures, and for every recipe.

`python -m internvl_api.memory.tables docs/memory.md` writes them between their markers; `--check` only compares.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from internvl_api.generated import generate, with_tables
from internvl_api.memory.estimate import judge, memory
from internvl_api.memory.setup import longest_row
from internvl_api.quantity import GIB
from internvl_api.recipes.files import recipe_names
from internvl_api.recipes.summary import recipe_setup

CARD = 80 * GIB  # of the A100 that the guides' figures are from


class GuideRow(NamedTuple):
    """A "cost about N G per GPU" of the guides.

    Attributes:
        micro_batch: of the guide's command; the recipe has the script's own.
        figure: GiB, as nvidia-smi shows them.
        repeats: the model whose figures this row repeats; they cannot be measured for both.
        tokens: of a row, where the guide's data are known; else the script's max_seq_length.
    """

    recipe: str
    gpus: int
    micro_batch: int
    figure: int
    repeats: str | None = None
    tokens: int | None = None


_COCO_TOKENS = 7 * 256 + 64  # a photograph of 640 x 480 is 6 tiles and a thumbnail; template, question and caption
_MINI_2B, _MINI_4B, _V1_5 = "Mini-InternVL 2B", "Mini-InternVL 4B", "InternVL-Chat-V1-5"

GUIDE_ROWS = (
    GuideRow("mini-internvl-chat-2b-v1-5-full", 8, 1, 30),
    GuideRow("mini-internvl-chat-2b-v1-5-lora", 2, 1, 27),
    GuideRow("mini-internvl-chat-2b-v1-5-lora", 8, 1, 27),
    GuideRow("mini-internvl-chat-4b-v1-5-full", 8, 1, 40),
    GuideRow("mini-internvl-chat-4b-v1-5-lora", 2, 1, 19),
    GuideRow("mini-internvl-chat-4b-v1-5-lora", 8, 1, 19),
    GuideRow("internvl-chat-v1-2-plus-full", 16, 4, 80),
    GuideRow("internvl-chat-v1-2-plus-lora", 2, 4, 63),
    GuideRow("internvl-chat-v1-5-full", 8, 2, 77),
    GuideRow("internvl-chat-v1-5-lora", 2, 2, 79),
    GuideRow("internvl-chat-v1-5-lora", 8, 2, 60),
    GuideRow("internvl2-2b-lora-coco", 8, 4, 32, tokens=_COCO_TOKENS),
    GuideRow("internvl2-1b-full", 8, 1, 30, _MINI_2B),
    GuideRow("internvl2-1b-lora", 2, 1, 27, _MINI_2B),
    GuideRow("internvl2-2b-full", 8, 1, 30, _MINI_2B),
    GuideRow("internvl2-2b-lora", 2, 1, 27, _MINI_2B),
    GuideRow("internvl2-4b-full", 8, 1, 40, _MINI_4B),
    GuideRow("internvl2-4b-lora", 2, 1, 19, _MINI_4B),
    GuideRow("internvl2-8b-full", 8, 2, 77, _V1_5),
    GuideRow("internvl2-8b-lora", 2, 2, 79, _V1_5),
    GuideRow("internvl2-8b-lora", 8, 2, 60, _V1_5),
    GuideRow("internvl2-26b-full", 8, 2, 77, _V1_5),
    GuideRow("internvl2-26b-lora", 2, 2, 79, _V1_5),
    GuideRow("internvl2-26b-lora", 8, 2, 60, _V1_5),
    GuideRow("internvl2-40b-full", 16, 2, 77),
    GuideRow("internvl2-40b-lora", 2, 2, 74),
    GuideRow("internvl2-40b-lora", 8, 2, 74),
    GuideRow("internvl2-llama3-76b-full", 32, 1, 77),
    GuideRow("internvl2-llama3-76b-lora", 8, 1, 74),
)


class Comparison(NamedTuple):
    """A guide's figure beside the estimate (GiB), for one micro batch; `error` is relative to the figure."""

    row: GuideRow
    zero_stage: int
    micro_batch: int
    estimate: float

    @property
    def error(self) -> float:
        return self.estimate / self.row.figure - 1


def compare(row: GuideRow) -> tuple[Comparison, Comparison]:
    """The estimate for upstream's own run, at the micro batch of the guide's command and at the script's.

    Rows are the longest (lengths are grouped), with logits at EVERY position, all at once. Upstream's DeepSpeed ignores
    contiguous_gradients below stage 2 and makes no buckets there; above, buckets have full size.
    """
    script = recipe_setup(row.recipe)
    zero = replace(script.zero, fitted=False, contiguous_gradients=script.zero_stage > 1)
    setup = replace(script, world_size=row.gpus, zero=zero, whole_logits=True)
    tokens = row.tokens or setup.max_seq_length
    rows = longest_row(setup)._replace(tokens=tokens, supervised=tokens)

    def at(micro_batch: int) -> Comparison:
        total = memory(replace(setup, micro_batch=micro_batch), rows).total
        return Comparison(row, setup.zero_stage, micro_batch, total / GIB)

    return at(row.micro_batch), at(script.micro_batch)


def guide_table() -> str:
    """Markdown table: every row of the guides with the estimate and its error at both micro batches."""
    return markdown(
        ("recipe", "GPUs", "ZeRO", "guide, GB", "command's batch", "script's batch", "figure repeated from"),
        (
            (
                row.recipe,
                row.gpus,
                command.zero_stage,
                row.figure,
                _beside(command),
                _beside(script) if script.micro_batch != command.micro_batch else "the same",
                row.repeats or "",
            )
            for row in GUIDE_ROWS
            for command, script in [compare(row)]
        ),
    )


def _beside(found: Comparison) -> str:
    return f"{found.micro_batch}: {found.estimate:.1f} ({found.error:+.0%})"


def recipe_table() -> str:
    """Markdown table: memory that each recipe needs on a GPU, and whether it fits 80 GiB."""
    judged = [(name, judge(recipe_setup(name), CARD)) for name in recipe_names()]
    return markdown(
        ("recipe", "GPUs", "micro batch", "ZeRO", "typical rows, GiB", "longest rows, GiB", "80 GiB"),
        (
            (
                name,
                each.setup.world_size,
                each.setup.micro_batch,
                each.setup.zero_stage,
                f"{each.typical.total / GIB:.1f}",
                f"{each.longest.total / GIB:.1f}",
                each.verdict,
            )
            for name, each in judged
        ),
    )


def markdown(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def fill(text: str) -> str:
    """`text` with each table between its markers."""
    return with_tables(text, {"guides": guide_table, "recipes": recipe_table})


def main() -> int:
    """Write the tables into the document; with `--check` fail when one is out of date."""
    return generate(main.__doc__, lambda path: {path: fill(path.read_text(encoding="utf-8"))})


if __name__ == "__main__":
    sys.exit(main())
