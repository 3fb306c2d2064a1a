"""What Flux (by kstatus) and Argo CD (by a health script in Lua) make of an object."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ivft_cluster.releases import binary
from ivft_cluster.shell import run


class Verdict(NamedTuple):
    """What a tool shows."""

    status: str
    message: str


class Verdicts(NamedTuple):
    """`flux`: InProgress, Current, Failed, Terminating. `argo`: Progressing, Healthy, Degraded, Suspended, Unknown."""

    flux: Verdict
    argo: Verdict


def verdicts(objects: Sequence[dict[str, Any]], script: str) -> list[Verdicts]:
    """The verdicts on whole objects, in their order. `script`: Argo CD's for their kind. Raises HarnessError."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as file:
        file.write(script)
        file.flush()
        answer = run([binary("gitops-health"), Path(file.name)], input=json.dumps(list(objects)))
    return [Verdicts(*(Verdict(**each[tool]) for tool in Verdicts._fields)) for each in json.loads(answer)]
