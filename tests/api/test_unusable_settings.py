"""Settings of pods that cannot work are said with the figures, whoever set them: the run or the administrator."""

from typing import Any

import pytest
from internvl_api.memory.pod_settings import PodSettings
from internvl_api.memory.shortfall import shortfalls
from internvl_api.recipes.resolve import parse_spec, resolve

BIG: dict[str, Any] = {
    "recipe": "internvl2-26b-full",
    "data": {"meta": "/meta.json"},
    "output": "s3://bucket/run",
    "merge": {"formats": ["hf"]},
}
ON_CPU: dict[str, Any] = {
    "model": {"source": "s3://models/tiny"},
    "data": {"train": {"photos": {"annotation": "s3://data/train.jsonl"}}},
    "output": "s3://bucket/run",
}
DISK = {"resources": {"limits": {"ephemeral-storage": "200Gi"}}}


def said(base: dict[str, Any], settings: PodSettings = PodSettings(), **template: Any) -> list[str]:  # noqa: B008
    spec = parse_spec({**base, "podTemplate": template})
    return shortfalls(spec, resolve(spec, job="team/run", job_uid="uid"), settings=settings)


def memory(kind: str, size: str) -> dict[str, Any]:
    return {"resources": {kind: {"memory": size}}}


@pytest.mark.parametrize(
    ("base", "template", "words"),
    [
        pytest.param(
            BIG,
            {"shmSize": "600Gi"} | memory("limits", "500Gi"),
            "found 600Gi, more than spec.podTemplate.resources.limits.memory 500Gi; /dev/shm is memory of the worker, "
            "so that no more than the limit can be used; lower shmSize, or raise the limit",
            id="more than the limit",
        ),
        pytest.param(
            BIG,
            {"shmSize": "400Gi"} | memory("requests", "300Gi"),
            "found 400Gi, more than spec.podTemplate.resources.requests.memory 300Gi; /dev/shm is memory of the "
            "worker, so that a node may have no room for it; lower shmSize, or raise the request",
            id="more than the request",
        ),
        pytest.param(
            BIG,
            {"shmSize": "400Gi"},
            "found 400Gi, more than all memory that a worker requests, about 286.9 GiB: launcher 1.0 + 8 processes",
            id="more than is derived",
        ),
        pytest.param(ON_CPU, {"shmSize": "8Gi"} | memory("limits", "4Gi"), "limits.memory 4Gi", id="on the CPU"),
        pytest.param(BIG, {"shmSize": "64Gi"} | memory("limits", "500Gi"), None, id="a part of the limit"),
        pytest.param(BIG, {"shmSize": "64Gi"}, None, id="a part of what is derived"),
        pytest.param(
            BIG,
            {"shmSize": "400Gi", "resources": {"limits": {"memory": "500Gi"}, "requests": {"memory": "300Gi"}}},
            None,
            id="the limit allows more than the request",
        ),
        pytest.param(ON_CPU, memory("limits", "4Gi"), None, id="the default size is nobody's mistake"),
        pytest.param(ON_CPU, {"shmSize": "64Gi"}, None, id="nothing is known"),
    ],
)
def test_a_shared_memory_larger_than_the_memory_it_is_part_of(
    base: dict[str, Any], template: dict[str, Any], words: str | None
) -> None:
    found = said(base, **template)
    assert len(found) == (words is not None)
    assert words is None or (found[0].startswith("spec.podTemplate.shmSize: ") and words in found[0]), found


def cache(gib: str) -> dict[str, Any]:
    return {"env": [{"name": "INTERNVL_CACHE_GIB", "value": gib}]}


@pytest.mark.parametrize(
    ("base", "settings", "template", "words"),
    [
        pytest.param(
            BIG,
            PodSettings(),
            cache("150") | DISK,
            "found 150.0, the GiB that train keeps in /cache beside 103.0 GiB in use: more than spec.podTemplate."
            "resources.limits.ephemeral-storage 200Gi, so that the volume is full, or the "
            "pod evicted, before the cache makes room; remove the variable, or set it to at most 96",
            id="with a model beside it",
        ),
        pytest.param(ON_CPU, PodSettings(), cache("300") | DISK, "at most 200", id="alone"),
        pytest.param(
            BIG,
            PodSettings(),
            cache("150") | {"resources": {"limits": {"ephemeral-storage": "103Gi"}}},
            "remove the variable, or raise that limit",
            id="no room for any",
        ),
        pytest.param(
            ON_CPU,
            PodSettings(disk="100Gi"),
            cache("300"),
            "scratchSizeLimit 100Gi",
            id="a volume",
        ),
        pytest.param(BIG, PodSettings(), cache("90") | DISK, None, id="it fits"),
        pytest.param(ON_CPU, PodSettings(disk="100Gi", is_cache_of_node=True), cache("300"), None, id="of the node"),
        pytest.param(ON_CPU, PodSettings(), cache("300"), None, id="no limit is known"),
        pytest.param(ON_CPU, PodSettings(), cache("lots") | DISK, None, id="the trainer refuses what is no amount"),
        pytest.param(
            ON_CPU,
            PodSettings(disk="100Gi"),
            cache("300")
            | {
                "volumes": [{"name": "large", "persistentVolumeClaim": {"claimName": "large"}}],
                "volumeMounts": [{"name": "large", "mountPath": "/cache"}],
            },
            None,
            id="on a volume of the run",
        ),
    ],
)
def test_a_cache_that_outgrows_its_disk(
    base: dict[str, Any], settings: PodSettings, template: dict[str, Any], words: str | None
) -> None:
    found = [text for text in said(base, settings, **template) if text.startswith("spec.podTemplate.env ")]
    assert bool(found) == (words is not None)
    assert words is None or words in found[0], found


