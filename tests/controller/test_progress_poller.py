"""Asking pods for /progress over real HTTP, and what becomes of the answers."""

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from controller.builders import CONFIG, NOW, Raw, a_run, at, member, result
from internvl_api.status import Progress, StageResult
from internvl_operator.core.observe import LiveProgress, Observed
from internvl_operator.core.progress import text as progress_text
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.run import Key
from internvl_operator.polling.progress_poller import ProgressPoller

KEY = Key("team", "run")
CHECKPOINT = {"step": 100, "uri": "s3://out/100", "sha256": "0", "verifiedAt": "2026-01-31T12:00:00Z"}


class Worker:
    """A worker's web server on a loopback address of its own; `answers` are given in turn, the last for ever."""

    def __init__(self, address: str, answers: list[bytes | int]) -> None:
        outer, self.answers, self.asked = self, answers, threading.Semaphore(0)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                self.send_response(answer if isinstance(answer, int) else 200)
                self.end_headers()
                if isinstance(answer, bytes):
                    self.wfile.write(answer)
                outer.asked.release()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer((address, 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    workers: list[Worker] = []

    def start(*answers: bytes | int) -> Worker:
        worker = Worker("127.0.0.1", list(answers))
        workers.append(worker)
        monkeypatch.setattr("internvl_operator.polling.progress_poller.METRICS_PORT", worker.port)
        return worker

    yield start
    for worker in workers:
        worker.server.shutdown()
        worker.server.server_close()


def said(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def test_news_are_told_and_the_same_again_is_not(serve: Any) -> None:
    worker = serve(said(step=1), said(step=1), said(step=2, checkpoint=CHECKPOINT))
    told, news = [], threading.Semaphore(0)

    def changed(key: Key) -> None:
        told.append(poller.latest(key))
        news.release()

    poller = ProgressPoller(changed, interval=0.01, threads=1)
    poller.start()
    poller.follow(KEY, "pod-1", "127.0.0.1")
    for _ in range(2):
        assert news.acquire(timeout=30)
    for _ in range(4):
        assert worker.asked.acquire(timeout=30)
    poller.stop()
    assert [found.progress.step for found in told if found] == [1, 2]
    assert told[-1] is not None
    assert told[-1].checkpoint is not None
    assert told[-1].checkpoint.step == 100


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(500, id="error"),
        pytest.param(b"<html>", id="not-json"),
        pytest.param(said(step="many"), id="wrong-type"),
        pytest.param(b'{"detail": "' + b"x" * 100_000 + b'"}', id="far-too-long"),
    ],
)
def test_a_strange_answer_is_no_news(serve: Any, answer: bytes | int) -> None:
    worker = serve(answer)
    told: list[Key] = []
    poller = ProgressPoller(told.append, interval=0.01, threads=1)
    poller.start()
    poller.follow(KEY, "pod-1", "127.0.0.1")
    for _ in range(2):
        assert worker.asked.acquire(timeout=30)
    poller.stop()
    assert told == []
    assert poller.latest(KEY) is None


def test_nobody_is_asked_any_more_once_forgotten(serve: Any) -> None:
    worker = serve(said(step=1))
    asked = threading.Event()
    poller = ProgressPoller(lambda key: asked.set(), interval=0.01, threads=1)
    poller.start()
    poller.follow(KEY, "pod-1", "127.0.0.1")
    assert asked.wait(timeout=30)
    poller.forget(KEY)
    poller.stop()
    assert poller.latest(KEY) is None
    assert worker.asked.acquire(timeout=1)


@pytest.mark.parametrize(
    ("progress", "shown"),
    [
        pytest.param({"step": 120, "totalSteps": 400, "loss": 1.23449}, "120/400 loss 1.234", id="training"),
        pytest.param({"step": 120}, "step 120", id="no-total"),
        pytest.param({"detail": "downloading"}, "downloading", id="before-the-first-step"),
        pytest.param({"step": 0, "totalSteps": 400}, "0/400", id="no-loss-yet"),
        pytest.param({}, None, id="nothing"),
    ],
)
def test_the_progress_column(progress: Raw, shown: str | None) -> None:
    assert progress_text(Progress.model_validate(progress)) == shown


def status_of(pods: list[Any], live: LiveProgress | None = None, previous: Raw | None = None) -> Any:
    stages = [
        {"name": "preflight", "state": "Succeeded", "attempt": 1},
        {"name": "train", "state": "Running", "attempt": 1},
    ]
    status = {"attempt": 1, "stages": stages, "phase": "Running", "observedGeneration": 1, **(previous or {})}
    return reconcile(a_run(status=status), Observed(pods=tuple(pods), live=live), at(5), CONFIG).status


def test_live_progress_of_the_running_pod_is_copied() -> None:
    live = LiveProgress("pod-train-1-0", Progress(step=5, total_steps=10, loss=2.0))
    assert status_of([member(0), member(1)], live).progress_text == "5/10 loss 2.000"


@pytest.mark.parametrize(
    ("said", "told"), [pytest.param(1, 1, id="another-one"), pytest.param(None, None, id="nobody-any-more")]
)
def test_the_rank_that_the_others_wait_for_is_told_while_they_do(said: int | None, told: int | None) -> None:
    live = LiveProgress("pod-train-1-0", Progress(step=5, slowest_rank=said))
    found = status_of([member(0), member(1)], live, {"progress": {"step": 4, "slowestRank": 3}})
    assert (found.progress.step, found.progress.slowest_rank) == (5, told)


def test_what_an_earlier_pod_said_is_not_taken_for_this_ones() -> None:
    live = LiveProgress("pod-train-0-0", Progress(step=5, total_steps=10))
    assert status_of([member(0), member(1)], live).progress is None


def test_the_last_word_counts_more_than_the_last_question() -> None:
    live = LiveProgress("pod-train-1-0", Progress(step=5, total_steps=10))
    words = StageResult.model_validate(result("train", progress={"step": 10, "totalSteps": 10, "loss": 0.5}))
    pods = [member(rank, phase="Succeeded", exit_code=0, result=words if rank == 0 else None) for rank in (0, 1)]
    found = status_of(pods, live)
    assert (found.progress.step, found.progress.loss) == (10, 0.5)
    assert (found.stage, found.progress_text) == ("publish", None)  # which has not said anything yet


def test_the_figures_of_training_stay_while_publish_has_none() -> None:
    previous = {
        "progress": {"stage": "train", "step": 10, "totalSteps": 10, "loss": 0.5},
        "stages": [
            {"name": "preflight", "state": "Succeeded", "attempt": 1},
            {"name": "train", "state": "Succeeded", "attempt": 1},
            {"name": "publish", "state": "Running", "attempt": 1},
        ],
    }
    live = LiveProgress("pod-publish-1-0", Progress(stage="publish", detail="uploading"))
    found = status_of([member(0, stage="publish")], live, previous)
    assert (found.progress.step, found.progress.stage, found.progress_text) == (10, "publish", "uploading")


@pytest.mark.parametrize(("known", "found", "kept"), [(None, 100, 100), (50, 100, 100), (200, 100, 200)])
def test_the_newest_verified_checkpoint_is_kept(known: int | None, found: int, kept: int) -> None:
    previous = {} if known is None else {"checkpoint": CHECKPOINT | {"step": known}}
    words = StageResult.model_validate(result("train", "resume", "Preempted", checkpoint=CHECKPOINT | {"step": found}))
    pods = [member(rank, phase="Failed", exit_code=75, result=words, finished_at=NOW) for rank in (0, 1)]
    assert status_of(pods, previous=previous).checkpoint.step == kept
