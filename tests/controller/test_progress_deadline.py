"""Training that gets no further: when it is noticed, whom it is blamed on, and what must not be taken for it."""

import http.server
import json
import socket
import threading
from collections.abc import Iterator

import pytest
from controller.builders import member, text
from controller.fake_server import clock
from controller.simulator import Operator, World
from internvl_api.constants import MOVING_WEIGHTS, TAKING_STEPS
from internvl_api.recipes.summary import recipe_config
from internvl_api.run_config import RunConfig
from internvl_api.status import Bandwidth, Heartbeat, Progress, StepPhase
from internvl_operator.core.observe import ProcessState, RankAnswers
from internvl_operator.core.policies.progress_deadline import limit_of, slowest
from internvl_operator.core.run import Key
from internvl_operator.polling.rank_probe import RankProbe

KEY = Key("team", "run")


def state(worker: int, step: int | None, phase: StepPhase = "computing", local_rank: int = 0) -> ProcessState:
    """`step` None: it does not answer."""
    if step is None:
        return ProcessState(worker, local_rank)
    return ProcessState(worker, local_rank, Progress(step=step), Heartbeat(phase=phase, idle_seconds=61))


def in_setup(worker: int, detail: str) -> ProcessState:
    """Before the first step there is no heartbeat."""
    return ProcessState(worker, 0, Progress(stage="train", detail=detail))


@pytest.mark.parametrize(
    ("states", "words"),
    [
        pytest.param(
            [state(0, 41), state(1, None)],
            "worker 1 does not answer; the others answer at step 41",
            id="one-is-silent",
        ),
        pytest.param(
            [state(0, 41, local_rank=0), state(0, 41, local_rank=1), state(1, 41), state(1, None, local_rank=1)],
            "process 1 of worker 1 does not answer; the others answer at step 41",
            id="one-process-of-several",
        ),
        pytest.param(
            [state(0, None), state(1, 41), state(2, None)],
            "worker 0, worker 2 do not answer; the others answer at step 41",
            id="two-are-silent",
        ),
        pytest.param([state(0, None), state(1, None)], "no worker answers", id="all-are-silent"),
        pytest.param(
            [state(0, 41, "meeting"), state(1, 41, "data")],
            "worker 1 lags at step 41: it has waited for its data for 61 s; the others wait for it",
            id="one-has-no-data",
        ),
        pytest.param(
            [state(0, 40, "computing"), state(1, 41, "meeting")],
            "worker 0 lags at step 40: it has computed or waited in a collective for 61 s; the others wait for it",
            id="one-is-a-step-behind",
        ),
        pytest.param(
            [state(0, 41), state(1, 41)],
            "all workers answer at step 41: it has computed or waited in a collective for 61 s",
            id="all-are-in-the-same-place",
        ),
        pytest.param(
            [in_setup(0, "starting DeepSpeed"), in_setup(1, "downloading hf://x/y: 1.0 GB of 2.0 GB")],
            "worker 1 lags at step 0: downloading hf://x/y: 1.0 GB of 2.0 GB; the others wait for it",
            id="one-still-fetches-the-model",
        ),
        pytest.param(
            [in_setup(0, "loading the model"), in_setup(1, "loading the model")],
            "all workers answer at step 0: loading the model",
            id="all-load-the-model",
        ),
    ],
)
def test_who_is_blamed(states: list[ProcessState], words: str) -> None:
    assert slowest(states) == words


def training(**policy: object) -> World:
    world = World(runPolicy={"progressDeadlineSeconds": 60, **policy})
    world.reach("train")
    return world


def say(world: World, step: int, *workers: int) -> None:
    world.server.answers = {f"run-train-{worker}": Progress(stage="train", step=step) for worker in workers}
    world.operator.settle()


