"""A run is told as a story, first undisturbed, then with the operator killed right before each of its writes.

To be killed before write k + 1 is to be killed after write k: between two writes a process changes nothing but itself.
After the last one nothing is left to be done. test_crash_server.py tells one story to a real process and API server.
"""

from collections.abc import Callable

import pytest
from controller.builders import Raw, custom_resource, result, terminated
from controller.fake_server import Killed, Server, clock
from controller.simulator import Operator
from internvl_api.constants import KIND, LABEL_ATTEMPT, LABEL_STAGE
from internvl_api.status import Progress

SPEC: Raw = {
    "training": {"microBatchSize": 2, "globalBatchSize": 8},
    "runPolicy": {"onOutOfMemory": "halveMicroBatch", "progressDeadlineSeconds": 60},
    "scheduling": {"gang": "volcano"},
}
Story = Callable[[Server, str, Raw], bool]


def _lose(server: Server, name: str, raw: Raw) -> bool:
    server.remove("Pod", name)
    return True


def _fail(server: Server, name: str, raw: Raw) -> bool:
    server.set_pod(name, {"phase": "Failed", **terminated(1, "boom", finished=server.now)})
    clock(server, 6)  # its peer hangs; the group is given up after five seconds
    return True


def _fill_gpu(server: Server, name: str, raw: Raw) -> bool:
    full = result("train", "failed", "GpuOutOfMemory")
    server.set_pod(name, {"phase": "Failed", **terminated(1, full, finished=server.now)})
    return True


def _drain(server: Server, name: str, raw: Raw) -> bool:
    server.drain(name)
    return True


def _hang(server: Server, name: str, raw: Raw) -> bool:
    """Rank 0 reports a step; then nobody gets further, and worker 1 does not even answer."""
    if "progressAt" not in server.status():
        server.answers["run-train-0"] = Progress(stage="train", step=7)
        server.set_pod("run-train-0", {"startTime": "now"})  # any event: the operator looks
        return True
    clock(server, 100)
    return True


def _resume(server: Server, name: str, raw: Raw) -> bool:
    for worker in ("run-train-0", "run-train-1"):
        server.set_pod(worker, {"phase": "Failed", **terminated(75, finished=server.now)})
    return True


def _stall(server: Server, name: str, raw: Raw) -> bool:
    server.set_pod(name, {"phase": "Failed", **terminated(65, "a bad row", finished=server.now)})
    return True


def _suspend(server: Server, name: str, raw: Raw) -> bool:
    server.edit_spec(runPolicy={"suspend": True})
    return True


def _edit(server: Server, name: str, raw: Raw) -> bool:
    server.edit_spec(model={"source": "s3://models/other"})
    return True


STORIES: dict[str, Story] = {
    "nothing-happens": lambda server, name, raw: False,
    "worker-lost": _lose,
    "worker-fails": _fail,
    "worker-fills-its-gpu": _fill_gpu,
    "worker-hangs": _hang,
    "worker-asks-to-resume": _resume,
    "node-is-drained": _drain,
    "worker-finds-a-mistake": _stall,
    "user-suspends": _suspend,
    "user-edits": _edit,
}


def _run(story: Story, kill_at: int | None) -> Server:
    """From the user's apply to the end. `kill_at`: number of the write before which the operator is killed, once."""
    server = Server()
    server.create(custom_resource(**SPEC))
    left = -1 if kill_at is None else kill_at

    def count() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise Killed

    server.before_write = (lambda: None) if kill_at is None else count
    operator = Operator(server)
    for _ in range(80):
        try:
            operator.settle()
        except Killed:
            operator = Operator(server)
            continue
        if server.status()["phase"] == "Succeeded":
            return server
        server.evict_deleted()
        _go_on(server, story)
    raise AssertionError(f"the run does not end: {server.status()}")


def _go_on(server: Server, story: Story) -> None:
    """Every pod runs, then succeeds; the first time worker 1 trains, the story happens."""
    if server.status()["phase"] == "Suspended":
        server.edit_spec(runPolicy={"suspend": False})
    for name, raw in list(server.pods.items()):
        labels, phase = raw["metadata"]["labels"], raw["status"]["phase"]
        if phase == "Pending":
            server.set_pod(name, {"phase": "Running"})
        elif phase == "Running" and name == "run-train-1" and labels[LABEL_ATTEMPT] == "1" and story(server, name, raw):
            return
        elif phase == "Running" and "deletionTimestamp" not in raw["metadata"] and name != "run-train-0":
            server.set_pod(name, {"phase": "Succeeded", **terminated(0, result(labels[LABEL_STAGE]))})
            if name == "run-train-1":
                server.set_pod("run-train-0", {"phase": "Succeeded", **terminated(0, result("train"))})
    clock(server, 400 if server.status().get("retryAt") else 0)


REFERENCES = {name: _run(story, None) for name, story in STORIES.items()}
KILLS = [
    pytest.param(name, kill_at, id=f"{name}-{kill_at}")
    for name, server in REFERENCES.items()
    for kill_at in range(len(server.writes))
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kill_at"), KILLS)
def test_a_kill_before_any_write_changes_nothing_in_the_end(name: str, kill_at: int) -> None:
    reference, server = REFERENCES[name], _run(STORIES[name], kill_at)
    told = ("phase", "attempt", "restarts", "runDigest", "microBatchSize")
    assert {key: server.status().get(key) for key in told} == {key: reference.status().get(key) for key in told}
    assert {kind: sorted(found) for kind, found in server.objects.items()} == {
        kind: sorted(found) for kind, found in reference.objects.items()
    }
    assert sorted(server.created) == sorted(reference.created)  # nothing was made once more than needed


@pytest.mark.parametrize(
    ("name", "restarts", "attempt"),
    [
        pytest.param("nothing-happens", {"user": 0, "infrastructure": 0}, 1, id="nothing-happens"),
        pytest.param("worker-lost", {"user": 0, "infrastructure": 1}, 2, id="worker-lost"),
        pytest.param("worker-fails", {"user": 1, "infrastructure": 0}, 2, id="worker-fails"),
        pytest.param("worker-fills-its-gpu", {"user": 0, "infrastructure": 0}, 2, id="worker-fills-its-gpu"),
        pytest.param("worker-hangs", {"user": 0, "infrastructure": 1}, 2, id="worker-hangs"),
        pytest.param("worker-asks-to-resume", {"user": 0, "infrastructure": 0}, 2, id="worker-asks-to-resume"),
        pytest.param("node-is-drained", {"user": 0, "infrastructure": 0}, 2, id="node-is-drained"),
        pytest.param("worker-finds-a-mistake", {"user": 0, "infrastructure": 0}, 2, id="worker-finds-a-mistake"),
        pytest.param("user-suspends", {"user": 0, "infrastructure": 0}, 2, id="user-suspends"),
        pytest.param("user-edits", {"user": 0, "infrastructure": 0}, 2, id="user-edits"),
    ],
)
def test_the_undisturbed_story(name: str, restarts: dict[str, int], attempt: int) -> None:
    server = REFERENCES[name]
    assert (server.status()["restarts"], server.status()["attempt"]) == (restarts, attempt)
    made = [kind for kind, _ in server.created]
    assert made.count("Service") == 1
    assert made.count("ConfigMap") == 1
    assert list(server.objects[KIND]) == ["run"]
