"""Caches that hear of the same objects from a watch and from answers to writes, in any order."""

import json
import tracemalloc

import pytest
from controller.builders import Raw, custom_resource
from internvl_operator.core.run import Key
from internvl_operator.kube.cache import Collection, RawCollection, RunCache, contains, slim

RUN = Key("team", "run")


def raw(version: int, name: str = "a", *, owner: str | None = "run", uid: str = "1") -> Raw:
    metadata: Raw = {"namespace": "team", "name": name, "uid": uid, "resourceVersion": str(version)}
    return {"metadata": metadata | {"owner": owner}}


def versions() -> Collection[str]:
    return Collection(lambda r: str(r["metadata"]["resourceVersion"]), lambda r: r["metadata"]["owner"])


def test_what_the_watch_says_is_found_by_run() -> None:
    found = versions()
    assert found.seen(raw(5)) == RUN
    assert found.seen(raw(6, "b")) == RUN
    assert sorted(found.of(RUN)) == ["5", "6"]
    assert found.gone(raw(7)) == RUN
    assert found.of(RUN) == ["6"]
    assert found.of(Key("team", "other")) == []


def test_old_news_is_no_news() -> None:
    found = versions()
    found.seen(raw(5))
    assert found.seen(raw(5)) is None
    assert found.seen(raw(4)) is None
    assert found.of(RUN) == ["5"]


def test_our_own_write_is_known_before_the_watch_tells() -> None:
    found = versions()
    found.answered(raw(5))
    assert found.of(RUN) == ["5"]
    assert found.seen(raw(5)) is None  # and needs no pass then
    found.answered(raw(4))
    assert found.of(RUN) == ["5"]


def test_an_answer_that_comes_after_the_deletion_does_not_revive_the_object() -> None:
    found = versions()
    found.seen(raw(5))
    found.gone(raw(9))
    found.answered(raw(7))
    assert found.of(RUN) == []
    found.answered(raw(10))  # made again since
    assert found.of(RUN) == ["10"]


def test_a_new_list_replaces_everything_but_what_is_newer_than_it() -> None:
    found = versions()
    for name, version in (("kept", 1), ("changed", 2), ("vanished", 3), ("newer", 20)):
        found.answered(raw(version, name))
    assert found.replaced([raw(1, "kept"), raw(9, "changed")], 10) == ({RUN}, 0)
    assert sorted(found.of(RUN)) == ["1", "20", "9"]
    assert found.replaced([raw(1, "kept"), raw(9, "changed"), raw(20, "newer")], 30) == (set(), 0)


def test_a_list_of_one_namespace_leaves_the_others_alone() -> None:
    found = versions()
    found.seen(raw(1))
    found.replaced([], 10, within="elsewhere")
    assert found.of(RUN) == ["1"]
    found.replaced([], 10, within="team")
    assert found.of(RUN) == []


def test_what_is_not_ours_is_not_kept() -> None:
    found = versions()
    assert found.seen(raw(1, owner=None)) is None
    assert len(found) == 0


def test_a_child_that_changes_hands() -> None:
    found = versions()
    found.seen(raw(1))
    assert found.seen(raw(2, owner="other")) == Key("team", "other")
    assert (found.of(RUN), found.of(Key("team", "other"))) == ([], ["2"])
    assert found.seen(raw(3, owner=None)) == Key("team", "other")
    assert len(found) == 0


def test_runs_take_in_only_newer_states() -> None:
    runs = RunCache()
    assert runs.seen(raw(5))
    assert not runs.seen(raw(5))
    assert not runs.seen(raw(4))
    runs.answered(raw(6))
    assert not runs.seen(raw(6))
    assert runs.seen(raw(7))


def test_a_deleted_runs_late_answer_does_not_revive_it() -> None:
    runs = RunCache()
    runs.seen(raw(5))
    runs.gone(Key("team", "a"), "1")
    runs.answered(raw(6))
    assert runs.get(Key("team", "a")) is None


def test_the_end_of_an_earlier_run_is_not_the_end_of_its_namesake() -> None:
    runs = RunCache()
    runs.seen(raw(9, uid="2"))
    runs.gone(Key("team", "a"), "1")
    assert not runs.seen(raw(8, uid="1"))
    assert runs.get(Key("team", "a")) == raw(9, uid="2")


def test_managed_fields_are_not_kept() -> None:
    assert slim({"metadata": {"name": "a", "managedFields": [1]}, "spec": 1}) == {"metadata": {"name": "a"}, "spec": 1}


@pytest.mark.parametrize(
    ("found", "wanted", "so"),
    [
        pytest.param({"a": 1, "b": 2}, {"a": 1}, True, id="server-added-a-field"),
        pytest.param({"a": 1}, {"a": 2}, False, id="changed"),
        pytest.param({}, {"a": None}, False, id="absent"),
        pytest.param({"a": {"b": 1, "c": 2}}, {"a": {"b": 1}}, True, id="deep"),
        pytest.param({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1}]}, True, id="list-of-objects"),
        pytest.param({"a": [1, 2]}, {"a": [1]}, False, id="longer-list"),
        pytest.param({"a": 1}, {"a": [1]}, False, id="another-type"),
        pytest.param("x", {"a": 1}, False, id="no-object"),
    ],
)
def test_whether_an_object_is_already_as_wanted(found: object, wanted: object, so: bool) -> None:
    assert contains(found, wanted) is so


def test_what_is_kept_of_a_run_and_its_children_is_small() -> None:
    count = 200
    runs, services = RunCache(), RawCollection(lambda raw: str(raw["metadata"]["labels"]["job"]))
    tracemalloc.start()
    for number in range(count):
        raw = custom_resource(f"run-{number}", recipe="internvl2-2b-lora-coco")
        raw["metadata"]["managedFields"] = [{"manager": "kubectl", "fieldsV1": {f"f:{each}": {} for each in range(50)}}]
        runs.seen(raw)
        metadata = raw["metadata"] | {"labels": {"job": f"run-{number}"}}
        services.seen(json.loads(json.dumps({"metadata": metadata, "spec": raw["spec"]})))
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept / count < 5000  # bytes; as dictionaries they take several times as much


def test_what_is_given_out_may_be_changed_without_harm() -> None:
    runs = RunCache()
    runs.seen(custom_resource())
    given = runs.get(Key("team", "run"))
    assert given is not None
    given["spec"].clear()
    again = runs.get(Key("team", "run"))
    assert again is not None
    assert again["spec"] == custom_resource()["spec"]
    assert [raw["spec"] for raw in runs.all()] == [again["spec"]]
