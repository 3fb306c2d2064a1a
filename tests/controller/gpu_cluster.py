"""A cluster in virtual time with the real controller: what its GPUs do while runs start, break and end.

`VirtualCluster` plays scheduler, kubelets and trainers; a test changes how they behave. It jumps from one event to the
next, so that an hour takes milliseconds. It counts the seconds in which a pod holds GPUs and its run does not train.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

from controller.builders import Raw, custom_resource, result, terminated, text
from controller.fake_server import Server
from controller.simulator import Operator
from internvl_api.constants import LABEL_ATTEMPT, LABEL_JOB, LABEL_STAGE
from internvl_api.status import Progress

PLACING, STARTING, MEETING, SAVING, WORKING = 1.0, 10.0, 15.0, 10.0, 5.0  # seconds
GPUS = 4  # of a worker
_GPU = "nvidia.com/gpu"


@dataclass
class Idle:
    """GPU-seconds held by runs that do not train, and the longest time in which a run held any."""

    gpu_seconds: float = 0.0
    longest: float = 0.0


class VirtualCluster:
    """Runs with two workers of four GPUs each. Behaviour is by pod name, changed at any time."""

    def __init__(self, *runs: str, **spec: object) -> None:
        self.server, self.names = Server(), runs or ("run",)
        self.fits: Callable[[str], bool] = lambda pod: True
        self.start: Callable[[str], Raw | None] = lambda pod: {"phase": "Running"}  # None: later, or never
        self.hangs: Callable[[str], bool] = lambda pod: False  # a worker that does not react to SIGTERM
        self.meets: Callable[[str], bool] = lambda run: True
        self.dead: set[str] = set()  # uids of pods on a node without power
        self.idle = {name: Idle() for name in self.names}
        self.clock = 0.0
        self._holding: dict[str, float] = dict.fromkeys(self.names, 0.0)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers, self._seen = itertools.count(), dict[tuple[str, str], bool]()
        self._due: dict[str, float] = {}
        self._meeting: dict[str, float] = {}
        for number, name in enumerate(self.names):
            raw = custom_resource(name, gpusPerWorker=GPUS, training={"globalBatchSize": 16}, **spec)
            raw["spec"]["output"] = f"s3://out/{name}"
            raw["metadata"]["uid"] = f"11111111-0000-4000-8000-00000000001{number}"
            self.server.create(raw)
        self.operator = Operator(self.server)

    # --- what a test does

    def pods(self, run: str = "run", stage: str = "train") -> list[str]:
        labels = {name: raw["metadata"]["labels"] for name, raw in self.server.pods.items()}
        return sorted(name for name, of in labels.items() if (of[LABEL_JOB], of[LABEL_STAGE]) == (run, stage))

    def at(self, seconds: float, act: Callable[[], None]) -> None:
        """Do something so many seconds from now."""
        heapq.heappush(self._events, (self.clock + seconds, next(self._numbers), act))

    def trains(self, run: str = "run") -> bool:
        return self._meeting.get(run, float("inf")) <= self.clock and self._all_run(run) and self.meets(run)

    def until(self, what: Callable[[], bool], limit: float = 7200) -> None:
        end = self.clock + limit
        self._react()
        while not what():
            assert self.clock < end, f"nothing of it within {limit} s; status {self.server.status(self.names[0])}"
            self._next(end)

    def run_for(self, seconds: float) -> None:
        end = self.clock + seconds
        self.until(lambda: self.clock >= end, seconds + 1)

    def forget_idle(self) -> None:
        """Count from now."""
        self.idle = {name: Idle() for name in self.names}
        self._holding = dict.fromkeys(self.names, 0.0)

    def exit(self, pod: str, code: int, message: object = "", reason: str = "Error") -> None:
        """The trainer of a pod exits."""
        if pod in self.server.pods:
            ended = terminated(code, message, reason=reason, finished=self.server.now)
            self.server.set_pod(pod, {"phase": "Succeeded" if code == 0 else "Failed", **ended})

    # --- time

    def _next(self, end: float) -> None:
        """Go to the next event, and let everybody react to it."""
        times = [end, *self._due.values()] + [event[0] for event in self._events[:1]]
        self._meter(max(0.0, min(times) - self.clock))
        while self._events and self._events[0][0] <= self.clock:
            heapq.heappop(self._events)[2]()
        self._react(due=True)

    def _meter(self, seconds: float) -> None:
        for name in self.names:
            held = self._held(name)
            idle = held > 0 and not self.trains(name)
            self._holding[name] = self._holding[name] + seconds if idle else 0.0
            self.idle[name].gpu_seconds += held * seconds if idle else 0.0
            self.idle[name].longest = max(self.idle[name].longest, self._holding[name])
        self.clock += seconds
        self.server.now += timedelta(seconds=seconds)

    def _held(self, run: str) -> int:
        raws = [self.server.pods[name] for name in self.pods(run)]
        return sum(GPUS for raw in raws if raw["metadata"]["uid"] not in self.dead and _holds_gpus(raw))

    def _react(self, due: bool = False) -> None:
        """Passes of the operator and reactions of the kubelets, until nothing changes."""
        for _ in range(100):
            before = len(self.server.log)
            for name in self.names:
                if due or self.clock >= self._due.get(name, 0.0) or not self.operator.up_to_date:
                    self.operator.hear()
                    self.operator.run_pass(name)
                    after = self.operator.requeue
                    self._due.pop(name, None)
                    if after is not None:
                        self._due[name] = self.clock + max(after, 0.1)
            due = False
            self._kubelets()
            self._meet()
            if len(self.server.log) == before and self.operator.up_to_date:
                return
        raise AssertionError(f"it does not settle; the last writes: {self.server.writes[-6:]}")

    # --- scheduler, kubelets and trainers

    def _kubelets(self) -> None:
        for raw in list(self.server.pods.values()):
            leaves = "deletionTimestamp" in raw["metadata"]
            key = raw["metadata"]["uid"], str(leaves)
            if key in self._seen or raw["metadata"]["uid"] in self.dead:
                continue
            self._seen[key] = True
            if leaves:
                grace = raw["spec"]["terminationGracePeriodSeconds"]
                self.at(
                    grace if self.hangs(raw["metadata"]["name"]) else min(grace, SAVING), self._for(raw, self._remove)
                )
            else:
                self.at(PLACING, self._for(raw, self._place))

    def _for(self, raw: Raw, act: Callable[[str], None]) -> Callable[[], None]:
        """`act` on this very pod, unless it is gone."""
        name, uid = raw["metadata"]["name"], raw["metadata"]["uid"]

        def now() -> None:
            found = self.server.pods.get(name)
            if found and found["metadata"]["uid"] == uid and uid not in self.dead:
                act(name)

        return now

    def _remove(self, name: str) -> None:
        self.server.remove("Pod", name)

    def _place(self, name: str) -> None:
        raw = self.server.pods[name]
        if "deletionTimestamp" in raw["metadata"]:
            return
        if not self.fits(name):
            message = f"0/2 nodes are available: 2 Insufficient {_GPU}."
            refused = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
            self.server.set_pod(name, {"conditions": [refused]})
            self.at(5.0, self._for(raw, self._place))
            return
        self.server.change("Pod", name, lambda pod: pod["spec"].update(nodeName=f"node-{name[-1]}"))
        self.server.set_pod(name, {"conditions": [], "startTime": text(self.server.now)})
        self.at(STARTING, self._for(raw, self._run))

    def _run(self, name: str) -> None:
        raw = self.server.pods[name]
        if "deletionTimestamp" in raw["metadata"]:
            return
        status = self.start(name)
        self.server.set_pod(name, status or {})
        if status is None or status.get("phase") != "Running":
            self.at(5.0, self._for(raw, self._run))
        elif (stage := raw["metadata"]["labels"][LABEL_STAGE]) != "train":
            self.at(WORKING, self._for(raw, lambda pod: self.exit(pod, 0, result(stage))))

    def _meet(self) -> None:
        """Workers that all run find each other, and train after a while."""
        for name in self.names:
            if not self._all_run(name):
                self._meeting.pop(name, None)
            elif name not in self._meeting:
                self._meeting[name] = self.clock + MEETING
                self.at(MEETING, lambda: None)

    def _all_run(self, run: str) -> bool:
        raws = [self.server.pods[name] for name in self.pods(run)]
        attempts = {raw["metadata"]["labels"][LABEL_ATTEMPT] for raw in raws}
        return len(raws) == 2 and len(attempts) == 1 and all(map(self._runs, raws))

    def _runs(self, raw: Raw) -> bool:
        ended = any("terminated" in each.get("state", {}) for each in raw["status"].get("containerStatuses", ()))
        there = raw["metadata"]["uid"] not in self.dead and "deletionTimestamp" not in raw["metadata"]
        return there and not ended and bool(raw["status"].get("phase") == "Running")

    def report(self, step: int, run: str = "run") -> None:
        """The step in each worker's answer to /progress."""
        self.server.answers = {name: Progress(stage="train", step=step, detail="training") for name in self.pods(run)}


def _holds_gpus(raw: Raw) -> bool:
    """It has a node and no final phase: the scheduler counts its GPUs as taken, whatever runs in it."""
    ended = raw.get("status", {}).get("phase") in ("Succeeded", "Failed")
    return "nodeName" in raw["spec"] and not ended and any(_gpus_of(raw))


def _gpus_of(raw: Raw) -> Iterator[str]:
    for container in raw["spec"]["containers"]:
        if _GPU in container.get("resources", {}).get("limits", {}):
            yield container["resources"]["limits"][_GPU]
