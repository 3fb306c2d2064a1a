"""Defaults of a namespace and of the cluster: read them, and put them under a spec.

A field comes from the run, else from the namespace, else from the cluster, else it has its built-in value. Maps such as
`labels` are merged key by key, lists of named entries such as `env` by name; anything else is taken whole.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from internvl_api.recipes.files import merge
from internvl_api.spec.defaults import SECTIONS, Defaults
from internvl_api.validation.messages import shape_violations
from internvl_api.validation.violations import SpecError, Violation

CONFIG_MAP = "internvl-defaults"
KEY = "defaults.yaml"
OF_NAMESPACE = f"ConfigMap {CONFIG_MAP}, {KEY}"
OF_CLUSTER = "the chart's defaults"
REASON = "InvalidDefaults"
MAX_TEXT = 16_384  # characters; the status of every run keeps a copy
_MAX_DEPTH = 20  # levels of objects and lists

_MAPS = ("nodeSelector", "cpuNodeSelector", "labels", "annotations", "stageResources")  # of podTemplate
_NAMED = {"env": "name", "volumes": "name", "volumeMounts": "mountPath", "imagePullSecrets": "name"}

Raw = dict[str, Any]


class Applied(NamedTuple):
    """A field below `spec` with the value that the defaults give it, or add to, and where they stand."""

    field: str
    value: object
    place: str


class RunDefaults(NamedTuple):
    """What stands under the spec of one run. `namespace` and `cluster` are YAML; "" without any.

    Attributes:
        output: of the run when it was fixed before; "" while the prefix decides.
        run: namespace/name, which follows the prefix.
    """

    namespace: str = ""
    cluster: str = ""
    output: str = ""
    run: str = ""

    def under(self, written: Raw) -> Raw:
        """A raw spec with the defaults under it. Raises SpecError for defaults that are invalid."""
        merged, output = written, self.output
        for _, layer in self._layers():
            prefix = layer.pop("outputPrefix", None)
            output = output or (f"{prefix}/{self.run}" if prefix else "")
            merged = _under(merged, layer)
        return {**merged, "output": output} if output and written.get("output") is None else merged

    def applied(self, written: Raw) -> list[Applied]:
        """What a raw spec gets from the defaults, in their order. Raises SpecError for defaults that are invalid."""
        merged, found = self.under(written), []
        if "output" not in written and "output" in merged:
            found.append(Applied("output", merged["output"], self._place("outputPrefix")))
        for section in SECTIONS:
            before = written.get(section) or {}
            for field, value in (merged.get(section) or {}).items():
                if value != before.get(field):
                    found.append(Applied(f"{section}.{field}", value, self._place(section, field)))
        return found

    def origin(self, written: Raw, field: str) -> str | None:
        """Where a field such as `spec.podTemplate.image` is set; None when not in the defaults alone."""
        path = field.removeprefix("spec.").partition("[")[0].split(".")
        section = written.get(path[0])
        if path[0] == "output":
            return self._place("outputPrefix") or None if section is None else None
        if len(path) < 2 or (isinstance(section, dict) and section.get(path[1]) is not None):
            return None
        return self._place(*path[:2]) or None

    def _layers(self) -> list[tuple[str, Raw]]:
        """(where it stands, content) of the defaults that there are, the stronger first."""
        both = (OF_NAMESPACE, self.namespace), (OF_CLUSTER, self.cluster)
        return [(place, read_defaults(text, place).written()) for place, text in both if text]

    def _place(self, section: str, field: str = "") -> str:
        """Where a field of the defaults stands; both places for a map or list that is merged; "" when in none."""
        found = []
        for place, layer in self._layers():
            value = layer.get(section)
            if (value.get(field) if field and isinstance(value, dict) else value) is not None:
                found.append(place)
        return " and ".join(found if field in (*_MAPS, *_NAMED) else found[:1])


@lru_cache(maxsize=256)  # every check of every run asks, and a namespace's text seldom changes
def read_defaults(text: str, place: str) -> Defaults:
    """The defaults of a YAML text. Raises SpecError, whose field is `place` and the path in it."""
    loaded = _load(text, place)
    try:
        return Defaults.model_validate(loaded)
    except ValidationError as error:
        violations = [
            Violation(_below(place, each.field.removeprefix("spec").lstrip(".")), _expected(each), REASON)
            for each in shape_violations(error)
        ]
        raise SpecError(*violations) from None


def _expected(violation: Violation) -> str:
    """The message; fields at the top differ from those of a spec."""
    if violation.message.startswith("unknown field") and violation.field.count(".") == 1:
        return f"unknown field; expected one of {', '.join(('outputPrefix', *SECTIONS))}"
    return violation.message


def _load(text: str, place: str) -> Raw:
    """The object of a YAML text; its length, depth and references are checked before anything is built."""
    if len(text) > MAX_TEXT:
        raise _invalid(place, f"found more than {MAX_TEXT:,} characters, expected at most as many; keep only defaults")
    try:
        _refuse_deep_or_shared(text, place)
        loaded = yaml.safe_load(text)
    except SpecError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise _invalid(place, f"found text that is not YAML{line} ({error.problem}); correct it") from None
    except (yaml.YAMLError, ValueError):
        raise _invalid(place, "found text that is not YAML, expected an object such as {outputPrefix: …}") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise _invalid(place, f"found {type(loaded).__name__}, expected an object such as {{outputPrefix: …}}")
    return {str(key): value for key, value in loaded.items()}


def _refuse_deep_or_shared(text: str, place: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _invalid(place, f"found the reference *{event.anchor}, expected none; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise _invalid(place, f"nested deeper than {_MAX_DEPTH} levels; remove the levels that have no use")


def _invalid(place: str, message: str) -> SpecError:
    return SpecError(Violation(place, message, REASON))


def _below(place: str, path: str) -> str:
    return f"{place}: {path}" if path else place


def _under(written: Raw, defaults: Raw) -> Raw:
    """A raw spec over defaults; a section that is no object stays as it is, for the spec's own checks."""
    merged = dict(written)
    for section, given in defaults.items():
        own = merged.get(section)
        if own is None:
            merged[section] = given
        elif not isinstance(own, dict):
            continue
        elif section == "podTemplate":
            merged[section] = _pod_template(own, given)
        elif section == "scheduling" and own.get("gang") not in (None, given.get("gang")):
            continue  # the queue of one gang scheduler means nothing to another
        else:
            merged[section] = {**given, **_set(own)}
    return merged


def _pod_template(own: Raw, given: Raw) -> Raw:
    merged = {**given, **_set(own)}
    for field in own.keys() & given.keys():
        over, under = own[field], given[field]
        if field in _MAPS and isinstance(over, dict):
            merged[field] = merge(under, over) if field != "stageResources" else {**under, **over}
        elif field in _NAMED and isinstance(over, list):
            merged[field] = [*_others(under, over, _NAMED[field]), *over]
    return merged


def _others(under: list[Raw], over: list[Any], name: str) -> list[Raw]:
    taken = [each.get(name) for each in over if isinstance(each, dict)]
    return [each for each in under if each.get(name) not in taken]


def _set(own: Raw) -> Raw:
    return {field: value for field, value in own.items() if value is not None}
