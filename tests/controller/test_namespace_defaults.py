"""Defaults of a namespace: from its ConfigMap into pods; a stage that runs keeps those that it started with."""

import io
from typing import Any

import pytest
from controller.builders import Raw, custom_resource, member
from controller.fake_server import Server, clock
from controller.simulator import SETTINGS, Operator, World
from internvl_api.constants import KIND
from internvl_api.spec.defaults import Defaults
from internvl_api.validation.defaults import RunDefaults
from internvl_operator import webhook
from internvl_operator.core.policies.defaults_in_force import in_force
from internvl_operator.core.run import read_status
from internvl_operator.kube.client import ApiError
from internvl_operator.kube.namespace_defaults import NamespaceDefaults
from internvl_operator.kubectl_ivft import render
from internvl_operator.settings import Settings, SettingsError
from rich.console import Console

NAME = "internvl-defaults"
TEXT = """
outputPrefix: s3://team/runs
secrets: {objectStorage: team-storage}
podTemplate: {image: "registry/team:1", labels: {team: vision}}
"""


def config_map(text: str) -> Raw:
    metadata = {"name": NAME, "namespace": "team"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"defaults.yaml": text}}


def short_resource() -> Raw:
    """A run that leaves everything to the defaults."""
    raw = custom_resource()
    raw["spec"] = {key: raw["spec"][key] for key in ("model", "data", "workers")}
    return raw


def world(text: str | None = TEXT, settings: Settings = SETTINGS) -> World:
    made = World.__new__(World)
    made.server = Server()
    if text is not None:
        made.server.create(config_map(text))
    made.server.create(short_resource())
    made.operator = Operator(made.server, settings)
    made.operator.settle()
    return made


def change(made: World, text: str) -> None:
    """The administrator edits the ConfigMap, after the pods had time to start."""
    clock(made.server, 15)
    made.server.change("ConfigMap", NAME, lambda raw: raw.update(data={"defaults.yaml": text}))
    made.operator.settle()


def image(made: World, pod: str) -> str:
    found: str = made.server.pods[pod]["spec"]["containers"][0]["image"]
    return found


def test_a_short_run_gets_image_labels_secret_and_output_of_its_namespace() -> None:
    made = world()
    pod = made.server.pods["run-preflight-0"]
    assert image(made, "run-preflight-0") == "registry/team:1"
    assert pod["metadata"]["labels"]["team"] == "vision"
    secrets = [
        env["valueFrom"]["secretKeyRef"]["name"] for env in pod["spec"]["containers"][0]["env"] if "valueFrom" in env
    ]
    assert set(secrets) == {"team-storage"}
    assert "output: s3://team/runs/team/run" in made.server.objects["ConfigMap"]["ivft-run"]["data"]["run.yaml"]
    assert made.status["defaults"] == {"namespace": TEXT, "output": "s3://team/runs/team/run"}


def test_a_run_without_an_output_waits_until_a_default_gives_one() -> None:
    made = world(text=None)
    assert made.server.condition("Stalled")["reason"] == "InvalidSpec"
    made.server.create(config_map(TEXT))
    made.operator.settle()
    assert made.server.condition("Stalled")["status"] == "False"
    assert list(made.server.pods) == ["run-preflight-0"]


def test_defaults_of_the_cluster_stand_under_those_of_the_namespace() -> None:
    cluster = Defaults.model_validate({"outputPrefix": "s3://all", "podTemplate": {"priorityClassName": "low"}})
    made = world(settings=SETTINGS.model_copy(update={"defaults": cluster}))
    assert made.server.pods["run-preflight-0"]["spec"]["priorityClassName"] == "low"
    assert made.status["defaults"]["output"] == "s3://team/runs/team/run"


def test_a_change_leaves_a_stage_that_runs_alone_and_holds_for_the_next_one() -> None:
    made = world()
    made.run("preflight")
    change(made, "outputPrefix: s3://moved\npodTemplate: {image: 'registry/team:2'}")
    assert made.server.attempts("preflight") == {"1"}
    assert image(made, "run-preflight-0") == "registry/team:1"
    assert made.status["defaults"]["namespace"] == TEXT
    made.pass_stage("preflight")
    assert image(made, "run-train-0") == "registry/team:2"
    assert made.status["defaults"]["output"] == "s3://team/runs/team/run", "results are there"


def test_pods_that_have_not_started_are_made_again() -> None:
    made = world()
    change(made, TEXT.replace("team:1", "team:2"))
    made.collect()
    assert made.server.attempts("preflight") == {"2"}
    assert image(made, "run-preflight-0") == "registry/team:2"
    assert made.status["restarts"] == {"user": 0, "infrastructure": 0}


