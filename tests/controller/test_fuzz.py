"""Random reports, statuses, reviews and pods: nothing raises, and twice the input takes about twice the work.

The seed is fixed; FUZZ_EXAMPLES sets the number of inputs of each test (`make fuzz` has many).
"""

import copy
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from controller.builders import CONFIG, NOW, Raw, custom_resource, raw_pod, result, terminated
from growth import assert_proportional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from internvl_api.constants import KIND
from internvl_operator import webhook
from internvl_operator.core.observe import LiveProgress, Observed, read_pod
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.run import read_run, read_status
from internvl_operator.core.telemetry import printable, read_answer, read_result
from internvl_operator.kubectl_ivft import render
from internvl_operator.kubectl_ivft.__main__ import _console
from internvl_operator.kubectl_ivft.explain import explain
from internvl_operator.kubectl_ivft.terminal import plain_line, plain_object
from ivft_cluster.paths import CHECKOUT

pytestmark = pytest.mark.slow

INPUTS: Counter[str] = Counter()
fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")),
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

NASTY = ["\x1b[31m", "\x1b]0;x\x07", "[bold]x[/nope]", ":boom:", "\x00", "\u202e", "\n", "🐶", "{run}", "%s", "\x9b2J"]
NASTY += ["NaN", "-inf", "1e999", "9" * 30]  # texts that become numbers
NUMBERS = st.sampled_from([0, -1, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**26, 10**4000]) | st.integers()
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
TIMES = st.sampled_from(
    ["2026-01-31T12:00:00Z", "2026-01-31T12:00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00", "now", ""]
)
WORDS = st.sampled_from(NASTY) | st.text(max_size=40) | TIMES
LEAVES = st.none() | st.booleans() | NUMBERS | FLOATS | WORDS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12
)


def some(fields: dict[str, Any]) -> st.SearchStrategy[Raw]:
    """An object with any of these fields, each of its kind or of any other."""
    return st.fixed_dictionaries({}, optional={name: kind | VALUES for name, kind in fields.items()})


STAGES = st.sampled_from(["preflight", "train", "publish", "no-such-stage"])
PROGRESS = some(
    {"stage": STAGES, "detail": WORDS, "step": NUMBERS, "totalSteps": NUMBERS, "loss": FLOATS, "etaSeconds": FLOATS}
)
CHECKPOINT = some({"step": NUMBERS, "uri": WORDS, "sha256": WORDS, "verifiedAt": TIMES})
HEARTBEAT = some({"phase": st.sampled_from(["data", "meeting"]), "idleSeconds": FLOATS})
EVALUATION = some({"final": st.dictionaries(WORDS, st.dictionaries(WORDS, FLOATS, max_size=3), max_size=3)})
RESULT = some(
    {
        "stage": STAGES,
        "outcome": st.sampled_from(["succeeded", "failed", "resume"]),
        "reason": st.sampled_from(["Succeeded", "Preempted", "R" * 4000]) | WORDS,
        "message": WORDS,
        "progress": PROGRESS,
        "checkpoint": CHECKPOINT,
        "artifacts": st.dictionaries(WORDS, WORDS, max_size=4),
        "evaluation": EVALUATION,
    }
)
CONDITION = some(
    {
        "type": st.sampled_from(["Ready", "Stalled", "Failed", "Complete"]),
        "status": st.sampled_from(["True", "False"]),
        "reason": st.sampled_from(["SecretMissing", "Reason"]),
        "message": WORDS,
        "lastTransitionTime": TIMES,
    }
)
STATUS = some(
    {
        "phase": st.sampled_from(["Running", "Stalled", "Failed", "Succeeded", "Suspended", "Pending"]),
        "stage": STAGES,
        "attempt": NUMBERS,
        "observedGeneration": NUMBERS,
        "progressText": WORDS,
        "conditions": st.lists(CONDITION, max_size=4),
        "stages": st.lists(
            some(
                {
                    "name": STAGES,
                    "state": st.sampled_from(["Running", "Failed"]),
                    "startedAt": TIMES,
                    "attempt": NUMBERS,
                }
            ),
            max_size=3,
        ),
        "progress": PROGRESS,
        "checkpoint": CHECKPOINT,
        "evaluation": EVALUATION,
        "artifacts": st.dictionaries(WORDS, WORDS, max_size=3),
        "startedAt": TIMES,
        "finishedAt": TIMES,
        "retryAt": TIMES,
        "progressAt": TIMES,
    }
)
PLAIN_TEXT = st.text(max_size=200)
POD_STATUS = st.fixed_dictionaries(  # the API server checks the types of a pod, not its words
    {},
    optional={
        "phase": st.sampled_from(["Pending", "Running", "Succeeded", "Failed", "Unknown"]),
        "reason": PLAIN_TEXT,
        "message": PLAIN_TEXT,
        "podIP": PLAIN_TEXT,
        "startTime": TIMES,
        "conditions": st.lists(
            st.fixed_dictionaries(
                {"type": st.sampled_from(["PodScheduled", "DisruptionTarget", "PodReadyToStartContainers"])},
                optional={"status": st.sampled_from(["True", "False"]), "reason": PLAIN_TEXT, "message": PLAIN_TEXT},
            ),
            max_size=3,
        ),
    },
)
LABELS = st.dictionaries(
    st.sampled_from(["internvl.dev/stage", "internvl.dev/attempt", "internvl.dev/node-rank"]),
    st.sampled_from(["0", "1", "2", "9" * 63, "train", "-1", "²", ""]) | st.text(max_size=63),
)


