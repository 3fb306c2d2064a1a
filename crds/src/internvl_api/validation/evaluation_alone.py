"""Rules of `method: none`, a run that only evaluates: what it needs, and settings that would have no effect."""

from collections.abc import Callable, Collection
from functools import reduce
from typing import Any, cast

from pydantic import BaseModel
from pydantic.alias_generators import to_snake

from internvl_api.spec import InternVLFineTuneSpec, Training
from internvl_api.spec.data import Preflight
from internvl_api.spec.model import Lora
from internvl_api.spec.training import Checkpoint, Retrieval
from internvl_api.types import ApiModel
from internvl_api.validation.cel_rules import Rule, Values, given, is_true, not_empty, rule

ALONE = "self.?method.orValue('full') == 'none'"
"""CEL of the spec, true where nothing is trained."""
EVALUATION_SETTINGS = ("precision", "maxSeqLength")
"""Fields of `training` that also decide how a model answers; of chat models only the first."""
_WHY = "method none trains nothing"


@rule(
    "",
    f"{ALONE} || (has(self.data) && (has(self.data.meta) || (has(self.data.train) && self.data.train.size() > 0)))",
    "found neither train nor meta; name at least one dataset, or set method to none to evaluate the model alone",
    field="data",
    required=True,
)
def training_data(spec: InternVLFineTuneSpec) -> Values | None:
    """There is a training dataset, where something is trained."""
    data = spec.data
    return {} if spec.trains and not data.train and data.meta is None else None


@rule(
    "",
    f"!({ALONE}) || (has(self.evaluation) && has(self.evaluation.tasks) && self.evaluation.tasks.size() > 0)",
    "found none with method none, which only evaluates; name at least one test set",
    field="evaluation.tasks",
    required=True,
)
def test_sets(spec: InternVLFineTuneSpec) -> Values | None:
    """There is something to evaluate."""
    return {} if not spec.trains and not spec.evaluation.tasks else None


@rule(
    "",
    f"!{given('model.adapter')} || {ALONE}",
    "found an adapter with a method that trains; set method to none to evaluate it, or remove adapter",
    field="model.adapter",
)
def adapter_is_evaluated(spec: InternVLFineTuneSpec) -> Values | None:
    """An adapter is put on the model only to evaluate it."""
    return {} if spec.model.adapter is not None and spec.trains else None


def _written(section: BaseModel, names: Collection[str]) -> str | None:
    """The first of these fields (names of the spec) that is set."""
    is_set = (name for name in names if to_snake(name) in section.model_fields_set)
    return next((name for name in is_set if getattr(section, to_snake(name)) is not None), None)


def _fields(section: type[ApiModel], without: Collection[str] = ()) -> tuple[str, ...]:
    """The names of a section's fields in the spec."""
    names = (field.alias or name for name, field in section.model_fields.items())
    return tuple(name for name in names if name not in without)


def _refused(
    field: str,
    message: str,
    is_set: Callable[[str], str] = given,
    is_asked_for: Callable[[InternVLFineTuneSpec], object] | None = None,
) -> Rule:
    """A setting without effect when nothing is trained.

    Args:
        is_set: of the field, CEL that is true where the setting is given.
        is_asked_for: the same in Python; default: the field has a value, and not an empty or false one.
    """

    @rule("", f"!({ALONE}) || !({is_set(field)})", message, field=field)
    def has_effect(spec: InternVLFineTuneSpec) -> Values | None:
        asked_for = is_asked_for(spec) if is_asked_for else _value(spec, field)
        return {} if not spec.trains and asked_for else None

    return has_effect


def _value(spec: InternVLFineTuneSpec, field: str) -> object:
    return reduce(lambda section, name: getattr(section, to_snake(name)), field.split("."), cast(Any, spec))


def _refused_section(section: str, kind: type[ApiModel], message: str, kept: Collection[str] = ()) -> Rule:
    """Every field of a section but the kept ones; the message names the first that is found."""
    names = _fields(kind, without=kept)
    is_set = " || ".join(given(f"{section}.{name}") for name in names)
    first = "".join(f"{given(f'{section}.{name}')} ? '{name}' : " for name in names) + "''"

    @rule("", f"!({ALONE}) || !({is_set})", message, field=section, found=first)
    def has_effect(spec: InternVLFineTuneSpec) -> Values | None:
        found = None if spec.trains else _written(getattr(spec, section), names)
        return {"found": found} if found else None

    return has_effect


_NO_ROWS = "found datasets; method none reads no rows to train on, remove {}, and name test sets in evaluation.tasks"
_READS_NONE = f"found a setting of training data; {_WHY}, remove it"
_SECTIONS = (
    _refused_section(
        "training",
        Training,
        f"found {{found}}; {_WHY}, remove every setting of training but {' and '.join(EVALUATION_SETTINGS)}",
        kept=EVALUATION_SETTINGS,
    ),
    _refused_section("lora", Lora, f"found {{found}}; {_WHY}, remove lora; model.adapter names an adapter to evaluate"),
    _refused_section("retrieval", Retrieval, f"found {{found}}; {_WHY}, remove retrieval; test sets are in evaluation"),
    _refused_section("checkpoint", Checkpoint, f"found {{found}}; {_WHY} and keeps no checkpoints, remove checkpoint"),
)
_DATA = (
    _refused("data.train", _NO_ROWS.format("train"), not_empty),
    _refused("data.meta", _NO_ROWS.format("meta")),
    _refused("data.validation", _NO_ROWS.format("validation"), not_empty),
    _refused("data.validationMeta", _NO_ROWS.format("validationMeta")),
    _refused("data.mixingTemperature", _READS_NONE),
    _refused(
        "data.preflight",
        f"found settings; {_WHY}, and preflight checks every row of the test sets; remove them",
        lambda field: " || ".join(given(f"{field}.{name}") for name in _fields(Preflight)),
        lambda spec: _written(spec.data.preflight, _fields(Preflight)),
    ),
    _refused(
        "data.badRows",
        "found skip; a test set with bad rows is refused, because its figures would be of other rows; correct the "
        "rows and remove badRows",
        lambda _: "self.?data.?badRows.orValue('fail') == 'skip'",
        lambda spec: spec.data.bad_rows == "skip",
    ),
)
_OTHERS = (
    _refused(
        "minWorkers", f"found a number; {_WHY}, and only training changes its size: remove minWorkers, and set workers"
    ),
    _refused(
        "model.dropPathRate",
        f"found a rate; {_WHY}, remove it",
        is_asked_for=lambda spec: _written(spec.model, ("dropPathRate",)),
    ),
    _refused(
        "model.resizeEmbeddings",
        f"found true; {_WHY}, and new embeddings have nothing to answer with: remove it, and use the model's own "
        "tokenizer",
        is_true,
    ),
    _refused(
        "evaluation.baseline",
        "found true; method none evaluates one model, remove baseline, and evaluate the other model in a run of its "
        "own",
        is_true,
    ),
    _refused("evaluation.everySteps", f"found a number; {_WHY} and takes no steps, remove it"),
    _refused("merge.formats", f"found a format; {_WHY}, so there are no weights to merge, remove merge", not_empty),
    _refused(
        "publish.hub",
        f"found a repository; {_WHY}, so there are no weights to publish, remove hub; figures and report go to output",
    ),
)
RUN_CONFIG_RULES = (training_data, test_sets, adapter_is_evaluated)
"""The rules that also hold for a run.yaml, where every setting of a section is written out."""
RULES = (*RUN_CONFIG_RULES, *_SECTIONS, *_DATA, *_OTHERS)