SMALL_DISK = PodSettings(disk="40Gi")


def test_a_size_limit_of_the_operators_below_what_a_stage_needs() -> None:
    found = said(BIG, SMALL_DISK, **memory("requests", "300Gi"))
    assert len(found) == 2
    assert found[0] == (
        "the operator's setting scratchSizeLimit: found 40Gi, train needs about 47.5 GiB in /cache: weights of the "
        "base model 47.5; set spec.podTemplate.resources.requests.ephemeral-storage to at least that, or raise "
        "the operator's setting scratchSizeLimit"
    )
    assert "train needs about 55.5 GiB in /scratch: checkpoint files 8.0 + exported shards 47.5" in found[1]


@pytest.mark.parametrize(
    ("settings", "template"),
    [
        pytest.param(SMALL_DISK, {}, id="the derived request raises it"),
        pytest.param(
            SMALL_DISK,
            {"resources": {"requests": {"memory": "300Gi", "ephemeral-storage": "110Gi"}}},
            id="the given request raises it",
        ),
        pytest.param(PodSettings(disk="500Gi"), memory("requests", "300Gi"), id="the setting suffices"),
        pytest.param(PodSettings(), memory("requests", "300Gi"), id="the setting is not known"),
    ],
)
def test_a_disk_that_suffices(settings: PodSettings, template: dict[str, Any]) -> None:
    assert said(BIG, settings, **template) == []


def empty(path: str, size: str) -> dict[str, Any]:
    volume = {"name": "own", "emptyDir": {"sizeLimit": size}}
    return {"volumes": [volume], "volumeMounts": [{"name": "own", "mountPath": path}]}


@pytest.mark.parametrize(
    ("path", "needs"),
    [
        pytest.param("/cache", "train needs about 47.5 GiB in /cache: weights of the base model 47.5", id="cache"),
        pytest.param("/scratch", "train needs about 55.5 GiB in /scratch: checkpoint files 8.0 + exp", id="scratch"),
    ],
)
def test_an_empty_dir_of_the_run_that_is_too_small(path: str, needs: str) -> None:
    found = said(BIG, PodSettings(disk="500Gi"), **empty(path, "40Gi"))
    assert found[0].startswith(f"spec.podTemplate.volumes[0].emptyDir.sizeLimit: found 40Gi, {needs}"), found
    assert found[0].endswith("; raise it to at least that")
    assert said(BIG, PodSettings(disk="500Gi"), **empty(path, "120Gi")) == []


def test_a_volume_for_both_is_compared_with_the_sum() -> None:
    both = empty("/cache", "60Gi")
    both["volumeMounts"] = [{"name": "own", "mountPath": path, "subPath": path[1:]} for path in ("/cache", "/scratch")]
    found = said(BIG, PodSettings(disk="500Gi"), **both)
    assert "found 60Gi, train needs about 103.0 GiB in /cache and /scratch: weights of the base model 47.5" in found[0]


def test_a_claim_of_the_pod_that_is_too_small() -> None:
    claim = {"volumeClaimTemplate": {"spec": {"resources": {"requests": {"storage": "10Gi"}}}}}
    found = said(BIG, volumes=[{"name": "own", "ephemeral": claim}], volumeMounts=empty("/cache", "1")["volumeMounts"])
    field = "spec.podTemplate.volumes[0].ephemeral.volumeClaimTemplate.spec.resources.requests.storage"
    assert found[0].startswith(f"{field}: found 10Gi, train needs about 47.5 GiB in /cache"), found


def test_files_in_memory_are_memory() -> None:
    ram = {"volumes": [{"name": "own", "emptyDir": {"medium": "Memory", "sizeLimit": "200Gi"}}]}
    template = {**ram, "volumeMounts": [{"name": "own", "mountPath": "/cache"}], **memory("limits", "300Gi")}
    (found,) = [text for text in said(BIG, **template) if "limits.memory" in text]
    assert "found 300Gi, train needs about 486.9 GiB" in found
    assert "files in /cache 200.0" in found


def shared(**empty_dir: Any) -> dict[str, Any]:
    return {
        "volumes": [{"name": "own", "emptyDir": empty_dir}],
        "volumeMounts": [{"name": "own", "mountPath": "/dev/shm"}],
    }


