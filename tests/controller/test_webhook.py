"""What admission refuses, in which words, and what happens without it."""

import base64
import ipaddress
import json
import shutil
import socket
import ssl
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from controller.builders import CONFIG, NOW, Raw, custom_resource
from controller.operator_process import Cluster, OperatorProcess
from crd_evaluator import TRANSITIONS, refusal
from internvl_api.constants import GROUP, PLURAL, VERSION
from internvl_operator import webhook
from internvl_operator.core.observe import Observed
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.run import read_run
from internvl_operator.http_server import TlsFolder
from ivft_cluster.ports import free_ports
from ivft_cluster.shell import wait_for
from kubernetes import client
from kubernetes.client.exceptions import ApiException

NO_SUCH_METRIC = {
    "tasks": {"coco": {"task": "caption-coco", "annotation": "s3://data/val.json"}},
    "publishIf": "vqa_accuracy >= 0.5",
}
OTHER_MODEL = {"model": {"name": "InternVL2-1B", "source": "hf://OpenGVLab/InternVL2-2B"}}
BAD = custom_resource(recipe="internvl2-2b-lora-cocoo")
BAD_TWICE = custom_resource(**OTHER_MODEL, evaluation=NO_SUCH_METRIC)
CHECKPOINTED = {
    "checkpoint": {
        "step": 5,
        "uri": "s3://out/run/checkpoints/step-00000005",
        "sha256": "0",
        "verifiedAt": "2026-01-31T12:00:00Z",
    }
}
MOVED = custom_resource(output="s3://out/new", status=CHECKPOINTED)


def body(new: Any, old: Any = None, uid: Any = "7") -> bytes:
    request = {"uid": uid, "object": new, "oldObject": old}
    return json.dumps({"apiVersion": "admission.k8s.io/v1", "request": request}).encode()


