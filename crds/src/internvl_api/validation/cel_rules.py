"""What a CRD's schema cannot say field by field: CEL rules, each at the field that its message is about.

`resolve` makes the same checks in the same words, for runs without Kubernetes and for what a recipe brings along; here
only what the user wrote is known. Language: Kubernetes documentation, "Common Expression Language in Kubernetes".

The API server does not apply a new rule to an old object while the field that carries the rule is unchanged
("ratcheting"). So each rule is placed as deep in the schema as possible. A rule about several sections is placed at
`spec` and compares with the old object itself; without that, an old object that breaks it could not be suspended.

The API server estimates the cost of each rule and refuses a CRD that is too expensive. It assumes the longest possible
result for `string(1)`, and none for `'%d'.format([1])`: rules use the latter.
"""

import json
import re
from typing import Any, NamedTuple

from internvl_api.models.catalogue import CATALOGUE
from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.publish_condition import CONDITION_PATTERN
from internvl_api.recipes.files import recipe_names
from internvl_api.spec import InternVLFineTuneSpec, Training
from internvl_api.spec.evaluation import BASELINE_RESERVED
from internvl_api.validation.cluster import OUTPUT_STAYS

Schema = dict[str, Any]


class Rule(NamedTuple):
    """`holds` and, where it shows what was found, `says` are CEL; `message` is plain text."""

    at: str  # field that carries the rule, its value is `self`; [] for every value of a map; "" for the root
    holds: str
    message: str = ""
    says: str = ""
    field: str = ""  # field that the message names, when it is below `at`
    required: bool = False  # report a missing value rather than an invalid one
    before: str = ""  # cheaper condition for the old object, when `holds` would exceed the cost limit


def _default(model: Any, name: str) -> int:
    value = model.model_fields[name].default
    assert isinstance(value, int)
    return value


def _positive(number: str) -> str:
    """CEL for a number, or 1 when it is below 1: its own field reports that, and no rule divides by 0."""
    return f"({number} > 0 ? {number} : 1)"


_WORKERS = f"self.?workers.orValue({_default(InternVLFineTuneSpec, 'workers')})"
_GPUS = f"self.?gpusPerWorker.orValue({_default(InternVLFineTuneSpec, 'gpus_per_worker')})"
_MICRO = f"self.?training.?microBatchSize.orValue({_default(Training, 'micro_batch_size')})"
_GLOBAL = f"self.?training.?globalBatchSize.orValue({_default(Training, 'global_batch_size')})"
_PROCESSES = f"({_positive(_WORKERS)} * {_positive(_GPUS)})"
_FORWARD = f"({_PROCESSES} * {_positive(_MICRO)})"  # samples in one forward of all processes
_LOWER = f"({_GLOBAL} / {_FORWARD} * {_FORWARD})"
_BATCH_FIELDS = ("workers", "gpusPerWorker", "training.globalBatchSize", "training.microBatchSize")


def _optional(path: str) -> str:
    """CEL for an optional field: `a.b` becomes `.?a.?b`, which does not fail when `a` is absent."""
    return "".join(f".?{part}" for part in path.split("."))


def _given(*paths: str) -> str:
    return " && ".join(f"self{_optional(path)}.hasValue()" for path in paths)


def _listed(names: tuple[str, ...]) -> str:
    """A CEL list."""
    return json.dumps(names)


def _hint(names: str, then: str = "", otherwise: str = "") -> str:
    """CEL for `did you mean 'x'?` and `then`, or `otherwise` when no name of the list is similar.

    Similar: one name is the beginning of the other, ignoring case.
    """
    one, other = "name.lowerAscii()", "self.lowerAscii()"
    similar = f"{names}.filter(name, {one}.startsWith({other}) || {other}.startsWith({one}))"
    return f"({similar}.map(name, \"did you mean '%s'? {then}\".format([name])) + ['{otherwise}'])[0]"


