"""Figures that upstream published for a model and a test set, from published_figures.yaml."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from itertools import chain

import yaml
from internvl_api.spec import Image
from internvl_api.spec.evaluation import TASK_DEFAULTS, TaskKind
from internvl_api.types import ApiModel
from pydantic import model_validator


class TestSet(ApiModel):
    """What a test set is recognised by.

    Attributes:
        captions: of all pictures together.
        names: regular expression of a picture's file name, without folders.
    """

    __test__ = False  # for pytest, which collects classes by their name

    title: str
    pictures: int
    captions: int
    names: str


class RecipeRun(ApiModel):
    """The training that a table is of: a recipe, its base model on the Hub, and the rows of an epoch."""

    name: str
    base: str
    rows: int


class Table(ApiModel):
    """Published figures of one model.

    Attributes:
        source: file in upstream's repository, or page.
        model: on the Hub, where the model is released.
        recipe: what trains such a model; None: nothing here does.
        image: how pictures were cut.
        figures: task to figures, in the order of its metrics; nested only to be read.
    """

    source: str
    model: str | None = None
    recipe: RecipeRun | None = None
    image: Image
    figures: dict[TaskKind, list[list[float]]]

    def of(self, kind: TaskKind) -> dict[str, float]:
        """Metric to figure."""
        return dict(zip(TASK_DEFAULTS[kind].metrics, chain.from_iterable(self.figures[kind]), strict=True))


class PublishedFigures(ApiModel):
    """The whole file."""

    test_sets: dict[TaskKind, TestSet]
    tables: list[Table]

    @model_validator(mode="after")
    def _is_whole(self) -> PublishedFigures:
        for table in self.tables:
            for kind in table.figures:
                if kind not in self.test_sets or len(table.of(kind)) != len(TASK_DEFAULTS[kind].metrics):
                    raise ValueError(f"{kind}: figures without a test set, or not as many as metrics")
        return self


@cache
def published_figures() -> PublishedFigures:
    """The file of this package."""
    text = files(__package__).joinpath("published_figures.yaml").read_text(encoding="utf-8")
    return PublishedFigures.model_validate(yaml.safe_load(text))