def test_shared_memory_of_the_run_is_compared_with_the_batches() -> None:
    (found,) = said(BIG, **shared(medium="Memory", sizeLimit="64Mi"))
    assert found.startswith("spec.podTemplate.volumes[0].emptyDir.sizeLimit: found 64Mi, the batches that 32 data"), (
        found
    )
    assert said(BIG, **shared(medium="Memory", sizeLimit="64Gi")) == []
    assert said(BIG, **shared()) == []
    assert said(BIG, **shared(sizeLimit="64Mi"))[0].endswith("raise it, or lower spec.training.dataWorkers")
    assert said(BIG, **shared(sizeLimit="900Gi")) == [], "a disk is no memory"
    assert said(BIG, **shared(medium="Memory", sizeLimit="900Gi"))[0].endswith(
        "; lower sizeLimit, or set spec.podTemplate.resources"
    )


def test_a_large_shared_memory_beside_files_in_memory() -> None:
    ram = {"name": "ram", "emptyDir": {"medium": "Memory", "sizeLimit": "200Gi"}}
    mount = {"name": "ram", "mountPath": "/cache"}
    assert said(BIG, volumes=[ram], volumeMounts=[mount], shmSize="400Gi") == [], "the worker requests 487 GiB"


def test_files_in_memory_count_where_a_stage_has_them() -> None:
    ram = {"name": "ram", "emptyDir": {"medium": "Memory", "sizeLimit": "60Gi"}}
    mount = {"name": "ram", "mountPath": "/cache"}
    few = {"publish": {"limits": {"memory": "8Gi"}}}
    assert said(BIG, volumes=[ram], volumeMounts=[mount], stageResources=few) == []
    few = {"merge": {"limits": {"memory": "8Gi"}}}
    (found,) = said(BIG, volumes=[ram], volumeMounts=[mount], stageResources=few)
    assert "merge needs about" in found
    assert "files in /cache 60.0" in found
    scratch = {"volumes": [ram], "volumeMounts": [mount | {"mountPath": "/scratch"}]}
    found = said(BIG, **scratch, **memory("limits", "300Gi"))
    assert "train needs about 342.5 GiB" in found[0]
    assert "files in /scratch 55.5" in found[0], "what training puts there, not the size of the volume"


def test_the_suggested_cache_fits_every_limit() -> None:
    template = empty("/cache", "60Gi") | DISK
    (found,) = [text for text in said(BIG, **template, **cache("150")) if " train " in text and "env" in text]
    assert found.endswith(
        "sizeLimit 60Gi, so that the volume is full, or the pod evicted, before the cache makes "
        "room; remove the variable, or set it to at most 12"
    )
    assert said(BIG, **template, **cache("12")) == []


def test_a_size_of_shared_memory_that_a_volume_replaces() -> None:
    (found,) = said(BIG, **shared(medium="Memory", sizeLimit="64Gi"), shmSize="64Mi")
    assert found == (
        "spec.podTemplate.shmSize: found 64Mi, but podTemplate.volumeMounts mounts a volume at /dev/shm, which "
        "replaces the one of this size; remove one of them"
    )


def test_a_request_that_sets_the_size_is_said_once() -> None:
    own = {"requests": {"ephemeral-storage": "45Gi"}}
    (found,) = said(BIG, PodSettings(disk="20Gi"), resources=own)
    assert found.startswith("spec.podTemplate.resources.requests.ephemeral-storage: found 45Gi, train needs about 103")
    of_train = [text for text in said(BIG, PodSettings(own, disk="20Gi")) if "train needs" in text]
    field = "the operator's setting workerResources.requests.ephemeral-storage"
    assert [text.partition(": ")[0] for text in of_train] == [field]
    assert of_train[0].endswith(f"; set {field} to at least that, or raise the operator's setting scratchSizeLimit")


def test_stages_without_a_cache_are_not_compared_with_it() -> None:
    template = cache("150") | {"stageResources": {"publish": {"limits": {"ephemeral-storage": "20Gi"}}}}
    assert said(BIG, **template) == []


def test_a_cache_that_outgrows_an_empty_dir_of_the_run() -> None:
    found = said(ON_CPU, PodSettings(disk="500Gi"), **empty("/cache", "120Gi"), **cache("150"))
    assert "more than spec.podTemplate.volumes[0].emptyDir.sizeLimit 120Gi" in found[0]
    assert said(ON_CPU, PodSettings(disk="100Gi"), **empty("/cache", "200Gi"), **cache("150")) == []


def test_a_cache_of_the_node_takes_no_disk_of_the_pod() -> None:
    template = {"resources": {"limits": {"ephemeral-storage": "60Gi"}}}
    assert "found 60Gi, train needs about 103.0 GiB" in said(BIG, **template)[0]
    assert said(BIG, PodSettings(is_cache_of_node=True), **template) == []


def test_a_limit_of_the_administrators_ends_workers_too() -> None:
    """A request that is too small only chooses the node, and users cannot change it."""
    settings = PodSettings(
        workers={"limits": {"memory": "64Gi"}, "requests": {"ephemeral-storage": "110Gi"}},
        others={"requests": {"memory": "1Gi", "ephemeral-storage": "110Gi"}},
    )
    (found,) = said(BIG, settings)
    assert found.startswith("the operator's setting workerResources.limits.memory: found 64Gi, train needs about 286.9")