_RECIPES = _listed(recipe_names())
_MODELS = _listed((*CATALOGUE, *RETRIEVAL_MODELS))

SPEC_RULES = (
    Rule(
        "recipe",
        f"self in {_RECIPES}",
        says=f"\"unknown recipe '%s'; %s`internvl-trainer recipes` lists all\".format([self, {_hint(_RECIPES)}])",
    ),
    Rule(
        "model.name",
        f"self in {_MODELS}",
        says="\"unknown model '%s'; %s model.name to load model.source alone\""
        f".format([self, {_hint(_MODELS, 'Remove', 'remove')}])",
    ),
    Rule(
        "",
        f"{_given('recipe')} || {_given('model.name')} || {_given('model.source')}",
        "no base model; set recipe, model.name or model.source",
        field="model",
        required=True,
    ),
    Rule(
        "data",
        "has(self.meta) || (has(self.train) && self.train.size() > 0)",
        "found neither train nor meta; name at least one dataset",
        required=True,
    ),
    Rule(
        "data",
        "self.badRows == 'skip' || self.?maxBadRows.orValue(0) == 0",
        says="'found maxBadRows %d with badRows: fail; set badRows to skip'.format([self.maxBadRows])",
    ),
    Rule(
        "image",
        "self.?minDynamicPatch.orValue(1) <= self.?maxDynamicPatch.orValue(64)",
        says="'minDynamicPatch %d exceeds maxDynamicPatch %d; lower minDynamicPatch or raise maxDynamicPatch'"
        ".format([self.minDynamicPatch, self.maxDynamicPatch])",
    ),
    Rule(
        "",  # a recipe may bring what the user has not written
        f"({_given('recipe')} && !({_given(*_BATCH_FIELDS)})) || {_GLOBAL} % {_FORWARD} == 0",
        says="'%d is not a multiple of %d (%d processes x microBatchSize %d); use %s%d, or change workers, "
        f"gpusPerWorker or microBatchSize'.format([{_GLOBAL}, {_FORWARD}, {_PROCESSES}, {_MICRO}, "
        f"{_LOWER} > 0 ? '%d or '.format([{_LOWER}]) : '', {_LOWER} + {_FORWARD}])",
        field="training.globalBatchSize",
    ),
    Rule(
        "training",
        "!self.?packing.?enabled.orValue(false) || !self.?groupByLength.orValue(false)",
        "groupByLength is true with packing.enabled, whose packs are full anyway; set groupByLength to false",
    ),
    Rule(
        "training",
        "!self.?packing.?enabled.orValue(false) || "
        "self.?maxSeqLength.orValue(0) <= self.?packing.?maxTokens.orValue(2147483647)",
        says="'packing.maxTokens %d is less than maxSeqLength %d, so the longest rows fit in no pack; raise "
        "packing.maxTokens or lower maxSeqLength'.format([self.packing.maxTokens, self.maxSeqLength])",
    ),
    Rule(
        "training",
        "self.?warmupSteps.orValue(0) == 0 || self.?warmupSteps.orValue(0) < self.?maxSteps.orValue(2147483647)",
        says="'warmupSteps %d must be below maxSteps %d, else the full learning rate is never reached; lower "
        "warmupSteps'.format([self.warmupSteps, self.maxSteps])",
        field="warmupSteps",
    ),
    Rule(
        "scheduling",
        "self.?gang.orValue('') != 'kueue' || has(self.queue)",
        "gang: kueue needs queue; set it to a LocalQueue of the run's namespace",
    ),
    Rule(
        "scheduling",
        "!has(self.queue) || self.?gang.orValue('') in ['kueue', 'volcano']",
        says="\"queue '%s' needs gang: kueue or gang: volcano; set gang, or remove queue\".format([self.queue])",
    ),
    Rule(
        "evaluation.publishIf",  # a rule and no pattern: where a pattern fails, a server shows the user all of it
        f"self.matches(r'{CONDITION_PATTERN}')",
        says="\"found '%s', which is not a condition; write a metric, a comparison and a number or metric, as "
        "'CIDEr >= 1.2' or 'CIDEr > baseline.CIDEr', joined by and / or\".format([self])",
    ),
    Rule(
        "evaluation",
        "!has(self.publishIf) || (has(self.tasks) && self.tasks.size() > 0)",
        says="\"publishIf '%s' needs metrics, but evaluation.tasks is empty; add a task that measures them\""
        ".format([self.publishIf])",
        field="publishIf",
    ),
    Rule(
        "evaluation",
        "!has(self.publishIf) || self.baseline || !self.publishIf.matches('(^|[^A-Za-z0-9_])baseline[.]')",
        says="'publishIf uses %s, but evaluation.baseline is false; set evaluation.baseline to true'"
        ".format([self.publishIf.find('baseline[.][A-Za-z0-9_.]+')])",
        field="publishIf",
    ),
    Rule(
        "evaluation",
        "!self.baseline || (has(self.tasks) && self.tasks.size() > 0)",
        "baseline is true, but evaluation.tasks is empty; add tasks, or remove baseline",
        field="baseline",
    ),
    Rule(
        "",
        f"!{_given('evaluation.everySteps')} || (has(self.data.validation) && self.data.validation.size() > 0)",
        says="'everySteps %d needs data.validation, which is empty; add a dataset there, or remove everySteps'"
        ".format([self.evaluation.everySteps])",
        field="evaluation.everySteps",
    ),
    Rule(
        "evaluation.tasks",
        "!('baseline' in self)",
        BASELINE_RESERVED,
    ),
    Rule(
        "evaluation.tasks[]",
        "self.?minNewTokens.orValue(0) <= self.?maxNewTokens.orValue(4096)",
        says="'minNewTokens %d is more than maxNewTokens %d; lower minNewTokens or raise maxNewTokens'"
        ".format([self.minNewTokens, self.maxNewTokens])",
        field="minNewTokens",
    ),
    Rule(
        "",
        f"!{_given('publish.hub')} || {_given('secrets.huggingFace')} || "
        f"({_given('podTemplate.env')} && self.podTemplate.env.exists(item, item.name == 'HF_TOKEN'))",
        says="'required because publish.hub is %s; name a Secret with the key HF_TOKEN'"
        ".format([self.publish.hub.repository])",
        field="secrets.huggingFace",
        required=True,
        before=f"!{_given('publish.hub')} || {_given('secrets.huggingFace')} || {_given('podTemplate.env')}",
    ),
)

