"""Verdicts of Flux (kstatus) and Argo CD (a health script in Lua) on an object."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ivft_cluster.releases import binary
from ivft_cluster.shell import run


class Verdict(NamedTuple):
    """The status that a tool shows."""

    status: str
    message: str


class Verdicts(NamedTuple):
    """`flux`: InProgress, Current, Failed, Terminating. `argo`: Progressing, Healthy, Degraded, Suspended, Unknown."""

    flux: Verdict
    argo: Verdict


def verdicts(objects: Sequence[dict[str, Any]], script: str) -> list[Verdicts]:
    """Verdicts on objects, in order. `script`: Argo CD's health script for their kind. Raises HarnessError."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        answer = run([binary("gitops-health"), Path(file.name)], input=json.dumps(list(objects)))
    return [Verdicts(*(Verdict(**each[tool]) for tool in Verdicts._fields)) for each in json.loads(answer)]