@pytest.fixture(scope="module", autouse=True)
def _print_inputs(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\nfuzzed {sum(INPUTS.values())} inputs: {dict(INPUTS)}")


def assert_storable(value: Any) -> None:
    """JSON as an API server takes it: finite numbers of 64 bits, bounded text without control characters."""
    written = json.dumps(value, allow_nan=False)
    assert len(written) < 1_000_000

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            for key, inner in part.items():
                walk(key)
                walk(inner)
        elif isinstance(part, list):
            for inner in part:
                walk(inner)
        elif isinstance(part, int):
            assert -(2**63) <= part < 2**63
        elif isinstance(part, str):
            assert "\x1b" not in part
            assert "\x00" not in part
            part.encode()

    walk(value)


@fuzz
@given(st.binary(max_size=300) | (PROGRESS | VALUES).map(lambda value: json.dumps(value).encode()))
def test_answers_of_pods(body: bytes) -> None:
    INPUTS["answers"] += 1
    if answer := read_answer(body):
        for part in answer:
            assert_storable(part.to_dict() if part else None)


@fuzz
@given(st.text(max_size=300) | (RESULT | VALUES).map(json.dumps))
def test_termination_messages(message: str) -> None:
    INPUTS["termination messages"] += 1
    if found := read_result(message):
        assert_storable(found.to_dict())


@fuzz
@given(POD_STATUS, LABELS, st.none() | RESULT.map(json.dumps) | PLAIN_TEXT, st.integers(-1, 255), PROGRESS)
def test_pods_with_any_report(status: Raw, labels: Raw, message: str | None, code: int, progress: Raw) -> None:
    """A pass over a run whose pods say anything makes a plan with a status that can be stored."""
    INPUTS["pods"] += 1
    raw = raw_pod(status=status | ({} if message is None else terminated(code, message)))
    raw["metadata"]["labels"] |= labels
    pod = read_pod(raw)
    answer = read_answer(json.dumps(progress).encode())
    live = LiveProgress("pod-train-1-0", answer.progress, answer.checkpoint) if answer else None
    stages = [{"name": "preflight", "state": "Succeeded", "attempt": 1}, {"name": "train", "state": "Running"}]
    recorded = {"attempt": 1, "stages": stages, "phase": "Running", "observedGeneration": 1}
    run = read_run(custom_resource(status=recorded, runPolicy={"suspend": code == 0}))
    plan = reconcile(run, Observed(pods=(pod,) if pod else (), live=live), NOW, CONFIG)
    assert plan.status is not None
    assert_storable(plan.status.to_dict())


SPEC = some({"data": VALUES, "output": WORDS, "recipe": WORDS, "workers": NUMBERS, "training": VALUES, "model": VALUES})
RUN = some({"metadata": some({"name": WORDS, "deletionTimestamp": TIMES}), "spec": SPEC, "status": STATUS})
REQUEST = some({"uid": st.just("7"), "object": RUN, "oldObject": RUN})
REVIEW = some({"apiVersion": st.just(webhook.REVIEW_VERSION), "request": REQUEST})


@fuzz
@given(st.binary(max_size=300) | REVIEW.map(lambda value: json.dumps(value).encode()))
def test_reviews(body: bytes) -> None:
    """Whatever a pod sends to the webhook is answered: with a decision, or as no AdmissionReview."""
    INPUTS["reviews"] += 1
    status, text = webhook.answer(body)
    assert status in (200, 400)
    if status == 200:
        assert json.loads(text)["response"]["allowed"] in (True, False)


@fuzz
@given(STATUS)
def test_statuses(status: Raw) -> None:
    """Whatever somebody wrote into a status, it is read in part, and a pass follows."""
    INPUTS["statuses"] += 1
    read_status(status)
    stored = json.loads(json.dumps(status))
    plan = reconcile(read_run(custom_resource(status=stored)), Observed(), NOW, CONFIG)
    if plan.status is not None:
        json.dumps(plan.status.to_dict(), allow_nan=False)


@fuzz
@given(STATUS, WORDS)
def test_what_kubectl_shows(status: Raw, queue: str) -> None:
    """Markup is printed as it is, and nothing that a terminal obeys comes from a run."""
    INPUTS["shown runs"] += 1
    run = plain_object(custom_resource(status=status))
    sink = io.StringIO()
    console = _console()
    console.file = sink
    console.print(render.run_list([run], NOW, namespaces=True))
    console.print(render.run_status(run, NOW))
    told = explain(run, read_status(run["status"]), NOW, queue=printable(queue))
    console.print(render.explanation("run", told))
    assert not set(sink.getvalue()) & set("\x1b\x00\x07\x9b\u202e")


@fuzz
@given(st.binary(max_size=300) | WORDS.map(lambda text: text.encode(errors="replace")))
def test_lines_of_logs(line: bytes) -> None:
    INPUTS["log lines"] += 1
    assert not set(plain_line(line).decode()) & set("\x1b\x00\x07\x9b\u202e")


SPECS = [
    document["spec"]
    for path in sorted((CHECKOUT / "examples").rglob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text(encoding="utf-8"))
    if isinstance(document, dict) and document.get("kind") == KIND
]
LARGE = st.sampled_from([{}, [], "pvc://a/b", "x" * 40_000, {str(n): n for n in range(2000)}])
EDITS = st.lists(st.tuples(st.integers(0, 10_000), VALUES | LARGE), max_size=3)


def edited(original: Raw, edits: list[tuple[int, Any]]) -> Raw:
    """A spec with values at any place replaced."""
    changed = copy.deepcopy(original)
    for number, value in edits:
        places = list(places_of(changed))
        holder, key = places[number % len(places)]
        holder[key] = copy.deepcopy(value)  # a value may be drawn twice
    return changed


def places_of(node: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        yield node, key
        if isinstance(value, dict | list):
            yield from places_of(value)


@fuzz
@given(st.sampled_from(SPECS), EDITS)
def test_specs(original: Raw, edits: list[tuple[int, Any]]) -> None:
    """A pass over a run with any spec makes a status that can be stored, and the webhook decides."""
    INPUTS["specs"] += 1
    raw = custom_resource() | {"spec": edited(original, edits)}
    plan = reconcile(read_run(raw), Observed(), NOW, CONFIG)
    assert plan.status is not None
    assert_storable(plan.status.to_dict())
    request = {"uid": "7", "object": raw, "oldObject": custom_resource()}
    status, _ = webhook.answer(json.dumps({"apiVersion": webhook.REVIEW_VERSION, "request": request}).encode())
    assert status == 200


def see_pods(body: bytes) -> None:
    read_pod(raw_pod(status=json.loads(body)))


def see_status(body: bytes) -> None:
    reconcile(read_run(custom_resource(status=json.loads(body))), Observed(), NOW, CONFIG)


def see_spec(body: bytes) -> None:
    reconcile(read_run(custom_resource(**json.loads(body))), Observed(), NOW, CONFIG)


def dumped(make: Callable[[int], Raw]) -> Callable[[int], bytes]:
    return lambda size: json.dumps(make(size)).encode()


def nested(size: int) -> bytes:
    return b'{"detail": ' + b"[" * size


def repeated(text: str) -> Callable[[int], bytes]:
    return lambda size: json.dumps({"detail": text * (size // len(text)), "artifacts": {"a": text * size}}).encode()


def review(spec: Raw) -> bytes:
    request = {"uid": "7", "object": custom_resource(**spec), "oldObject": custom_resource(workers=1)}
    return json.dumps({"apiVersion": webhook.REVIEW_VERSION, "request": request}).encode()


@pytest.mark.parametrize(
    ("act", "make"),
    [
        pytest.param(read_answer, nested, id="answer-nested"),
        pytest.param(read_answer, repeated("\x1b["), id="answer-escapes"),
        pytest.param(read_answer, lambda size: b'{"step": ' + b"9" * size + b"}", id="answer-digits"),
        pytest.param(read_answer, lambda size: json.dumps({str(n): n for n in range(size)}).encode(), id="answer-keys"),
        pytest.param(
            lambda body: read_result(body.decode()),
            lambda size: json.dumps(result("train", message="http://" * size)).encode(),
            id="result-addresses",
        ),
        pytest.param(webhook.answer, nested, id="review-nested"),
        pytest.param(webhook.answer, lambda size: review({f"x{n}": n for n in range(size)}), id="review-fields"),
        pytest.param(webhook.answer, lambda size: review({"output": "s3://" + "/" * size}), id="review-text"),
        pytest.param(
            webhook.answer,
            lambda size: review({"data": {"train": {f"d{n}": {} for n in range(size)}}}),
            id="review-data",
        ),
        pytest.param(
            see_pods, dumped(lambda size: {"reason": "x" * size, "message": "http://" * size}), id="pod-words"
        ),
        pytest.param(
            see_status,
            dumped(lambda size: {"conditions": [{"type": f"T{n}"} for n in range(size)]}),
            id="status-conditions",
        ),
        pytest.param(see_status, dumped(lambda size: {"stages": [{"name": "train"}] * size}), id="status-stages"),
        pytest.param(
            see_spec,
            dumped(lambda size: {"podTemplate": {"env": [{"name": f"V{n}"} for n in range(size)]}}),
            id="spec-env",
        ),
        pytest.param(
            see_spec,
            dumped(lambda size: {"podTemplate": {"labels": {f"k{n}": "" for n in range(size)}}}),
            id="spec-labels",
        ),
        pytest.param(see_spec, dumped(lambda size: {"output": "s3://out/" + "/" * size + "x"}), id="spec-slashes"),
        pytest.param(see_spec, dumped(lambda size: {"recipe": "-" * size}), id="spec-recipe"),
        pytest.param(plain_line, lambda size: b"\x1b[" * size, id="log-unfinished-escapes"),
        pytest.param(plain_line, lambda size: b"\x1b]" * size, id="log-unfinished-titles"),
        pytest.param(plain_line, lambda size: b"\x1b[" + b"1;" * size, id="log-endless-parameters"),
    ],
)
def test_work_grows_with_the_input_and_not_with_its_square(
    act: Callable[[bytes], object], make: Callable[[int], bytes]
) -> None:
    assert_proportional(act, make, large=400_000)