def test_a_group_that_gets_no_further_is_started_again_and_the_silent_worker_is_named() -> None:
    world = training()
    say(world, 41, 0, 1)
    say(world, 41, 0)  # worker 1 hangs
    world.later(59)
    assert (world.status["phase"], world.operator.requeue) == ("Running", 1)
    world.later(1)
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}
    told = world.status["stages"][1]["message"]
    assert "no progress since 2026-01-31T12:00:00Z (spec.runPolicy.progressDeadlineSeconds: 60)" in told
    assert "worker 1 does not answer; the others answer at step 41" in told
    assert all("deletionTimestamp" in world.server.pods[name]["metadata"] for name in world.pods("train"))
    world.collect()
    assert world.server.attempts("train") == {"2"}
    assert "progressAt" not in world.status


def test_every_step_counts_anew() -> None:
    world = training()
    for step in range(5):
        say(world, step, 0, 1)
        world.later(50)
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)


def test_an_operator_that_was_away_asks_before_it_judges() -> None:
    world = training()
    say(world, 41, 0, 1)
    world.server.answers["run-train-0"] = Progress(stage="train", step=900)
    clock(world.server, 3600)
    world.operator = Operator(world.server)
    world.operator.settle()
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)
    assert world.status["progressAt"] == text(world.server.now)


def test_the_clock_of_a_hang_outlives_the_operator() -> None:
    world = training()
    say(world, 41, 0, 1)
    for _ in range(3):
        clock(world.server, 20)
        world.operator = Operator(world.server)
        world.operator.settle()
    assert world.status["attempt"] == 2


def test_answers_of_an_earlier_attempt_are_not_taken_for_this_ones() -> None:
    world = training()
    say(world, 41, 0, 1)
    uids = frozenset(world.server.pods[name]["metadata"]["uid"] for name in world.pods("train"))
    world.later(60)
    assert world.status["attempt"] == 2
    world.collect()
    world.run("train")
    say(world, 42, 0, 1)
    world.operator.probe.answers[KEY] = RankAnswers(world.server.now, uids, (state(0, 41), state(1, 41)))
    world.later(59)
    assert world.status["attempt"] == 2


@pytest.mark.parametrize(
    "policy",
    [pytest.param({}, id="never-heard-of"), pytest.param({"progressDeadlineSeconds": None}, id="not-asked-for")],
)
def test_no_hang_is_seen_where(policy: dict[str, None]) -> None:
    world = training(**policy)
    if policy:
        say(world, 41, 0, 1)
    world.later(86_400)
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)


STEPS = {"stage": "train", "detail": TAKING_STEPS, "total_steps": 100}


@pytest.mark.parametrize(
    ("given", "progress", "seconds"),
    [
        pytest.param(60, Progress(**STEPS, step=1, eta_seconds=99), 60, id="the-spec-says-it"),
        pytest.param(60, None, 60, id="the-spec-says-it-whatever-is-known"),
        pytest.param(None, Progress(**STEPS, step=50, eta_seconds=50 * 10), 1800, id="short-steps-have-half-an-hour"),
        pytest.param(None, Progress(**STEPS, step=50, eta_seconds=50 * 200), 4000, id="long-steps-have-twenty-of-them"),
        pytest.param(None, Progress(**STEPS, step=50), 7200, id="the-first-step-of-an-attempt"),
        pytest.param(None, Progress(**STEPS, step=100, eta_seconds=0), 7200, id="the-last-step-is-done"),
        pytest.param(None, Progress(**STEPS, step=99, eta_seconds=-5), 1800, id="a-pod-may-say-anything"),
        pytest.param(None, Progress(**STEPS, step=99, eta_seconds=1e308), 20 * 86_400, id="or-that-it-takes-for-ever"),
        pytest.param(
            None,
            Progress(stage="train", step=50, total_steps=100, eta_seconds=500, detail="checkpoint at step 50"),
            None,
            id="a-checkpoint-of-unknown-size-may-take-long",
        ),
        pytest.param(None, None, None, id="nothing-was-heard"),
    ],
)
def test_the_deadline(given: int | None, progress: Progress | None, seconds: float | None) -> None:
    found = limit_of(given, progress)
    assert (found.seconds if found else None) == seconds


