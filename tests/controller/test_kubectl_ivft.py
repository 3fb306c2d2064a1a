"""What `kubectl ivft` says, from raw objects: the words of each state, the tables, and which pod's log is read."""

import io
from collections.abc import Iterator
from typing import Any

import pytest
from controller.builders import CONFIG, NOW, Raw, at, custom_resource, raw_pod, text
from internvl_api.status import EvaluationStatus, InternVLFineTuneStatus, Phase, Progress, StageStatus
from internvl_operator.core.conditions import summarise
from internvl_operator.core.observe import Observed
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.run import read_run, read_status
from internvl_operator.kube.client import ApiError
from internvl_operator.kubectl_ivft import humanize, logs, render, report
from internvl_operator.kubectl_ivft.__main__ import _console, main
from internvl_operator.kubectl_ivft.client import NotStarted, Runs, UserError
from internvl_operator.kubectl_ivft.explain import explain, is_queued, where_it_continues
from internvl_operator.kubectl_ivft.terminal import plain_line, plain_object
from kubernetes import client
from rich.console import Console, RenderableType


def status(phase: Phase, reason: str = "Reason", message: str = "words", **fields: Any) -> InternVLFineTuneStatus:
    told = summarise([], phase, reason, message, 1, at(-100))
    return InternVLFineTuneStatus(observed_generation=1, phase=phase, conditions=told, **fields)


def run(of: InternVLFineTuneStatus | None = None, *, age: float = 3600, **metadata: Any) -> Raw:
    raw = custom_resource(status=of.to_dict() if of else None)
    raw["metadata"] |= {"creationTimestamp": text(at(-age)), **metadata}
    return raw


def shown(what: RenderableType, width: int = 120) -> str:
    sink = io.StringIO()
    Console(file=sink, width=width, highlight=False).print(what)
    return sink.getvalue()


def test_text_of_a_run_is_neither_markup_nor_obeyed_by_a_terminal() -> None:
    nasty = "[bold]x[/nope] :boom: \x1b[31mred\x1b]0;title\x07"
    raw = plain_object(run(status("Stalled", "Reason", nasty, progress_text=nasty, artifacts={nasty: nasty})))
    console = _console()
    console.file = io.StringIO()
    console.print(render.run_list([raw], NOW, namespaces=True))
    console.print(render.run_status(raw, NOW))
    console.print(render.explanation("run", explain(raw, read_status(raw["status"]), NOW)))
    shown = console.file.getvalue()
    assert shown.count("[bold]x[/nope] :boom: red") >= 5
    assert "\x1b" not in shown
    assert "title" not in shown


def test_a_log_keeps_its_words_and_loses_its_escapes() -> None:
    assert plain_line(b"\tloss \x1b[1;31m0.5\x1b[0m\x1b]52;c;cm0=\x07 \xff\r") == "\tloss 0.5 \ufffd".encode()


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        pytest.param(-3, "0s", id="a-clock-that-is-ahead"),
        pytest.param(45, "45s", id="seconds"),
        pytest.param(192, "3m12s", id="minutes"),
        pytest.param(3600, "1h", id="no-empty-unit"),
        pytest.param(270000, "3d3h", id="two-units"),
    ],
)
def test_durations_are_said_as_kubectl_says_them(seconds: float, said: str) -> None:
    assert humanize.duration(seconds) == said


