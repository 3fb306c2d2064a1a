"""What a run needs of a machine: the parts of `--expect gpus=8,memory=80Gi`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

from internvl_api.quantity import parse_bytes


@dataclass(frozen=True)
class Expectations:
    """Lower bounds; zero asks for nothing.

    Attributes:
        gpus: number of GPUs.
        memory: bytes of each GPU.
        nvlink: NVLinks of each GPU.
        allreduce, disk, storage: bytes per second; disk and storage in the slower direction.
        free: bytes free on the disk.
        shm: bytes of /dev/shm.
    """

    gpus: int = 0
    memory: int = 0
    nvlink: int = 0
    allreduce: int = 0
    disk: int = 0
    storage: int = 0
    free: int = 0
    shm: int = 0


_COUNTS = ("gpus", "nvlink")


def parse_expectations(text: str) -> Expectations:
    """The expectations in `name=value,…`. Raises ValueError naming what is wrong and what is expected."""
    found: dict[str, int] = {}
    names = [field.name for field in fields(Expectations)]
    for part in filter(None, (each.strip() for each in text.split(","))):
        name, equals, value = part.partition("=")
        if name not in names or not equals:
            raise ValueError(f"found {part!r}, expected NAME=VALUE with one of the names {', '.join(names)}")
        if name in found:
            raise ValueError(f"found {name} twice")
        parse: Callable[[str], int] = _count if name in _COUNTS else parse_bytes
        try:
            found[name] = parse(value)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return Expectations(**found)


def _count(text: str) -> int:
    if not text.isdecimal() or len(text) > 4:
        raise ValueError(f"found {text!r}, expected a number such as 8")
    return int(text)