def test_without_a_deadline_in_the_spec_a_hang_ends_after_twenty_steps() -> None:
    world = training(progressDeadlineSeconds=None)
    stepping = Progress(**STEPS, step=41, eta_seconds=59 * 120)
    world.server.answers = {f"run-train-{worker}": stepping for worker in (0, 1)}
    world.operator.settle()
    world.later(2399)
    assert (world.status["phase"], world.status["attempt"]) == ("Running", 1)
    world.later(1)
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}
    told = world.status["stages"][1]["message"]
    assert "(default: 20 steps of 120.0 s, at least 1800 s; spec.runPolicy.progressDeadlineSeconds sets another" in told


LARGE = recipe_config("internvl2-llama3-76b-full")  # 152.5 GB of weights, and 212.2 GB of a checkpoint on each node


@pytest.mark.parametrize("detail", [word + " more" for word in MOVING_WEIGHTS])
def test_what_moves_weights_has_an_hour_and_the_time_for_their_bytes(detail: str) -> None:
    found = limit_of(None, Progress(stage="train", detail=detail), LARGE)
    assert found is not None
    assert found.seconds == pytest.approx(3600 + (152.5e9 + 212.2e9) / 50e6, abs=2)
    assert "3600 s + 152.5 GB of weights and 212.2 GB of a checkpoint at 50 MB/s (assumed at least) = " in found.origin
    assert found.origin.endswith("; spec.runPolicy.progressDeadlineSeconds sets another limit")


@pytest.mark.parametrize(
    ("bandwidth", "rate"),
    [
        pytest.param(Bandwidth(storage_read=2e9, storage_write=1e9), 50e6, id="a-fast-one"),
        pytest.param(Bandwidth(storage_read=2e9, storage_write=30e6), 15e6, id="writes-slowly"),
        pytest.param(Bandwidth(storage_read=80e6), 40e6, id="reads-slowly"),
        pytest.param(Bandwidth(all_reduce=1.0), 50e6, id="the-network-alone-was-measured"),
    ],
)
def test_a_slow_storage_has_more_time(bandwidth: Bandwidth, rate: float) -> None:
    found = limit_of(None, Progress(stage="train", detail="exporting", bandwidth=bandwidth), LARGE)
    assert found is not None
    assert found.seconds == pytest.approx(3600 + (152.5e9 + 212.2e9) / rate, rel=0.001)


def test_a_storage_that_a_pod_makes_up_delays_a_day_at_most() -> None:
    found = limit_of(None, Progress(detail="exporting", bandwidth=Bandwidth(storage_write=1.0)), LARGE)
    assert found is not None
    assert found.seconds == 86_400
    assert "= 86400 s, the most there is" in found.origin


ON_CPU = LARGE.model_copy(update={"device": "cpu"})
UNKNOWN = LARGE.model_copy(update={"model": LARGE.model.model_copy(update={"name": None})})


@pytest.mark.parametrize(
    ("detail", "config"),
    [
        pytest.param("validating after step 50", LARGE, id="validation"),
        pytest.param("answering 8 sample rows after step 50", LARGE, id="samples"),
        pytest.param("indexing the data", LARGE, id="index"),
        pytest.param("reading the pairs", LARGE, id="pairs"),
        pytest.param("waiting for the others", LARGE, id="rendezvous"),
        pytest.param("starting", LARGE, id="start"),
        pytest.param("brewing", LARGE, id="another-release-of-the-trainer-says"),
        pytest.param(None, LARGE, id="says-nothing"),
        pytest.param("loading the model", ON_CPU, id="on-the-cpu"),
        pytest.param("loading the model", UNKNOWN, id="a-model-without-dimensions"),
        pytest.param("loading the model", None, id="without-a-configuration"),
    ],
)
def test_there_is_no_default_where_the_time_is_unknown(detail: str | None, config: RunConfig | None) -> None:
    assert limit_of(None, Progress(stage="train", detail=detail), config) is None