@pytest.mark.parametrize(
    ("raw", "state", "because", "next_step"),
    [
        pytest.param(run(age=3), "is new", "created 3s ago", "", id="just-made"),
        pytest.param(run(), "has not been processed", "no operator", "kubectl get pods -A", id="no-operator"),
        pytest.param(
            run(status("Running", progress=Progress(warning="LossRises: the mean loss of 10 steps rose"))),
            "runs, with a warning",
            "LossRises: the mean loss",
            "kubectl ivft -n team suspend run), then lower spec.training.learningRate",
            id="a-warning-of-training",
        ),
        pytest.param(
            run(status("Running"), generation=2), "has been changed", "last change", "operator runs", id="not-answered"
        ),
        pytest.param(run(deletionTimestamp=text(at(-5))), "is being deleted", "5s", "", id="deleted"),
        pytest.param(run(status("Running", "TrainRunning", "2 of 2")), "runs", "2 of 2", "", id="runs"),
        pytest.param(
            run(status("Suspended", "Suspended", "no pod")), "is suspended", "no pod", "ivft -n team resume run",
            id="suspended",
        ),
        pytest.param(
            run(status("Succeeded", "Published", "9 files", artifacts={"report": "s3://b/r"})),
            "has succeeded", "9 files", "report run", id="published",
        ),
        pytest.param(
            run(status("Pending", "Unschedulable", "pod run-train-1 finds no node: 2 Insufficient nvidia.com/gpu.")),
            "is pending", "Insufficient nvidia.com/gpu", "spec.gpusPerWorker", id="unschedulable",
        ),
        pytest.param(
            run(status("Stalled", "UnknownModel", "spec.model.name: found 'x'")),
            "waits for you", "found 'x'", "correct spec.model.name: kubectl -n team edit ivft run", id="a-field",
        ),
        pytest.param(
            run(status("Stalled", "BadRow", "s3://d/t.jsonl:7: truncated", retry_at=text(at(95)))),
            "waits for you", "t.jsonl:7", "next attempt in 1m35s", id="a-file-and-line",
        ),
        pytest.param(
            run(status("Stalled", "SecretMissing", "spec.secrets.objectStorage: found no Secret 'k'")),
            "waits for you", "no Secret 'k'", "create that Secret", id="a-reason-with-a-step-of-its-own",
        ),
        pytest.param(
            run(status("Failed", "BackoffLimitExceeded", "exit code 1", stage="train")),
            "has failed", "exit code 1", "logs run --stage train", id="failed",
        ),
        pytest.param(
            run(status("Failed", "BackoffLimitExceeded", "WorkerFailed: worker 3 (pod run-train-3): exit code 1; the "
                       "0 restarts are used up", stage="train")),
            "has failed", "exit code 1", "logs run --stage train --rank 3", id="failed-on-another-rank",
        ),
        pytest.param(
            run(status("Failed", "BackoffLimitExceeded", "OutOfMemory: worker 0 (pod run-train-0) used more memory "
                       "than its limit of 3Gi: raise x; the 0 restarts are used up", stage="train")),
            "has failed", "limit of 3Gi", "change what the message names: kubectl -n team edit ivft run; any change of",
            id="the-advice-of-the-last-attempt",
        ),
        pytest.param(
            run(status("Failed", "DeadlineExceeded", "too long", stage="preflight")),
            "has failed", "too long", "the run continues from its beginning", id="late-without-a-checkpoint",
        ),
        pytest.param(
            run(status("Failed", "Strange", "boom", stage="merge")),
            "has failed", "boom",
            "starts the run again (see Strange in docs/runbook.md)", id="failed-for-a-reason-nobody-foresaw",
        ),
    ],
)  # fmt: skip
def test_why_gives_one_reason_and_the_next_step(raw: Raw, state: str, because: str, next_step: str) -> None:
    told = explain(raw, read_status(raw.get("status") or {}), NOW)
    assert told.state == state
    assert because in told.because
    assert next_step in told.next_step
    assert bool(next_step) == bool(told.next_step)
    assert told.because in " ".join(shown(render.explanation("run", told), width=1000).split())


def test_why_has_the_queues_own_reason_for_a_run_that_it_holds_back() -> None:
    raw = run(status("Pending", "SchedulingGated", "pod run-train-0 waits for its queue: gates"))
    told = explain(raw, read_status(raw["status"]), NOW, queue="insufficient unused quota for nvidia.com/gpu")
    assert told.because == (
        "SchedulingGated: pod run-train-0 waits for its queue: gates; "
        "Kueue: insufficient unused quota for nvidia.com/gpu"
    )
    assert is_queued(read_status(raw["status"]))
    assert not is_queued(status("Pending", "Unschedulable", "no node"))


class Workloads:
    """An API server that answers for Kueue's Workloads alone; `None`: it has none, or they may not be read."""

    def __init__(self, version: str, conditions: list[Raw] | None) -> None:
        self._path = f"/apis/kueue.x-k8s.io/{version}/namespaces/team/workloads/run-train-2"
        self._conditions = conditions

    def get(self, path: str) -> Raw:
        if path != self._path or self._conditions is None:
            raise ApiError(404, "NotFound", "not found")
        return {"status": {"conditions": self._conditions}}


@pytest.mark.parametrize("version", ["v1beta1", "v1beta2"])
@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ([{"type": "QuotaReserved", "status": "False", "message": "4 more needed"}], "4 more needed"),
        ([{"type": "QuotaReserved", "status": "True", "message": "Quota reserved"}], ""),
        ([], ""),
        (None, ""),
    ],
    ids=["held", "admitted", "new", "not-to-be-read"],
)
def test_the_queues_reason_is_read_from_the_attempts_workload(
    version: str, conditions: list[Raw] | None, said: str
) -> None:
    runs = Runs(client.Configuration(), "team")
    runs._api = Workloads(version, conditions)  # type: ignore[assignment]
    assert runs.queue_reason("run", "train", 2) == said