def response_to(new: Raw | None, old: Raw | None = None) -> Raw:
    status, text = webhook.answer(body(new, old))
    assert status == 200, text
    answer: Raw = json.loads(text)
    assert (answer["apiVersion"], answer["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response: Raw = answer["response"]
    return response


@pytest.mark.parametrize(
    ("new", "old", "said"),
    [
        pytest.param(custom_resource(), None, None, id="right"),
        pytest.param(BAD, None, "did you mean 'internvl2-2b-lora-coco'?", id="no-such-recipe"),
        pytest.param(custom_resource(evaluation=NO_SUCH_METRIC), None, "no task measures", id="no-such-metric"),
        pytest.param(BAD, custom_resource(), "spec.recipe: unknown recipe", id="made-wrong-by-an-edit"),
        pytest.param(custom_resource(), BAD, None, id="mended"),
        pytest.param({**BAD, "metadata": BAD["metadata"] | {"labels": {"a": "b"}}}, BAD, None, id="wrong-as-before"),
        pytest.param(BAD_TWICE, None, "set model.name to InternVL2-2B (and 1 more)", id="wrong-twice"),
        pytest.param(custom_resource(**OTHER_MODEL), BAD_TWICE, None, id="one-of-two-mended"),
        pytest.param(BAD_TWICE, custom_resource(**OTHER_MODEL), "vqa_accuracy, which no task", id="wrong-once-more"),
        pytest.param({**BAD, "metadata": {"deletionTimestamp": "now"}}, custom_resource(), None, id="being-deleted"),
        pytest.param(None, BAD, None, id="deleted"),
        pytest.param({**BAD, "spec": "words"}, None, "spec: found str, expected an object", id="not-a-spec"),
        pytest.param({**custom_resource(), "metadata": {"generateName": "run-"}}, None, None, id="no-name-yet"),
    ],
)
def test_review(new: Raw | None, old: Raw | None, said: str | None) -> None:
    response = response_to(new, old)
    assert response["uid"] == "7"
    assert response["allowed"] == (said is None)
    assert (said or "") in response.get("status", {}).get("message", "")


@pytest.mark.parametrize(
    ("new", "old", "refused"),
    [
        pytest.param(MOVED, custom_resource(status=CHECKPOINTED), True, id="checkpoints-would-be-left-behind"),
        pytest.param(custom_resource(output="s3://out/new"), custom_resource(), False, id="nothing-has-begun"),
        pytest.param(
            custom_resource(output="s3://out/run/", workers=1, status=CHECKPOINTED),
            custom_resource(status=CHECKPOINTED),
            False,
            id="another-field-and-a-slash",
        ),
        pytest.param(
            custom_resource(output="s3://out/run2", status=CHECKPOINTED),
            custom_resource(status=CHECKPOINTED),
            True,
            id="a-name-that-begins-alike",
        ),
        pytest.param(custom_resource(status=CHECKPOINTED), MOVED, False, id="moved-back"),
        pytest.param(
            custom_resource(output="s3://out/new", runPolicy={"suspend": True}, status=CHECKPOINTED),
            MOVED,
            False,
            id="moved-before-and-suspended-now",
        ),
    ],
)
def test_an_output_stays_while_it_holds_checkpoints(new: Raw, old: Raw, refused: bool) -> None:
    response = response_to(new, old)
    assert response["allowed"] is not refused
    if refused:
        status = reconcile(read_run(new), Observed(), NOW, CONFIG).status
        assert status is not None
        (found,) = [condition for condition in status.conditions if condition.type == "Stalled"]
        assert (found.reason, found.message) == ("InvalidSpec", response["status"]["message"]), "the operator's words"
        (placed,) = TRANSITIONS
        assert found.message == f"spec.output: {refusal(placed.rule, new, old)}", "the server's words"


def with_text(value: Any, text: str) -> bytes:
    """A review whose placeholder is replaced by any text, JSON or not."""
    return body(value).replace(b'"HOLE"', text.encode())


HOLE = custom_resource(training={"deepspeed": "HOLE"})
LISTS, OBJECTS = "[" * 11_900 + "1" + "]" * 11_900, '{"a":' * 11_900 + "1" + "}" * 11_900


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        pytest.param(b"", "JSON", id="nothing"),
        pytest.param(b"\xff", "JSON", id="not-utf-8"),
        pytest.param(b"[" * 2_000_000, "RecursionError", id="brackets-without-end"),
        pytest.param(with_text(HOLE, "9" * 5000), "ValueError", id="5000-digits"),
        pytest.param(b"null", "the body: found nothing, expected an object", id="null"),
        pytest.param(b"[1]", "the body: found list, expected an object", id="list"),
        pytest.param(
            b'{"request": {"uid": "7"}}', "apiVersion: found nothing, expected admission.k8s.io/v1", id="no-version"
        ),
        pytest.param(
            b'{"apiVersion": "admission.k8s.io/v1", "request": [1]}',
            "request: found list, expected an object",
            id="request",
        ),
        pytest.param(body(None, uid=7), "request.uid: found 7, expected a text", id="uid-is-a-number"),
        pytest.param(body(None, uid="7" * 1000), "request.uid: found '777", id="uid-is-long"),
        pytest.param(body([1]), "request.object: found list, expected an object", id="object"),
        pytest.param(
            body({"spec": {}}), "request.object.metadata: found nothing, expected an object", id="no-metadata"
        ),
        pytest.param(
            body(None, {"metadata": "x"}), "request.oldObject.metadata: found 'x', expected an object", id="metadata"
        ),
    ],
)
def test_what_is_no_review_is_refused_with_the_part_that_is_wrong(sent: bytes, found: str) -> None:
    status, text = webhook.answer(sent)
    assert status == 400
    assert found in text
    assert text.startswith("expected an AdmissionReview: ")


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        pytest.param(with_text(HOLE, LISTS), "nested deeper than 32 levels", id="deep-lists"),
        pytest.param(with_text(HOLE, OBJECTS), "nested deeper than 32 levels", id="deep-objects"),
        pytest.param(with_text(custom_resource(workers="HOLE"), "1e999"), "spec.workers", id="infinite"),
        pytest.param(with_text(custom_resource(workers="HOLE"), "9" * 4000), "spec.workers", id="4000-digits"),
        pytest.param(with_text(custom_resource(recipe="HOLE"), '"\\ud800"'), "unknown recipe", id="half-a-character"),
        pytest.param(body(custom_resource(output="s3://out" + "/" * 4_000_000)), "4,000,008 characters", id="long"),
        pytest.param(body({**BAD, "status": "words"}), "unknown recipe", id="status-is-text"),
        pytest.param(body({**BAD, "status": {"checkpoint": 1e300}}), "unknown recipe", id="checkpoint-is-a-number"),
        pytest.param(
            body(custom_resource(**{f"x{number}": 1 for number in range(60_000)})),
            "more than 50,000",
            id="many-fields",
        ),
        pytest.param(
            body(custom_resource(**{f"trainin{number}": 1 for number in range(8_000)})),
            "unknown field (did you mean 'training'?) (and 99 more)",
            id="many-mistakes",
        ),
    ],
)
def test_a_hostile_run_is_denied(sent: bytes, said: str) -> None:
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(12_000)  # the operator's: then nesting is decoded, and must not hurt later
    try:
        status, text = webhook.answer(sent)
    finally:
        sys.setrecursionlimit(before)
    response = json.loads(text)["response"]
    assert (status, response["allowed"]) == (200, False)
    assert said in response["status"]["message"]
    assert len(response["status"]["message"]) < 1000