# What an edit may not do. Compared at the root, as only there a rule sees the status too.
ROOT_RULES = (
    Rule(
        "",
        "self.spec.output == oldSelf.spec.output || !oldSelf.?status.?checkpoint.hasValue()",
        says=f"\"{OUTPUT_STAYS} (found '%s', expected '%s')\".format([self.spec.output, oldSelf.spec.output])",
        field="spec.output",
    ),
)


def add_rules(schema: Schema, rules: tuple[Rule, ...]) -> None:
    """Put each rule at its field of a schema, in place."""
    for rule in rules:
        node = schema
        for step in rule.at.replace("[]", ".[]").split(".") if rule.at else ():
            node = node["additionalProperties"] if step == "[]" else node["properties"][step]
        node.setdefault("x-kubernetes-validations", []).append(_validation(rule))


def _validation(rule: Rule) -> Schema:
    out: Schema = {"rule": rule.holds}
    if not rule.at and "oldSelf" not in rule.holds:
        before = re.sub(r"\bself\b", "oldSelf.value()", rule.before or rule.holds)
        out = {"rule": f"(oldSelf.hasValue() && !({before})) || {rule.holds}", "optionalOldSelf": True}
    out |= {"messageExpression": rule.says} if rule.says else {"message": rule.message}
    if rule.field:
        out["fieldPath"] = f".{rule.field}"
    return out | ({"reason": "FieldValueRequired"} if rule.required else {})
