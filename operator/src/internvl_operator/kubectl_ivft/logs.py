"""The log of one worker: of its current pod, or (followed) of each later pod too, until the run ends."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from internvl_api.constants import LABEL_ATTEMPT, LABEL_JOB_UID, LABEL_NODE_RANK, LABEL_STAGE

from internvl_operator.core.observe import CONTAINER
from internvl_operator.kubectl_ivft.client import NotStarted, Runs, UserError
from internvl_operator.kubectl_ivft.wait import EXIT_CODES

Raw = dict[str, Any]
Tell = Callable[[str], None]
_BETWEEN_LOOKS = 1.0  # seconds to wait for a followed pod


def choose(pods: list[Raw], run: Raw, stage: str | None, rank: int) -> Raw | None:
    """The newest pod of this rank in the given stage, else in the current stage, else in the last one with pods."""
    mine = [pod for pod in pods if _label(pod, LABEL_JOB_UID) == run["metadata"]["uid"]]
    ranked = [pod for pod in mine if _label(pod, LABEL_NODE_RANK) == str(rank)]
    wanted = stage or (run.get("status") or {}).get("stage")
    found = [pod for pod in ranked if _label(pod, LABEL_STAGE) == wanted]
    if not found and stage is None:
        found = ranked
    return max(found, key=_newness, default=None)


def absent(pods: list[Raw], run: Raw, stage: str | None, rank: int) -> str:
    """The error for a missing pod, with the pods that exist."""
    asked = f"{stage or 'any stage'}, rank {rank}"
    have = sorted({f"{_label(pod, LABEL_STAGE)} {_label(pod, LABEL_NODE_RANK)}" for pod in pods})
    listed = f"; existing pods (stage, rank): {', '.join(have)}" if have else "; it has no pods"
    return f"the run {run['metadata']['name']!r} has no pod of {asked}{listed}\nTry `kubectl ivft why`."


def read(runs: Runs, name: str, *, stage: str | None, rank: int, tail: int | None, tell: Tell) -> Iterator[bytes]:
    """The lines of one pod. Raises UserError."""
    run, pods = runs.get(name), runs.pods(name)
    pod = choose(pods, run, stage, rank)
    if pod is None:
        raise UserError(absent(pods, run, stage, rank))
    tell(_title(pod))
    try:
        yield from runs.log(pod["metadata"]["name"], container=CONTAINER, follow=False, tail=tail)
    except NotStarted as error:
        raise UserError(f"{error}\nTry `kubectl ivft why {name}`, or -f to wait for it.") from error


def follow(
    runs: Runs,
    name: str,
    *,
    stage: str | None,
    rank: int,
    tail: int | None,
    tell: Tell,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[bytes]:
    """The lines of this pod and of every later one (next stage, next attempt), until the run or the stage ends."""
    read_already: set[str] = set()
    told = ""
    while True:
        run = runs.get(name)
        pod = choose(runs.pods(name), run, stage, rank)
        wait = f"waiting for a pod; `kubectl ivft why {name}` shows what blocks it"
        if pod is not None and pod["metadata"]["uid"] not in read_already:
            try:
                lines = runs.log(pod["metadata"]["name"], container=CONTAINER, follow=True, tail=tail)
                if (first := next(lines, None)) is not None:
                    tell(_title(pod))
                    yield first
                yield from lines
                read_already.add(pod["metadata"]["uid"])
                tail = None
                continue
            except NotStarted as error:
                wait = str(error)
        elif ended := _ended(run, stage):
            tell(ended)
            return
        if wait != told and not read_already:  # the short gap between two pods needs no message
            tell(told := wait)
        pause(_BETWEEN_LOOKS)


def _ended(run: Raw, stage: str | None) -> str | None:
    status = run.get("status") or {}
    if status.get("phase") in EXIT_CODES:
        return f"the run has ended: {status['phase']}"
    done = [each for each in status.get("stages", ()) if each.get("name") == stage and each.get("state") == "Succeeded"]
    return f"{stage} has succeeded" if done else None


def _title(pod: Raw) -> str:
    stage, attempt, rank = (_label(pod, label) for label in (LABEL_STAGE, LABEL_ATTEMPT, LABEL_NODE_RANK))
    return f"{pod['metadata']['name']}: {stage}, attempt {attempt}, rank {rank}"


def _newness(pod: Raw) -> tuple[str, int]:
    attempt = _label(pod, LABEL_ATTEMPT)
    return pod["metadata"].get("creationTimestamp") or "", int(attempt) if attempt.isdigit() else 0


def _label(pod: Raw, name: str) -> str:
    return str((pod["metadata"].get("labels") or {}).get(name, ""))