def report(world: World, *details: str) -> None:
    """What each worker says it is doing."""
    said = enumerate(details)
    world.server.answers = {f"run-train-{worker}": Progress(stage="train", detail=detail) for worker, detail in said}
    world.operator.settle()


def test_a_model_that_is_never_loaded_frees_the_gpus() -> None:
    world = World(model={"name": "InternVL2-1B"}, gpusPerWorker=8)
    world.reach("train")
    report(world, "downloading hf://x/y: 1.0 GB of 2.0 GB", "loading the model")
    world.later(3000)
    report(world, "downloading hf://x/y: 1.1 GB of 2.0 GB", "loading the model")
    world.later(3000)
    assert world.status["attempt"] == 1, "a download that goes on is progress"
    report(world, "loading the model", "loading the model")
    world.later(7200)
    assert world.status["restarts"] == {"user": 0, "infrastructure": 1}
    told = world.status["stages"][1]["message"]
    assert "no progress since 2026-01-31T13:40:00Z in 'loading the model' (default while it moves weights: 3600" in told
    assert "spec.runPolicy.progressDeadlineSeconds sets another limit): all workers answer" in told


@pytest.mark.parametrize(
    ("details", "restarts"),
    [
        pytest.param(("fetching the model", "downloading hf://x/y: 1.0 GB of 2.0 GB"), 0, id="another-downloads"),
        pytest.param(("downloading hf://x/y: 1.0 GB of 2.0 GB",) * 2, 1, id="all-are-at-the-same-byte"),
        pytest.param(("fetching the model", "fetching the model"), 1, id="nobody-downloads"),
        pytest.param(("downloading hf://x/y: 1.0 GB of 2.0 GB", "fetching the model"), 1, id="the-first-downloads"),
    ],
)
def test_the_first_worker_may_wait_for_the_download_of_another(details: tuple[str, ...], restarts: int) -> None:
    """Its node has the model already; the other one's node has a slow link."""
    world = World(model={"name": "InternVL2-1B"}, gpusPerWorker=8)
    world.reach("train")
    report(world, *details)
    world.later(7200)
    assert world.status["restarts"] == {"user": 0, "infrastructure": restarts}
    world.server.answers = {"run-train-0": Progress(stage="train", detail=details[0])}  # the other one hangs
    world.later(7200)
    assert world.status["restarts"]["infrastructure"] == 1


class Answering(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"step": 41, "heartbeat": {"phase": "meeting", "idleSeconds": 3.5}}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """127.0.0.1 answers; 127.0.0.2 takes the connection and never says a word, as a stopped process does."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    number: int = server.server_address[1]
    with socket.create_server(("127.0.0.2", number)):
        monkeypatch.setattr("internvl_operator.polling.progress_poller.METRICS_PORT", number)
        yield number
    server.shutdown()
    server.server_close()


def test_all_processes_are_asked_and_a_stopped_one_is_not_waited_for(port: int) -> None:
    told = threading.Event()
    caller = RankProbe(lambda key: told.set(), threads=4)
    caller.start()
    pods = [member(0, ip="127.0.0.1"), member(1, ip="127.0.0.2"), member(2)]
    caller.ask(KEY, pods, processes=1)
    assert told.wait(timeout=30)
    caller.stop()
    call = caller.latest(KEY)
    assert call is not None
    assert call.pod_uids == {pod.uid for pod in pods}
    assert [(s.worker, s.progress.step if s.progress else None) for s in call.states] == [(0, 41), (1, None), (2, None)]
    assert call.states[0].heartbeat == Heartbeat(phase="meeting", idle_seconds=3.5)
    assert slowest(call.states) == "worker 1, worker 2 do not answer; the others answer at step 41"