def test_a_mistake_of_ours_is_logged_and_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "check_spec", lambda *_: 1 / 0)
    status, text = webhook.answer(body(custom_resource()))
    assert (status, text) == (500, "cannot check this run; the operator's log has the reason\n")


@pytest.fixture
def hooked(cluster_of_test: Cluster, tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator with its webhook, known to the API server for the test's namespace."""
    cluster, (port,) = cluster_of_test, free_ports(1)
    pki = cluster.server.control_plane.pki
    shutil.copy(pki / "apiserver.crt", tmp_path / "tls.crt")
    shutil.copy(pki / "apiserver.key", tmp_path / "tls.key")
    cluster.core.patch_namespace(cluster.namespace, {"metadata": {"labels": {"hooked": cluster.namespace}}})
    hooks: Any = client.AdmissionregistrationV1Api(cluster.server.api)
    hook = {
        "name": f"runs.{GROUP}",
        "clientConfig": {
            "url": f"https://127.0.0.1:{port}{webhook.PATH}",
            "caBundle": base64.b64encode((pki / "ca.crt").read_bytes()).decode(),
        },
        "rules": [
            {"apiGroups": [GROUP], "apiVersions": [VERSION], "resources": [PLURAL], "operations": ["CREATE", "UPDATE"]}
        ],
        "namespaceSelector": {"matchLabels": {"hooked": cluster.namespace}},
        "failurePolicy": "Ignore",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
        "timeoutSeconds": 5,
    }
    settings = {"WEBHOOK_PORT": str(port), "WEBHOOK_CERTIFICATES": str(tmp_path)}
    with OperatorProcess(cluster, tmp_path, **settings) as running:
        hooks.create_validating_webhook_configuration({"metadata": {"name": cluster.namespace}, "webhooks": [hook]})
        try:
            yield running
        finally:
            hooks.delete_validating_webhook_configuration(cluster.namespace)


@pytest.mark.integration
def test_the_api_server_refuses_with_our_words(cluster_of_test: Cluster, hooked: OperatorProcess) -> None:
    def refused() -> str:
        try:
            cluster_of_test.create("bad", evaluation=NO_SUCH_METRIC)
        except ApiException as error:
            return str(error.body)
        cluster_of_test.delete("bad")  # the API server had not heard of the webhook yet
        return ""

    told = "spec.evaluation.publishIf: found vqa_accuracy, which no task measures"
    assert told in wait_for("the webhook is asked", refused)
    cluster_of_test.create("good")
    with pytest.raises(ApiException, match=r"spec\.model\.source: found hf://OpenGVLab/InternVL2-2B, which holds"):
        cluster_of_test.edit(OTHER_MODEL, "good")
    cluster_of_test.patch_status(CHECKPOINTED, "good")
    with pytest.raises(ApiException, match="cannot change while it holds this run's checkpoints"):
        cluster_of_test.edit({"output": "s3://out/new"}, "good")

    hooked.kill()  # nobody is held up, and the operator says the same when it is back
    cluster_of_test.create("bad", evaluation=NO_SUCH_METRIC)
    hooked.start()
    assert told in cluster_of_test.wait_condition("Stalled", "InvalidCondition", "bad")["message"]


def own_address() -> str:
    """An address of this machine that may be an endpoint; a loopback address may not."""
    for addresses in psutil.net_if_addrs().values():
        for each in addresses:
            if each.family == socket.AF_INET and not ipaddress.ip_address(each.address).is_loopback:
                return str(each.address)
    pytest.skip("this machine has only a loopback address")


@pytest.mark.integration
def test_the_api_server_trusts_the_certificate_that_the_operator_makes(
    cluster_of_test: Cluster, tmp_path: Path
) -> None:
    cluster, (port,), address = cluster_of_test, free_ports(1), own_address()
    namespace, name = cluster.namespace, "internvl-operator-webhook"  # as in the chart
    secret, configuration = f"{name}-certificate", f"{name}-{cluster.namespace}"
    cluster.core.create_namespaced_secret(namespace, {"metadata": {"name": secret}})
    cluster.core.create_namespaced_service(
        namespace, {"metadata": {"name": name}, "spec": {"ports": [{"name": "webhook", "port": 443}]}}
    )
    endpoints = {
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"name": "webhook", "port": port}],
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
    }
    client.DiscoveryV1Api(cluster.server.api).create_namespaced_endpoint_slice(namespace, endpoints)
    cluster.core.patch_namespace(namespace, {"metadata": {"labels": {"hooked": namespace}}})
    hooks: Any = client.AdmissionregistrationV1Api(cluster.server.api)
    hook = {
        "name": f"runs.{GROUP}",
        "clientConfig": {"service": {"name": name, "namespace": namespace, "path": webhook.PATH}},
        "rules": [{"apiGroups": [GROUP], "apiVersions": [VERSION], "resources": [PLURAL], "operations": ["CREATE"]}],
        "namespaceSelector": {"matchLabels": {"hooked": namespace}},
        "failurePolicy": "Fail",
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    hooks.create_validating_webhook_configuration({"metadata": {"name": configuration}, "webhooks": [hook]})
    settings = {
        "WEBHOOK_PORT": str(port),
        "WEBHOOK_SECRET": secret,
        "WEBHOOK_SERVICE": name,
        "WEBHOOK_CONFIGURATION": configuration,
        "LEASE_NAMESPACE": namespace,
    }

    def answered() -> str:
        try:
            cluster.create("bad", evaluation=NO_SUCH_METRIC)
        except ApiException as error:
            return str(error.body) if "denied the request" in str(error.body) else ""
        raise AssertionError("failurePolicy is Fail")

    try:
        with OperatorProcess(cluster, tmp_path, **settings):
            told = "spec.evaluation.publishIf: found vqa_accuracy, which no task measures"
            assert told in wait_for("the webhook answers", answered)
            cluster.create("good")
    finally:
        hooks.delete_validating_webhook_configuration(configuration)


@pytest.mark.integration
def test_a_renewed_certificate_is_served_without_a_restart(cluster_of_test: Cluster, tmp_path: Path) -> None:
    pki = cluster_of_test.server.control_plane.pki

    def put(name: str) -> None:
        for end in ("key", "crt"):
            shutil.copyfile(pki / f"{name}.{end}", tmp_path / f"tls.{end}")

    def served() -> str:
        return ssl.get_server_certificate(("127.0.0.1", server.server_port))

    put("front-proxy")
    server = webhook.serve(0, TlsFolder(tmp_path).context)
    try:
        first = served()
        put("apiserver")
        assert served() != first
        trusting = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        url = f"https://127.0.0.1:{server.server_port}{webhook.PATH}"
        with pytest.raises(urllib.request.HTTPError, match="400"):
            urllib.request.urlopen(url, data=b"nonsense", context=trusting, timeout=10)
    finally:
        server.shutdown()
        server.server_close()
