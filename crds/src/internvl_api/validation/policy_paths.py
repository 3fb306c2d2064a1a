"""Paths into a spec, read in two languages: the values at a path in Python, and CEL of those that a rule refuses.

A path begins below `spec`. Its steps, joined by dots:

    name        a field
    name:word   a text, or the word where the text is absent or empty; a last step
    name=word   the word where the field is there, whatever it holds; a last step
    []          each item of a list
    [chosen]    the same for the expressions of a node selector, without those that ask for a label's absence
    'key'       a field whose name has dots
    *           each value of a map but `name`'s
    {values}    each value of a map
    {keys}      the keys of a map; a last step
    {claim}     the claim of a pvc:// address; a last step
    {types}     the same without `name`: what a volume is, beside its name; a last step

Values of another type than a path expects are left out in Python and an error in CEL: the API server refuses such pods.
"""

import re
from collections.abc import Callable, Iterator

Refused = Callable[[str], str]  # CEL of a text -> CEL that is true when the rule refuses the text
_LISTS = ("[]", "[chosen]")
_ABSENCE = "DoesNotExist"
_STEP = re.compile(r"'[^']*'|[^.]+")
_CLAIM = "pvc://"


def values_at(path: str, spec: object) -> Iterator[str]:
    """The texts at a path of a spec in JSON."""
    return _values(spec, steps_of(path))


def refused_at(path: str, refused: Refused) -> str:
    """CEL of the list of the texts at a path that are refused, in the order of `values_at`."""
    return _cel("object.spec", steps_of(path), refused, 0)


def steps_of(path: str) -> list[str]:
    """The steps of a path; the first is a section of the spec.

    >>> steps_of("podTemplate.labels.'kueue.x-k8s.io/queue-name'")
    ['podTemplate', 'labels', "'kueue.x-k8s.io/queue-name'"]
    """
    return _STEP.findall(path)


def _values(node: object, steps: list[str]) -> Iterator[str]:
    if not steps:
        yield from [node] if isinstance(node, str) and node else []
    elif steps[0] in _LISTS:
        for item in node if isinstance(node, list) else []:
            if steps[0] == "[]" or not (isinstance(item, dict) and item.get("operator") == _ABSENCE):
                yield from _values(item, steps[1:])
    elif steps[0] == "{claim}":
        if isinstance(node, str) and node.startswith(_CLAIM):
            yield from _values(node.removeprefix(_CLAIM).partition("/")[0], [])
    elif isinstance(node, dict):
        yield from _values_of_map(node, steps[0], steps[1:])


def _values_of_map(node: dict[str, object], step: str, rest: list[str]) -> Iterator[str]:
    name, _, word = step.partition(":")
    there, is_flag, flag = step.partition("=")
    if is_flag:
        yield from [flag] if there in node else []
    elif step in ("{keys}", "{types}"):
        yield from (key for key in node if step == "{keys}" or key != "name")
    elif step in ("*", "{values}"):
        for key, value in node.items():
            yield from _values(value, rest) if step == "{values}" or key != "name" else ()
    else:
        yield from _values(node.get(name.strip("'")) or word, rest)


def _cel(at: str, steps: list[str], refused: Refused, depth: int) -> str:
    if not steps:
        return f"({at} != '' && {refused(at)} ? [{at}] : [])"
    step, rest, item = steps[0], steps[1:], f"x{depth}"
    name, _, word = step.partition(":")
    there, is_flag, flag = step.partition("=")
    if is_flag:
        return f"(has({at}.{there}) && {refused(repr(flag))} ? ['{flag}'] : [])"
    if step == "{keys}":
        return f"{at}.filter({item}, {refused(item)})"
    if step == "{types}":
        return f"{at}.filter({item}, {item} != 'name' && {refused(item)})"
    if step == "{claim}":
        claim = f"{at}.substring({len(_CLAIM)}).split('/')[0]"
        return f"({at}.startsWith('{_CLAIM}') ? {_cel(claim, rest, refused, depth)} : [])"
    if step in ("*", "{values}"):
        names = f"{at}.filter({item}, {item} != 'name')" if step == "*" else at
        return _joined(names, item, _cel(f"{at}[{item}]", rest, refused, depth + 1))
    if step.startswith("'"):
        return f"({step} in {at} ? {_cel(f'{at}[{step}]', rest, refused, depth)} : [])"
    if step in _LISTS:
        unfit = f".filter({item}, !has({item}.operator) || {item}.operator != '{_ABSENCE}')"
        return _joined(at + (unfit if step == "[chosen]" else ""), item, _cel(item, rest, refused, depth + 1))
    if word:
        return _cel(f"(has({at}.{name}) && {at}.{name} != '' ? {at}.{name} : '{word}')", rest, refused, depth)
    return f"(has({at}.{name}) ? {_cel(f'{at}.{name}', rest, refused, depth)} : [])"


def _joined(items: str, item: str, texts: str) -> str:
    """CEL of the texts of each item, joined: CEL cannot flatten a list of lists."""
    return f"{items}.map({item}, {texts}.join(', ')).filter(text, text != '')"
