"""The cache of resolved specs: bounded by length, one entry for each run."""

import json

from controller.builders import spec
from internvl_api.validation.cluster import InCluster
from internvl_operator.resolved_specs import ResolvedSpecs

CLUSTER = InCluster()


def test_an_edit_replaces_the_entry_of_its_run() -> None:
    cache = ResolvedSpecs(limit=2**20)
    for seed in range(50):
        resolved = cache.get("team/run", "uid", json.dumps(spec(training={"seed": seed})), CLUSTER)
        assert resolved.spec is not None
        assert resolved.spec.training.seed == seed
    assert len(cache) == 1


def test_the_same_spec_is_resolved_once() -> None:
    cache, text = ResolvedSpecs(limit=2**20), json.dumps(spec())
    assert cache.get("team/run", "uid", text, CLUSTER) is cache.get("team/run", "uid", text, CLUSTER)


def test_a_run_that_was_deleted_and_made_again_is_another() -> None:
    cache, text = ResolvedSpecs(limit=2**20), json.dumps(spec())
    assert cache.get("team/run", "one", text, CLUSTER) is not cache.get("team/run", "two", text, CLUSTER)


def test_all_specs_together_stay_within_the_limit() -> None:
    text = json.dumps(spec())
    cache = ResolvedSpecs(limit=3 * len(text))
    for number in range(10):
        cache.get("team/run", f"uid-{number}", text, CLUSTER)
    assert len(cache) == 3
    kept = cache.get("team/run", "uid-9", text, CLUSTER)
    assert cache.get("team/run", "uid-9", text, CLUSTER) is kept
    assert cache.get("team/run", "uid-0", text, CLUSTER).spec is not None


def test_a_spec_larger_than_the_limit_is_not_kept() -> None:
    cache = ResolvedSpecs(limit=10)
    assert cache.get("team/run", "uid", json.dumps(spec()), CLUSTER).spec is not None
    assert len(cache) == 0
