"""Defaults of a namespace and of the cluster: which value wins, and what a wrong text is told."""

from typing import Any

import pytest
from controller.builders import spec
from internvl_api.spec.defaults import Defaults
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.defaults import MAX_TEXT, RunDefaults
from internvl_api.validation.policy import Policy
from internvl_api.validation.violations import SpecError

Raw = dict[str, Any]
PLACE = "ConfigMap internvl-defaults, defaults.yaml"


def under(written: Raw, namespace: str = "", cluster: str = "", output: str = "") -> Raw:
    return RunDefaults(namespace, cluster, output, "team/run").under(written)


def refusal(text: str) -> str:
    with pytest.raises(SpecError) as found:
        under({}, text)
    assert found.value.reason == "InvalidDefaults"
    return str(found.value)


@pytest.mark.parametrize(
    ("written", "namespace", "cluster", "image"),
    [
        pytest.param({"image": "run"}, "namespace", "cluster", "run", id="the-run"),
        pytest.param({}, "namespace", "cluster", "namespace", id="the-namespace"),
        pytest.param({}, "", "cluster", "cluster", id="the-cluster"),
        pytest.param({}, "", "", None, id="built-in"),
    ],
)
def test_the_nearest_value_wins(written: Raw, namespace: str, cluster: str, image: str | None) -> None:
    texts = [f"podTemplate: {{image: {name}}}" if name else "" for name in (namespace, cluster)]
    assert under({"podTemplate": written}, *texts)["podTemplate"].get("image") == image


@pytest.mark.parametrize(
    ("written", "namespace", "cluster", "output"),
    [
        ("s3://own/out", "s3://team/runs", "s3://all", "s3://own/out"),
        (None, "s3://team/runs/", "s3://all", "s3://team/runs/team/run"),
        (None, None, "s3://all", "s3://all/team/run"),
        (None, None, "/data", "/data/team/run"),
        (None, None, None, None),
    ],
)
def test_a_run_without_an_output_writes_below_the_prefix(
    written: str | None, namespace: str | None, cluster: str | None, output: str | None
) -> None:
    texts = [f"outputPrefix: {prefix}" if prefix else "" for prefix in (namespace, cluster)]
    assert under({"output": written} if written else {}, *texts).get("output") == output


def test_an_output_that_was_fixed_stays_whatever_the_prefix_says_now() -> None:
    assert under({}, "outputPrefix: s3://other", output="s3://team/team/run")["output"] == "s3://team/team/run"


def test_maps_and_named_lists_are_merged_and_everything_else_is_taken_whole() -> None:
    namespace = """
        podTemplate:
          labels: {team: a, cost: "1"}
          env: [{name: A, value: "1"}, {name: B, value: "2"}]
          tolerations: [{key: gpu}]
          resources: {requests: {cpu: "4"}, limits: {memory: 8Gi}}
    """
    own = {
        "labels": {"cost": "2"},
        "env": [{"name": "B", "value": "own"}],
        "tolerations": [{"key": "own"}],
        "resources": {"requests": {"cpu": "1"}},
    }
    found = under({"podTemplate": own}, namespace, "podTemplate: {labels: {region: eu}}")["podTemplate"]
    assert found["labels"] == {"team": "a", "cost": "2", "region": "eu"}
    assert found["env"] == [{"name": "A", "value": "1"}, {"name": "B", "value": "own"}]
    assert (found["tolerations"], found["resources"]) == (own["tolerations"], own["resources"])


def test_the_queue_of_another_gang_scheduler_is_not_taken() -> None:
    text = "scheduling: {gang: kueue, queue: team-a}"
    assert under({}, text)["scheduling"] == {"gang": "kueue", "queue": "team-a"}
    assert under({"scheduling": {"queue": "b"}}, text)["scheduling"] == {"gang": "kueue", "queue": "b"}
    assert under({"scheduling": {"gang": "volcano"}}, text)["scheduling"] == {"gang": "volcano"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("outputPrefix: gopher://x", f"{PLACE}: outputPrefix: found 'gopher://x', expected s3://, gs:// or az://"),
        ("output: s3://x/y", f"{PLACE}: output: unknown field; expected one of outputPrefix, secrets, scheduling"),
        ("podTemplate: {imag: x}", f"{PLACE}: podTemplate.imag: unknown field (did you mean 'image'?)"),
        ("podTemplate: {image: 3}", f"{PLACE}: podTemplate.image: found 3, expected text"),
        ("secrets: {objectStorage: A B}", f"{PLACE}: secrets.objectStorage: invalid value (not shown"),
        ("runPolicy: {suspend: true}", f"{PLACE}: runPolicy: unknown field; expected one of"),
        ("- a", f"{PLACE}: found list, expected an object"),
        ("a: [", f"{PLACE}: found text that is not YAML in line"),
        ("a: &x [1]\nb: *x", f"{PLACE}: found the reference *x, expected none"),
        ("a: " + "[" * 5000, f"{PLACE}: nested deeper than"),
        ("a" * (MAX_TEXT + 1), f"{PLACE}: found more than 16,384 characters"),
        ("a: " + "9" * 9000, PLACE),
        ("!!python/object/apply:os.system [id]", PLACE),
        ("\x00", PLACE),
    ],
)
def test_a_wrong_text_names_the_key_what_was_found_and_what_is_expected(text: str, words: str) -> None:
    assert refusal(text).startswith(words)


def test_an_empty_text_has_no_effect() -> None:
    assert under({"workers": 2}, "# nothing yet") == {"workers": 2}


def test_a_value_that_the_policy_refuses_says_where_it_was_set() -> None:
    policy = Policy(images=("registry.example.org/",))
    defaults = RunDefaults(namespace="podTemplate: {image: mine}", run="team/run")
    written = spec(podTemplate={"labels": {"a": "b"}})
    (found,) = check_spec(written, InCluster(policy=policy, defaults=defaults)).violations
    assert found.field == "spec.podTemplate.image"
    assert found.message.endswith(f"(set by {PLACE})")
    (own,) = check_spec(spec(podTemplate={"image": "mine"}), InCluster(policy=policy)).violations
    assert "set by" not in own.message


def test_without_an_output_and_without_a_prefix_the_next_step_is_told() -> None:
    written = {key: value for key, value in spec().items() if key != "output"}
    (found,) = check_spec(written, InCluster()).violations
    assert found.field == "spec.output"
    assert "set it, or ask your administrator for an outputPrefix" in found.message


def test_what_was_applied_names_its_place() -> None:
    defaults = RunDefaults("podTemplate: {labels: {a: b}}", "outputPrefix: s3://all", run="team/run")
    found = defaults.applied({"podTemplate": {"image": "own"}})
    assert [(each.field, each.place) for each in found] == [
        ("output", "the chart's defaults"),
        ("podTemplate.labels", PLACE),
    ]


def test_defaults_are_written_as_they_were_set() -> None:
    defaults = Defaults.model_validate({"podTemplate": {"image": "x"}, "secrets": {}})
    assert defaults.to_yaml() == "secrets: {}\npodTemplate:\n  image: x\n"
    assert Defaults().to_yaml() == ""
