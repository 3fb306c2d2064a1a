"""The one place that decides whether a spec can run: the operator, its webhook and the trainer call `check_spec`."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import ValidationError

from internvl_api.recipes.files import recipe_names, with_recipe
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.validation import (
    cross_field,
    entry_names,
    evaluation,
    evaluation_alone,
    mixing,
    pod_template,
    row_sizes,
    tracking,
)
from internvl_api.validation.cel_rules import broken
from internvl_api.validation.cluster import InCluster, in_cluster
from internvl_api.validation.defaults import CONFIG_MAP, RunDefaults
from internvl_api.validation.limits import over_limits
from internvl_api.validation.messages import shape_violations
from internvl_api.validation.model_kind import wrong_kind
from internvl_api.validation.violations import SpecError, Violation

RULES = (
    *entry_names.RULES, *cross_field.RULES, *row_sizes.RULES, *mixing.RULES, *evaluation.RULES,
    *evaluation_alone.RULES, *pod_template.RULES, *tracking.RULES,
)  # fmt: skip

_WHERE = (
    "where checkpoints and artifacts go, such as s3://bucket/prefix; set it, or ask your administrator for an "
    f"outputPrefix in the ConfigMap {CONFIG_MAP} of the namespace"
)


class Checked(NamedTuple):
    """A checked spec.

    Attributes:
        spec: with its recipe's settings; None when it cannot run, in a cluster or elsewhere.
        violations: everything that refuses it, the most important first; may be of the cluster alone.
    """

    spec: InternVLFineTuneSpec | None
    violations: tuple[Violation, ...] = ()

    def require(self) -> InternVLFineTuneSpec:
        """The spec. Raises SpecError when there is a violation."""
        if self.violations:
            raise SpecError(*self.violations)
        assert self.spec is not None
        return self.spec


def check_spec(raw: object, cluster: InCluster | None = None) -> Checked:
    """A raw `spec` with its recipe and defaults under it, and every violation. `cluster`: None on a single machine."""
    if not isinstance(raw, dict):
        found = "nothing" if raw is None else type(raw).__name__
        return Checked(None, (Violation("spec", f"found {found}, expected an object"),))
    if beyond := over_limits(raw):
        return Checked(None, (beyond,))
    if unknown := _unknown_recipe(raw.get("recipe")):
        return Checked(None, (unknown,))
    defaults = cluster.defaults if cluster else RunDefaults()
    try:
        whole = defaults.under(raw)
        spec = InternVLFineTuneSpec.model_validate(with_recipe(whole))
    except SpecError as error:
        return Checked(None, error.violations)
    except ValidationError as error:
        return Checked(None, tuple(_placed(shape_violations(error), raw, defaults)))
    if violations := tuple(_violations(whole, spec)):
        return Checked(None, tuple(_placed(violations, raw, defaults)))
    return Checked(spec, tuple(_placed(in_cluster(spec, cluster), raw, defaults)) if cluster else ())


def _placed(found: Iterable[Violation], written: dict[str, Any], defaults: RunDefaults) -> Iterator[Violation]:
    """The violations; one of a field that the run did not write says where it was set."""
    for each in found:
        place = defaults.origin(written, each.field)
        yield each._replace(message=f"{each.message} (set by {place})") if place else each


def _unknown_recipe(recipe: object) -> Violation | None:
    """Without its recipe, nothing else of the spec can be judged."""
    if not isinstance(recipe, str) or recipe in recipe_names():
        return None
    values = cross_field.known_recipe.check(recipe)
    return cross_field.known_recipe.violation("spec.recipe", values or {})


def _violations(written: dict[str, Any], spec: InternVLFineTuneSpec) -> Iterator[Violation]:
    if not spec.output:
        yield Violation("spec.output", f"required field is missing: {_WHERE}")
    yield from cross_field.unused_lora(written, spec)
    yield from wrong_kind(spec)
    yield from cross_field.python_only(spec)
    yield from broken(RULES, spec)
    yield from pod_template.wrong_pod_template(spec)
    yield from evaluation.unmeasured(spec.evaluation)
