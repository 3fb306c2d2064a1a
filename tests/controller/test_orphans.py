"""Objects under the names of a run's children that it does not own: foreign ones, and those of an orphaned run."""

from collections.abc import Iterator

import pytest
from controller.builders import Raw, custom_resource
from controller.simulator import Operator, World
from internvl_api.constants import KIND
from internvl_operator.kube.client import ApiError

ADOPT = {"internvl.dev/adopt": "true"}


def again(world: World, annotations: Raw | None = None, **changes: object) -> None:
    """`kubectl delete --cascade=orphan`, then `kubectl apply`."""
    world.server.orphan()
    fresh = custom_resource(**changes)
    fresh["metadata"] |= {"uid": "another", "annotations": annotations or {}}
    world.server.create(fresh)
    world.operator = Operator(world.server)


def passes(world: World, count: int = 3) -> None:
    for _ in range(count):
        world.operator.hear()
        world.operator.run_pass()


def owners(world: World) -> set[str]:
    kinds = ("Pod", "Service", "ConfigMap", "NetworkPolicy")
    found = [raw["metadata"] for kind in kinds for raw in world.server.objects[kind].values()]
    return {reference["uid"] for metadata in found for reference in metadata.get("ownerReferences", [{"uid": ""}])}


def test_all_orphans_are_named_at_once() -> None:
    world = World()
    world.reach("train")
    again(world)
    passes(world, 1)
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "NameTaken"
    pods = ("Pod run-preflight-0", "Pod run-train-0", "Pod run-train-1")
    for words in (*pods, "Service ivft-run", "ConfigMap ivft-run", "NetworkPolicy ivft-run", "orphaned"):
        assert words in stalled["message"]
    assert "kubectl annotate ivft run -n team internvl.dev/adopt=true" in stalled["message"]
    assert "-l 'internvl.dev/job-uid in (11111111-0000-4000-8000-000000000001)'" in stalled["message"]
    assert owners(world) == {""}


def test_orphans_are_adopted_where_the_user_asks_and_training_goes_on_in_its_pods() -> None:
    world = World()
    world.reach("train")
    before = {name: raw["metadata"]["uid"] for name, raw in world.server.pods.items()}
    again(world, ADOPT)
    world.operator.settle()
    assert owners(world) == {"another"}
    assert {name: raw["metadata"]["uid"] for name, raw in world.server.pods.items()} == before
    assert (world.status["phase"], world.status["stage"]) == ("Running", "train")
    assert [reason for _, reason, _ in world.server.events].count("Adopted") == 1
    for raw in (*world.server.pods.values(), *world.server.objects["Service"].values()):
        assert raw["metadata"]["labels"]["internvl.dev/job-uid"] == "another"


def adopted_uids(world: World, pod: str) -> str:
    (container,) = world.server.pods[pod]["spec"]["containers"]
    (value,) = [each["value"] for each in container["env"] if each["name"] == "INTERNVL_ADOPTED_UIDS"]
    return str(value)


def test_later_pods_know_the_uid_under_which_adopted_pods_hold_the_output() -> None:
    """So that they take the lease over at once from an adopted pod that may live on."""
    world = World()
    world.reach("train")
    first = world.server.objects[KIND]["run"]["metadata"]["uid"]
    assert adopted_uids(world, "run-train-0") == ""
    again(world, ADOPT)
    world.operator.settle()
    world.server.remove("Pod", "run-train-1")
    world.operator.settle()
    world.collect()
    assert world.status["attempt"] == 2
    assert adopted_uids(world, "run-train-0") == first
    world.run("train")
    world.server.orphan()
    third = custom_resource()
    third["metadata"] |= {"uid": "third", "annotations": ADOPT}
    world.server.create(third)
    world.operator = Operator(world.server)
    world.operator.settle()
    world.collect()
    assert world.server.attempts("preflight") == {"2"}, "pods of a later attempt do not fit the new run"
    assert set(adopted_uids(world, "run-preflight-0").split(",")) == {first, "another"}