def test_invalid_defaults_stall_a_run_with_key_found_and_expected_until_they_are_corrected() -> None:
    made = world("podTemplate: {image: 3}")
    stalled = made.server.condition("Stalled")
    assert stalled["reason"] == "InvalidDefaults"
    assert stalled["message"].startswith(
        "ConfigMap internvl-defaults, defaults.yaml: podTemplate.image: found 3, expected text"
    )
    assert ("Warning", "InvalidDefaults") in [event[:2] for event in made.server.events]
    assert made.server.pods == {}
    change(made, TEXT)
    assert list(made.server.pods) == ["run-preflight-0"]


def test_invalid_defaults_do_not_touch_a_stage_that_runs() -> None:
    made = world()
    made.reach("train")
    change(made, "nonsense: [")
    assert made.server.condition("Stalled")["status"] == "False"
    assert made.server.attempts("train") == {"1"}


def test_defaults_that_come_while_a_run_works_wait_for_its_next_stage() -> None:
    made = World()
    made.reach("train")
    made.server.create(config_map(TEXT))
    made.operator.settle()
    assert "defaults" not in made.status
    made.pass_stage("train")
    assert image(made, "run-publish-0") == "registry/team:1"


def test_another_namespaces_and_other_config_maps_do_not_count() -> None:
    defaults = NamespaceDefaults()
    for namespace, name, text in (("team", NAME, "a"), ("other", NAME, "b"), ("team", "else", "c")):
        metadata = {"namespace": namespace, "name": name, "resourceVersion": "1"}
        defaults.seen({"metadata": metadata, "data": {"defaults.yaml": text}})
    assert (defaults.text("team"), defaults.text("other"), defaults.text("third")) == ("a", "b", "")


def test_a_pod_that_waits_keeps_the_output_and_one_that_works_keeps_all() -> None:
    status = read_status({"defaults": {"namespace": "old", "output": "s3://old"}})
    today = RunDefaults("new", "", run="team/run")
    assert in_force(today, status, ()) == today
    waiting = member(phase="Pending")
    assert in_force(today, status, [waiting]) == today._replace(output="s3://old")
    assert in_force(today, status, [member()]) == RunDefaults("old", "", "s3://old", "team/run")


def review(new: Raw, defaults: Any, old: Raw | None = None) -> Raw:
    known = webhook.Known(defaults=defaults)
    response: Raw = webhook.review(webhook.Request("7", new, old), known)["response"]
    return response


def test_the_webhook_checks_a_run_with_its_namespaces_defaults() -> None:
    assert review(short_resource(), lambda namespace: TEXT)["allowed"]
    refused = review(short_resource(), lambda namespace: "")
    assert "spec.output" in refused["status"]["message"]
    asked: list[str] = []
    review(short_resource(), lambda namespace: asked.append(namespace) or TEXT)
    assert asked == ["team"]


def test_the_webhook_admits_what_it_cannot_check() -> None:
    def unreadable(namespace: str) -> str:
        raise ApiError(0, "Unreachable", "")

    assert review(short_resource(), unreadable)["allowed"]


def test_the_cluster_defaults_are_checked_when_the_operator_starts() -> None:
    found = Settings.from_env({"INTERNVL_OPERATOR_DEFAULTS": '{"outputPrefix": "s3://all/"}'})
    assert found.operator_config().defaults.output_prefix == "s3://all"
    with pytest.raises(SettingsError, match=r"INTERNVL_OPERATOR_DEFAULTS\.outputPrefix: found 'x://y'"):
        Settings.from_env({"INTERNVL_OPERATOR_DEFAULTS": '{"outputPrefix": "x://y"}'})


def test_a_complete_run_keeps_the_defaults_that_it_used() -> None:
    made = world()
    for stage in ("preflight", "train", "publish"):
        made.pass_stage(stage)
    change(made, "podTemplate: {image: other}")
    assert made.server.objects[KIND]["run"]["status"]["defaults"]["namespace"] == TEXT


def test_kubectl_ivft_status_shows_where_a_value_comes_from() -> None:
    made = world(TEXT.replace("labels:", "env: [{name: TOKEN, value: s3cret}], labels:"))
    shown = io.StringIO()
    raw = made.server.objects[KIND]["run"]
    Console(file=shown, width=200).print(render.run_status(raw, made.server.now))
    lines = [line.strip().split(maxsplit=2) for line in shown.getvalue().splitlines()]
    place = "ConfigMap internvl-defaults, defaults.yaml"
    assert ["podTemplate.image", "registry/team:1", place] in lines
    assert ["output", "s3://team/runs/team/run", place] in lines
    assert ["podTemplate.env", "TOKEN", place] in lines
    assert "s3cret" not in shown.getvalue()