def test_why_takes_what_the_operator_really_writes() -> None:
    raw = run()
    raw["spec"]["recipe"] = "internvl2-2b-lora-cocoo"
    plan = reconcile(read_run(raw), Observed(), NOW, CONFIG)
    assert plan.status is not None
    told = explain(raw, plan.status, NOW)
    assert told.state == "waits for you"
    assert "did you mean 'internvl2-2b-lora-coco'?" in told.because
    assert "correct spec.recipe:" in told.next_step


TRAINING = status(
    "Running",
    "TrainRunning",
    "train: 2 of 2 workers run",
    stage="train",
    attempt=2,
    progress=Progress(stage="train", step=120, total_steps=400, loss=1.2345, tokens_per_second=31201, eta_seconds=4200),
    evaluation=EvaluationStatus(
        baseline={"coco": {"CIDEr": 0.793, "repetition": 0.0}}, final={"coco": {"CIDEr": 1.312, "repetition": 0.5}}
    ),
    artifacts={"adapter": "s3://out/adapter"},
    stages=[
        StageStatus(name="preflight", state="Succeeded", started_at=text(at(-300)), finished_at=text(at(-208))),
        StageStatus(name="train", state="Running", attempt=2, started_at=text(at(-200)), message="its node was lost"),
        StageStatus(name="publish"),
    ],
)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param("run (namespace team) runs", id="the-answer-first"),
        pytest.param("30%  step 120/400  loss 1.234  31,201 tokens/s  1h10m left", id="progress"),
        pytest.param("✓ preflight Succeeded 11:55:00 1m32s", id="a-stage-that-is-done"),
        pytest.param("● train Running 11:56:40 3m20s attempt 2: its node was lost", id="a-stage-with-its-last-trouble"),
        pytest.param("· publish Waiting", id="a-stage-to-come"),
        pytest.param("coco CIDEr 0.7930 1.3120 +0.5190", id="figures"),
        pytest.param("coco repetition 0.0000 0.5000 +0.5000", id="figures of the answers"),
        pytest.param("adapter s3://out/adapter", id="artifacts"),
        pytest.param("In progress, for 1m40s: TrainRunning", id="conditions-in-words"),
    ],
)
def test_status_shows(part: str) -> None:
    assert " ".join(part.split()) in " ".join(shown(render.run_status(run(TRAINING), NOW)).split())


def test_status_says_a_reason_once() -> None:
    told = shown(render.run_status(run(status("Stalled", "BadRow", "the seventh row")), NOW))
    assert told.count("the seventh row") == 1


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(run(InternVLFineTuneStatus()), id="empty"),
        pytest.param(custom_resource(status={"conditions": "nonsense", "stages": [{"name": "bake"}]}), id="nonsense"),
        pytest.param(run(status("Running", progress=Progress())), id="no-figures"),
        pytest.param(run(status("Running", progress=Progress(step=0, total_steps=0))), id="no-steps"),
    ],
)
def test_a_strange_status_is_shown_in_part(raw: Raw) -> None:
    assert "run" in shown(render.run_status(raw, NOW))
    assert "run" in shown(render.run_list([raw], NOW, namespaces=True))


def test_the_list_keeps_to_one_line_a_run_and_is_whole_when_piped() -> None:
    message = "spec.model.name: found " + 40 * "x, "
    raws = [run(TRAINING), run(status("Stalled", "UnknownModel", message), name="other")]
    for width, whole in ((90, False), (100_000, True)):
        header, *lines = shown(render.run_list(raws, NOW, namespaces=False), width).splitlines()
        assert header.split() == ["NAME", "PHASE", "STAGE", "PROGRESS", "AGE", "NOTE"]
        assert len(lines) == 2
        assert "30%  120/400  1h10m left" in lines[1]
        assert (message.strip() in lines[0]) == whole


def pod(stage: str, rank: int, attempt: int = 1, made: float = 0) -> Raw:
    raw = raw_pod(rank, stage=stage, attempt=attempt)
    raw["metadata"]["creationTimestamp"] = text(at(made))
    return raw


PODS = [pod("preflight", 0), pod("train", 0, 1, 10), pod("train", 1, 2, 20), pod("train", 0, 2, 21)]


