"""Look up fields of the spec by path, for hints in messages about unknown and missing fields."""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Required, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo
from typing_extensions import is_typeddict

from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.deepspeed import SET_ELSEWHERE
from internvl_api.validation.suggest import did_you_mean

Path = tuple[str | int, ...]
_SHOWN = 20  # more names than these do not help a reader


class SpecField(NamedTuple):
    """A field of a model: the type of its value, and its description or ""."""

    kind: Any
    description: str


def hint(path: Path) -> str:
    """A suggestion for an unknown field, of its object or of another one; "" without one."""
    name, parent = str(path[-1]), _kind_at(path[:-1])
    if path[:2] == ("training", "deepspeed") and name in SET_ELSEWHERE:
        return f"; set {SET_ELSEWHERE[name]} instead"
    known = list(_fields(parent))
    near = did_you_mean(name, known)
    if is_typeddict(parent):  # names of Kubernetes and DeepSpeed, which our own documentation does not list
        return near + (f"; fields: {', '.join(known)}" if len(known) <= _SHOWN else "")
    if near:
        return near
    places = [place for place in _places(InternVLFineTuneSpec, "spec") if place.rpartition(".")[2] == name]
    return f" (did you mean {places[0]}?)" if len(places) == 1 else ""


def meaning(path: Path) -> str:
    """The description of a field; "" without one."""
    field = _fields(_kind_at(path[:-1])).get(str(path[-1]))
    return field.description if field else ""


def _kind_at(path: Path) -> Any:
    """The type of the value at a path of the spec; None where no field leads there."""
    kind: Any = InternVLFineTuneSpec
    for step in path:
        kind = _plain(kind)
        if get_origin(kind) in (dict, list):
            kind = get_args(kind)[-1]
        else:
            field = _fields(kind).get(str(step))
            kind = field.kind if field else None
    return _plain(kind)


def _plain(kind: Any) -> Any:
    """The type without Annotated, Required and None."""
    while get_origin(kind) in (Annotated, Required):
        kind = get_args(kind)[0]
    if type(None) in get_args(kind):
        return _plain(next(option for option in get_args(kind) if option is not type(None)))
    return kind


def _places(kind: Any, path: str) -> Iterator[str]:
    """Paths of all fields below a model, without those below names that users choose."""
    for name, field in _fields(kind).items():
        yield f"{path}.{name}"
        yield from _places(field.kind, f"{path}.{name}")


def _fields(kind: Any) -> dict[str, SpecField]:
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {name: SpecField(_plain(hint), _description(hint)) for name, hint in hints.items()}
    models = getattr(kind, "model_fields", {}).items()
    return {field.alias or name: SpecField(field.annotation, field.description or "") for name, field in models}


def _description(hint: Any) -> str:
    """The description in the metadata of a TypedDict's field."""
    while get_origin(hint) in (Annotated, Required):
        for extra in getattr(hint, "__metadata__", ()):
            if isinstance(extra, FieldInfo) and extra.description:
                return extra.description
        hint = get_args(hint)[0]
    return ""