def test_the_annotation_may_come_later() -> None:
    world = World()
    world.reach("train")
    again(world)
    passes(world)
    world.server.change(KIND, "run", lambda raw: raw["metadata"].update(annotations=ADOPT))
    world.operator.settle()
    assert owners(world) == {"another"}
    assert world.status["phase"] == "Running"


def test_adopted_pods_of_another_spec_are_replaced() -> None:
    world = World()
    world.reach("train")
    again(world, ADOPT, data={"train": {"photos": {"annotation": "s3://data/other.jsonl"}}})
    world.operator.settle()
    world.collect()
    assert world.pods("train") == []
    assert world.pods("preflight") == ["run-preflight-0"]
    assert owners(world) == {"another"}


@pytest.mark.parametrize("without_map", [False, True])
def test_orphans_of_another_output_are_not_adopted(without_map: bool) -> None:
    world = World()
    world.reach("train")
    if without_map:
        world.server.orphan()
        world.server.create(custom_resource())  # so that `again` has one to delete
        world.server.remove("ConfigMap", "ivft-run")
    again(world, ADOPT, output="s3://out/other")
    passes(world)
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "NameTaken"
    assert "they cannot be adopted: they worked for another output than s3://out/other" in stalled["message"]
    assert owners(world) == {""}


def test_a_foreign_object_is_never_adopted() -> None:
    world = World()
    world.reach("train")
    world.server.orphan()
    for kind in ("Pod", "Service", "ConfigMap", "NetworkPolicy"):
        world.server.objects[kind].clear()
    world.server.create(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "ivft-run", "namespace": "team", "labels": {}}}
    )
    fresh = custom_resource()
    fresh["metadata"] |= {"uid": "another", "annotations": ADOPT}
    world.server.create(fresh)
    world.operator = Operator(world.server)
    passes(world)
    stalled = world.server.condition("Stalled")
    assert stalled["message"] == (
        "ConfigMap ivft-run exists and belongs to another owner, but the run needs its name; "
        "delete it, or rename the run"
    )
    assert owners(world) == {""}


def test_a_scheduler_whose_crd_is_missing_hides_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.reach("train")
    again(world)
    connection = world.operator._connection
    pages = connection.list_pages

    def list_pages(path: str, *, selector: str) -> Iterator[Raw]:
        if "podgroups" in path and "team" in path:
            raise ApiError(404, "NotFound", "the server could not find the requested resource")
        return pages(path, selector=selector)

    monkeypatch.setattr(connection, "list_pages", list_pages)
    passes(world, 1)
    assert world.server.condition("Stalled")["reason"] == "NameTaken"


def test_an_orphan_that_changes_meanwhile_is_adopted_by_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.reach("train")
    again(world, ADOPT)
    connection, once = world.operator._connection, [True]
    patch = connection.patch

    def conflict_once(kind: str, namespace: str, name: str, body: Raw) -> Raw:
        if kind == "Service" and once:
            once.clear()
            raise ApiError(409, "Conflict", "the object has been modified")
        return patch(kind, namespace, name, body)

    monkeypatch.setattr(connection, "patch", conflict_once)
    world.operator.settle()
    assert owners(world) == {"another"}
    assert world.status["phase"] == "Running"


def test_a_server_that_refuses_adoption_is_quoted_and_nothing_is_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenShift lets only those change an owner who may delete the object; the operator may delete pods alone."""
    world = World()
    world.reach("train")
    again(world, ADOPT)
    connection = world.operator._connection
    patch, words = connection.patch, "cannot set an ownerRef on a resource you can't delete"

    def forbid(kind: str, namespace: str, name: str, body: Raw) -> Raw:
        if kind != "Pod":
            raise ApiError(403, "Forbidden", words)
        return patch(kind, namespace, name, body)

    monkeypatch.setattr(connection, "patch", forbid)
    passes(world)
    stalled = world.server.condition("Stalled")
    assert stalled["reason"] == "NameTaken"
    assert stalled["message"].endswith(f"; the API server refuses adoption, so delete them: {words}")
    assert "kubectl delete configmap,networkpolicy,pod,service -n team" in stalled["message"]
    assert owners(world) == {""}