@pytest.mark.parametrize(
    ("stage_now", "asked", "rank", "found"),
    [
        pytest.param("train", None, 0, ("train", "2"), id="the-newest-attempt-of-the-stage-under-way"),
        pytest.param("train", None, 1, ("train", "2"), id="another-rank"),
        pytest.param("train", "preflight", 0, ("preflight", "1"), id="an-earlier-stage"),
        pytest.param("publish", None, 0, ("train", "2"), id="the-next-stage-has-no-pod-yet"),
        pytest.param("train", "publish", 0, None, id="a-stage-that-has-no-pod"),
        pytest.param("train", None, 7, None, id="no-such-rank"),
    ],
)
def test_which_log_is_read(stage_now: str, asked: str | None, rank: int, found: tuple[str, str] | None) -> None:
    raw = run(InternVLFineTuneStatus(stage=stage_now))  # type: ignore[arg-type]
    chosen = logs.choose(PODS, raw, asked, rank)
    labels = chosen["metadata"]["labels"] if chosen else {}
    assert (labels.get("internvl.dev/stage"), labels.get("internvl.dev/attempt")) == (found or (None, None))


def test_pods_of_an_earlier_run_of_the_name_are_not_read() -> None:
    assert logs.choose(PODS, run(TRAINING, uid="another"), None, 0) is None


class Cluster:
    """A run that goes on whenever its log has been read."""

    def __init__(self) -> None:
        self.pods_there: list[Raw] = []
        self.state = InternVLFineTuneStatus(phase="Pending", stage="train")
        self.looks = 0

    def get(self, name: str) -> Raw:
        return run(self.state)

    def pods(self, name: str) -> list[Raw]:
        return self.pods_there

    def log(self, name: str, *, container: str, follow: bool, tail: int | None) -> Iterator[bytes]:
        self.looks += 1
        if self.looks == 1:
            raise NotStarted("the container is waiting to start: ContainerCreating")
        yield f"line of {name} {self.looks}".encode()
        if len(self.pods_there) == 1:
            self.pods_there.append(pod("train", 0, 2, 30))
        else:
            self.state.phase = "Succeeded"


def test_a_followed_log_goes_on_over_attempts_until_the_run_is_over() -> None:
    cluster, told = Cluster(), list[str]()

    def pause(seconds: float) -> None:
        cluster.pods_there = cluster.pods_there or [pod("train", 0)]

    read = logs.follow(cluster, "run", stage=None, rank=0, tail=5, tell=told.append, pause=pause)  # type: ignore[arg-type]
    assert list(read) == [b"line of run-train-0 2", b"line of run-train-0 3"]
    assert ["waiting for a pod" in told[0], "ContainerCreating" in told[1]] == [True, True]
    assert told[2:] == [
        "run-train-0: train, attempt 1, rank 0",
        "run-train-0: train, attempt 2, rank 0",
        "the run has ended: Succeeded",
    ]


@pytest.mark.parametrize(
    ("of", "words_of_error"),
    [
        pytest.param(status("Running"), "has no report yet: it is running", id="not-yet"),
        pytest.param(
            status("Succeeded", artifacts={"adapter": "s3://a"}),
            "published no report; its artifacts: adapter",
            id="none",
        ),
    ],
)
def test_a_report_that_is_not_there_is_explained(of: InternVLFineTuneStatus, words_of_error: str) -> None:
    with pytest.raises(UserError, match=words_of_error):
        report.location("run", of)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        pytest.param(["list"], "no cluster configured:", id="no-kubeconfig"),
        pytest.param(["--kubeconfig", "/does/not/exist", "why", "x"], "no cluster", id="kubeconfig-is-not-there"),
    ],
)
def test_no_cluster_is_one_word_and_no_traceback(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", "/does/not/exist")
    assert main(arguments) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        pytest.param({}, "from its beginning", id="never-started"),
        pytest.param({"stage": "preflight"}, "from its beginning", id="no-pod-was-ever-made"),
        pytest.param(
            {"stage": "train", "stages": [{"name": "train", "startedAt": "2026-01-31T12:00:00Z"}]},
            "from the beginning of its stage train",
            id="no-checkpoint",
        ),
        pytest.param(
            {"checkpoint": {"step": 40, "uri": "s3://x", "sha256": "0", "verifiedAt": "2026-01-31T12:00:00Z"}},
            "from its newest checkpoint (step 40)",
            id="a-checkpoint",
        ),
    ],
)
def test_where_a_resumed_run_continues(fields: Raw, told: str) -> None:
    assert where_it_continues(read_status(fields)) == told
