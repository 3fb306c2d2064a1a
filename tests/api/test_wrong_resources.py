"""Every mistake of tests/data/wrong-resources.yaml is refused by whom the table says, in the words it says."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from controller.builders import CONFIG, NOW, UID
from crd_evaluator import RULES, refusals, rule_messages
from internvl_api.constants import API_VERSION, GROUP, KIND, PLURAL, VERSION
from internvl_operator import webhook
from internvl_operator.core.observe import Observed
from internvl_operator.core.reconcile import reconcile
from internvl_operator.core.run import read_run
from ivft_cluster.api_server import ApiServer
from ivft_cluster.releases import binary
from ivft_cluster.shell import wait_for
from kubernetes import client
from kubernetes.client.exceptions import ApiException

TABLE = yaml.safe_load((Path(__file__).parents[1] / "data/wrong-resources.yaml").read_text(encoding="utf-8"))
RIGHT: dict[str, Any] = {
    "model": {"source": "s3://models/tiny"},
    "data": {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}},
    "output": "s3://models/out",
}
Raw = dict[str, Any]
LEAST = 60  # so that a table that is read wrongly, or shrinks, is noticed


class Answer(NamedTuple):
    """What an API server made of a resource: what it would store, or why it will not."""

    stored: Raw | None
    refusal: str


def resource(row: Raw) -> Raw:
    """A row as a user would send it."""
    metadata = {"name": "run", "namespace": "default"} | row.get("metadata", {})
    made: Raw = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata}
    if row["spec"] is not None:
        made["spec"] = {key: value for key, value in (RIGHT | row["spec"]).items() if value is not None}
    return made


def read(sent: Raw) -> Raw:
    """The same with what a server adds."""
    return {**sent, "metadata": sent["metadata"] | {"uid": UID, "generation": 1, "resourceVersion": "1"}}


def stalled(raw: Raw) -> tuple[str, str]:
    """Reason and message of the operator's answer."""
    status = reconcile(read_run(raw), Observed(), NOW, CONFIG).status
    assert status is not None
    (found,) = [condition for condition in status.conditions if condition.type == "Stalled"]
    return found.reason, found.message


def denied(raw: Raw) -> str:
    """The webhook's message, when a resource is created so."""
    response = webhook.review(webhook.Request("1", raw, None))["response"]
    assert isinstance(response, dict)
    return "" if response["allowed"] else str(response["status"]["message"])


def told_by_us() -> list[Any]:
    return [pytest.param(row, id=row["case"]) for row in TABLE if "operator" in row]


def test_the_table_is_read() -> None:
    print(f"{len(TABLE)} wrong resources")
    assert len({row["case"] for row in TABLE}) == len(TABLE) >= LEAST
    assert all({"kubectl", "server", "operator"} & set(row) for row in TABLE)


@pytest.mark.parametrize("row", told_by_us())
def test_operator_and_webhook_explain_it(row: Raw) -> None:
    raw = read(resource(row))
    reason, message = stalled(raw)
    assert message.startswith(row["operator"])
    assert reason == row.get("reason", "InvalidSpec")
    assert denied(raw) == message
    assert len(message) < 1000


def test_what_is_right_is_refused_by_nobody() -> None:
    raw = read(resource({"spec": {}}))
    assert stalled(raw)[0] == "NotStalled"
    assert denied(raw) == ""
    assert rule_messages(RIGHT) == []


@pytest.mark.parametrize("row", [pytest.param(row, id=row["case"]) for row in TABLE if "rule" in row])
def test_a_rule_refuses_it(row: Raw) -> None:
    assert rule_messages(resource(row)["spec"]) == [row["rule"]]


def test_every_rule_is_seen_to_refuse() -> None:
    seen = {placed.rule["rule"] for row in TABLE if "rule" in row for placed, _ in refusals(resource(row)["spec"])}
    assert seen == {placed.rule["rule"] for placed in RULES}


def test_what_may_be_a_secret_is_not_repeated() -> None:
    """A condition is read by more people than a Secret."""
    for misplaced in ({"secrets": {"huggingFace": "hf_AbCd"}}, {"publish": {"hub": {"token": "hf_AbCd"}}}):
        assert "hf_AbCd" not in stalled(read(resource({"spec": misplaced})))[1]


@pytest.fixture(scope="module")
def known(served: ApiServer) -> ApiServer:
    """A server that has published the schema that kubectl asks for."""
    wait_for("kubectl knows the kind", lambda: KIND in kubectl(served, "get", "--raw", "/openapi/v2").stdout)
    return served


def kubectl(server: ApiServer, *words: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
    command = [str(binary("kubectl")), f"--kubeconfig={server.kubeconfig}", *words]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def sent(server: ApiServer, raw: Raw) -> Answer:
    """Created, but for the last step."""
    jobs = client.CustomObjectsApi(server.api)
    try:
        stored = jobs.create_namespaced_custom_object(GROUP, VERSION, "default", PLURAL, raw, dry_run="All")
    except ApiException as error:
        if error.status != 422:
            raise
        return Answer(None, json.loads(error.body)["message"])
    return Answer(stored, "")


@pytest.mark.integration
@pytest.mark.parametrize("row", [pytest.param(row, id=row["case"]) for row in TABLE])
def test_a_real_server_refuses_it_or_leaves_it_to_us(known: ApiServer, row: Raw) -> None:
    raw = resource(row)
    answer = sent(known, raw)
    if "server" in row:
        assert row["server"] in answer.refusal
        return
    if "rule" in row:
        field, _, words = row["rule"].partition(": ")
        assert f" {field}: " in answer.refusal
        assert words in answer.refusal
        return
    assert answer.stored is not None, answer.refusal
    if "kubectl" in row:
        refused = kubectl(known, "create", "--dry-run=server", "-f", "-", stdin=json.dumps(raw))
        assert refused.returncode == 1
        assert re.search(rf'unknown field "([\w.\[\]]+\.)?{row["kubectl"]}"', refused.stderr), refused.stderr
    else:
        assert stalled(answer.stored)[1].startswith(row["operator"]), "also with what the server filled in"
