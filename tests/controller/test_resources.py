"""The objects we make, as the API server gets them."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from controller.builders import CONFIG, UID, Raw, a_run, spec
from controller.operator_process import Cluster
from internvl_api.constants import ENV_USAGE, OPERATOR_ENV
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_operator.core.operator_config import OperatorConfig, PodDefaults, PodSecurity
from internvl_operator.core.resources import config_map, credentials, network_policy, pods, service
from internvl_operator.core.stages import Stage
from kubernetes.client import ApiException

PVC = {"meta": "pvc://metas/meta.json"}
PREFLIGHT, TRAIN, PUBLISH = Stage("preflight"), Stage("train"), Stage("publish")


def build(stage: Any = TRAIN, rank: int = 0, options: OperatorConfig = CONFIG, attempt: int = 1, **changes: Any) -> Raw:
    return pods.build(a_run(**changes), stage, attempt, rank, options)


def container(pod: Raw) -> Raw:
    (only,) = pod["spec"]["containers"]
    return only  # type: ignore[no-any-return]


def env(pod: Raw) -> dict[str, str]:
    return {item["name"]: item.get("value") for item in container(pod)["env"]}


def mounts(pod: Raw) -> dict[str, Raw]:
    return {mount["mountPath"]: mount for mount in container(pod)["volumeMounts"]}


def volume(pod: Raw, name: str) -> Raw:
    (found,) = [volume for volume in pod["spec"]["volumes"] if volume["name"] == name]
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("stage", "rank", "expected"),
    [
        pytest.param(
            TRAIN,
            2,
            {
                "MASTER_ADDR": "run-train-0.ivft-run",
                "MASTER_PORT": "29500",
                "WORLD_SIZE": "12",
                "RANK": "8",
                "PET_NNODES": "3",
                "PET_NPROC_PER_NODE": "4",
                "PET_NODE_RANK": "2",
                "PET_MASTER_ADDR": "run-train-0.ivft-run",
                "PET_MASTER_PORT": "29500",
                "INTERNVL_ATTEMPT": "5",
                "INTERNVL_JOB_UID": UID,
                "INTERNVL_ADOPTED_UIDS": "",
                "HOME": "/scratch",
                "TMPDIR": "/scratch",
            },
            id="third-worker-of-three-with-four-gpus",
        ),
        pytest.param(
            PREFLIGHT,
            0,
            {"WORLD_SIZE": "1", "RANK": "0", "PET_NNODES": "1", "PET_NPROC_PER_NODE": "1"},
            id="a-cpu-stage-is-alone",
        ),
    ],
)
def test_rendezvous(stage: Any, rank: int, expected: dict[str, str]) -> None:
    pod = build(stage, rank, attempt=5, workers=3, gpusPerWorker=4, training={"globalBatchSize": 12})
    assert env(pod).items() >= expected.items()
    assert pod["spec"]["hostname"] == pod["metadata"]["name"]
    assert pod["spec"]["subdomain"] == "ivft-run"


@pytest.mark.parametrize(
    ("stage", "gpus", "limits"),
    [
        pytest.param(PREFLIGHT, 8, None, id="preflight-holds-no-gpu"),
        pytest.param(TRAIN, 8, {"nvidia.com/gpu": "8"}, id="training-asks-for-its-gpus"),
        pytest.param(TRAIN, 0, None, id="training-on-the-cpu"),
        pytest.param(PUBLISH, 8, None, id="publish-holds-no-gpu"),
    ],
)
def test_gpus(stage: Any, gpus: int, limits: Raw | None) -> None:
    pod = build(stage, gpusPerWorker=gpus, workers=1)
    assert container(pod)["resources"].get("limits") == limits


@pytest.mark.parametrize(("own", "default", "expected"), [
    (None, "amd.com/gpu", "amd.com/gpu"),
    ("nvidia.com/mig-3g.40gb", "amd.com/gpu", "nvidia.com/mig-3g.40gb"),
])  # fmt: skip
def test_gpus_have_the_name_that_run_or_operator_gives_them(own: str | None, default: str, expected: str) -> None:
    template = {"gpuResource": own, "resources": {"limits": {"nvidia.com/gpu": 1, expected: 1, "memory": "64Gi"}}}
    pod = build(workers=1, gpusPerWorker=4, podTemplate=template, options=OperatorConfig(gpu_resource=default))
    assert pod["spec"]["containers"][0]["resources"] == {"limits": {"memory": "64Gi", expected: "4"}}


def test_gpus_by_a_claim_are_asked_for_once() -> None:
    resources = {"limits": {"nvidia.com/gpu": 2, "memory": "64Gi"}}
    template = {"gpuClaimTemplate": "two-gpus", "resources": resources}
    pod = build(workers=1, gpusPerWorker=2, podTemplate=template)["spec"]
    assert pod["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": "two-gpus"}]
    assert pod["containers"][0]["resources"] == {"limits": {"memory": "64Gi"}, "claims": [{"name": "gpus"}]}
    publish = build(PUBLISH, workers=1, gpusPerWorker=2, podTemplate=template)["spec"]
    assert "resourceClaims" not in publish
    assert "claims" not in publish["containers"][0]["resources"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"gpusPerWorker": 2, "podTemplate": {"gpuResource": "amd.com/gpu"}}, "but gpuResource is set too; remove one"),
        ({"gpusPerWorker": 0}, "but spec.gpusPerWorker is 0"),
    ],
)
def test_a_claim_that_gives_no_gpu_is_refused(changes: Raw, found: str) -> None:
    template = {"gpuClaimTemplate": "two-gpus", **changes.get("podTemplate", {})}
    (violation,) = check_spec(spec(**(changes | {"podTemplate": template})), InCluster()).violations
    assert violation.field == "spec.podTemplate.gpuClaimTemplate"
    assert found in violation.message


@pytest.mark.parametrize(("stage", "gpus", "own", "default", "expected"), [
    pytest.param(TRAIN, 8, {"pool": "cpu"}, {"zone": "cpu"}, {"pool": "gpu", "zone": "gpu"}, id="with-gpus"),
    pytest.param(PREFLIGHT, 8, {"pool": "cpu"}, {"zone": "cpu"}, {"pool": "cpu", "zone": "cpu"}, id="without-gpus"),
    pytest.param(TRAIN, 0, {"pool": "cpu"}, {"zone": "cpu"}, {"pool": "cpu", "zone": "cpu"}, id="training-on-the-cpu"),
    pytest.param(PREFLIGHT, 8, {}, None, {"zone": "gpu"}, id="any-node"),
    pytest.param(PREFLIGHT, 8, None, None, {"pool": "gpu", "zone": "gpu"}, id="the-same-nodes"),
])  # fmt: skip
def test_stages_without_gpus_leave_the_nodes_with_gpus_alone(
    stage: Any, gpus: int, own: Raw | None, default: Raw | None, expected: Raw
) -> None:
    defaults = PodDefaults.model_validate({"nodeSelector": {"zone": "gpu"}, "cpuNodeSelector": default})
    template = {"nodeSelector": {"pool": "gpu"}, "cpuNodeSelector": own}
    pod = build(
        stage, workers=1, gpusPerWorker=gpus, podTemplate=template, options=OperatorConfig(pod_defaults=defaults)
    )
    assert pod["spec"]["nodeSelector"] == expected


def test_gpus_per_worker_wins_over_the_pod_templates_own() -> None:
    resources = {"limits": {"nvidia.com/gpu": 1, "memory": "64Gi"}, "requests": {"nvidia.com/gpu": 1, "cpu": "8"}}
    pod = build(workers=1, gpusPerWorker=4, podTemplate={"resources": resources})
    assert container(pod)["resources"] == {
        "limits": {"memory": "64Gi", "nvidia.com/gpu": "4"},
        "requests": {"cpu": "8"},
    }


def test_resources_of_the_pod_template_are_only_for_training() -> None:
    resources = {"requests": {"memory": "500Gi"}}
    assert container(build(podTemplate={"resources": resources}))["resources"] == resources
    assert container(build(PREFLIGHT, podTemplate={"resources": resources}))["resources"] == CONFIG.stage_resources
    assert container(build())["resources"] == CONFIG.worker_resources


def test_a_pod_is_locked_down() -> None:
    pod = build()
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["restartPolicy"] == "Never"
    security = pod["spec"]["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 10001)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(pod)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_where_things_are_mounted() -> None:
    pod = build(podTemplate={"shmSize": "256Mi"})
    assert mounts(pod).keys() == {"/etc/internvl", "/scratch", "/cache", "/dev/shm"}
    assert mounts(pod)["/etc/internvl"]["readOnly"] is True
    assert volume(pod, "config")["configMap"] == {"name": "ivft-run"}
    assert volume(pod, "shm")["emptyDir"] == {"medium": "Memory", "sizeLimit": "256Mi"}


@pytest.mark.parametrize(
    ("resources", "size"),
    [
        pytest.param({}, "500Gi", id="the-operators-setting"),
        pytest.param({"limits": {"ephemeral-storage": "80Gi"}}, "80Gi", id="the-containers-limit"),
        pytest.param({"requests": {"ephemeral-storage": "80Gi"}}, "500Gi", id="a-request-is-no-limit"),
        pytest.param({"requests": {"ephemeral-storage": "2Ti"}}, "2Ti", id="what-is-requested-may-be-used"),
        pytest.param({"requests": {"ephemeral-storage": "1e9"}}, "500Gi", id="notation-of-the-api-server"),
        pytest.param({"limits": {"ephemeral-storage": 10**12}}, str(10**12), id="a-number"),
    ],
)
def test_every_empty_dir_has_a_size_limit(resources: Raw, size: str) -> None:
    for pod in (
        build(podTemplate={"resources": resources}),
        build(PREFLIGHT, options=OperatorConfig(stage_resources=resources)),
    ):
        disks = {each["name"]: each["emptyDir"] for each in pod["spec"]["volumes"] if "emptyDir" in each}
        limits = {"scratch": {"sizeLimit": size}, "cache": {"sizeLimit": size}}
        assert disks == limits | {"shm": {"medium": "Memory", "sizeLimit": "8Gi"}}
    assert volume(build(options=OperatorConfig(scratch_size_limit="1Ti")), "scratch")["emptyDir"] == {
        "sizeLimit": "1Ti"
    }


@pytest.mark.parametrize(
    "identity",
    [
        pytest.param({}, id="left-to-an-admission-controller"),
        pytest.param({"runAsUser": 1000660000, "fsGroup": 0}, id="another"),
    ],
)
def test_the_identity_of_pods_is_the_administrators(identity: dict[str, int]) -> None:
    pod = build(options=OperatorConfig(pod_security=PodSecurity.model_validate(identity)))
    assert pod["spec"]["securityContext"] == identity | {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert env(pod)["USER"] == "internvl", "getpass.getuser() fails for a uid without a name"


@pytest.mark.integration
@pytest.mark.parametrize(
    "options", [OperatorConfig(), OperatorConfig(pod_security=PodSecurity())], ids=["default", "left-out"]
)
def test_pods_meet_the_restricted_pod_security_standard(cluster_of_test: Cluster, options: OperatorConfig) -> None:
    core, namespace = cluster_of_test.core, cluster_of_test.namespace
    core.patch_namespace(namespace, {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}})
    for stage in get_args(StageName):
        template = {"gpuClaimTemplate": "two-gpus"}
        pod = build(Stage(stage), options=options, data=PVC, gpusPerWorker=2, podTemplate=template)
        del pod["metadata"]["ownerReferences"], pod["metadata"]["namespace"]
        core.create_namespaced_pod(namespace, pod, dry_run="All")
    pod["spec"]["securityContext"]["runAsNonRoot"] = False
    with pytest.raises(ApiException, match=r"violates PodSecurity .*restricted:latest"):
        core.create_namespaced_pod(namespace, pod, dry_run="All")


def test_a_cache_shared_by_the_pods_of_a_node() -> None:
    pod = build(options=OperatorConfig(cache_host_path="/mnt/nvme"))
    assert volume(pod, "cache")["hostPath"] == {"path": "/mnt/nvme", "type": "DirectoryOrCreate"}
    assert mounts(pod)["/cache"]["subPath"] == "team", "a namespace sees its own entries only"
    assert "subPath" not in mounts(build())["/cache"]


def test_claims_named_in_sources_are_mounted_read_only_once_each() -> None:
    data = {
        "train": {
            "a": {"annotation": "pvc://photos.2024/a.jsonl", "root": "pvc://photos.2024/a"},
            "b": {"annotation": "s3://data/b.jsonl", "root": "pvc://media/"},
        },
        "meta": "pvc://metas/meta.json",
    }
    pod = build(data=data, model={"source": "pvc://models/base"})
    assert mounts(pod).keys() > {"/pvc/photos.2024", "/pvc/media", "/pvc/metas", "/pvc/models"}
    for claim in ("photos.2024", "media", "metas", "models"):
        mount = mounts(pod)[f"/pvc/{claim}"]
        assert mount["readOnly"] is True
        source = volume(pod, mount["name"])["persistentVolumeClaim"]
        assert source == {"claimName": claim, "readOnly": True}
    assert len(pod["spec"]["volumes"]) == 4 + 4


TEMPLATE = {
    "image": "mine:1",
    "nodeSelector": {"gpu": "a100"},
    "tolerations": [{"key": "gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "serviceAccountName": "trainer",
    "runtimeClassName": "nvidia",
    "imagePullSecrets": [{"name": "pull"}],
    "terminationGracePeriodSeconds": 300,
}


def test_the_pod_template_is_taken_over() -> None:
    pod = build(podTemplate=TEMPLATE)
    spec = pod["spec"]
    for key in TEMPLATE.keys() - {"image", "tolerations"}:
        assert spec[key] == TEMPLATE[key], key
    assert container(pod)["image"] == "mine:1"
    assert spec["tolerations"][0] == {"key": "gpu", "operator": "Exists"}


def test_users_labels_annotations_and_environment_do_not_replace_ours() -> None:
    pod = build(
        podTemplate={
            "labels": {"team": "a", "internvl.dev/attempt": "99", "app.kubernetes.io/managed-by": "me"},
            "annotations": {"note": "b", "internvl.dev/run-digest": "forged"},
            "env": [
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "NCCL_DEBUG", "value": "WARN"},
                {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
            ],
        }
    )
    labels, annotations = pod["metadata"]["labels"], pod["metadata"]["annotations"]
    assert labels["team"] == "a"
    assert labels["internvl.dev/attempt"] == "1"
    assert labels["app.kubernetes.io/managed-by"] == "internvl-operator"
    assert annotations["note"] == "b"
    assert annotations["internvl.dev/run-digest"] == a_run().run_digest
    names = [item["name"] for item in container(pod)["env"]]
    assert len(names) == len(set(names))
    assert env(pod)["NCCL_DEBUG"] == "WARN"
    assert {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}} in container(pod)["env"]


def test_the_variables_that_a_spec_cannot_set_are_those_of_every_pod() -> None:
    """A run may set those of credentials itself; ENV_USAGE is there where usage is known."""
    of_secrets = {item["name"] for item in credentials.env(a_run(), Stage("train"))}
    assert set(env(build())) - of_secrets == set(OPERATOR_ENV) - {ENV_USAGE}


def test_users_mounts_may_replace_the_cache() -> None:
    template = {
        "volumes": [{"name": "fast", "persistentVolumeClaim": {"claimName": "fast"}}],
        "volumeMounts": [{"name": "fast", "mountPath": "/cache"}],
    }
    pod = build(podTemplate=template)
    assert mounts(pod)["/cache"]["name"] == "fast"
    assert volume(pod, "fast") == template["volumes"][0]


@pytest.mark.parametrize(
    ("tolerations", "seconds"),
    [
        pytest.param([], 30, id="a-lost-node-is-given-up-soon"),
        pytest.param(
            [{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "tolerationSeconds": 900}],
            900,
            id="unless-the-user-says-otherwise",
        ),
    ],
)
def test_how_long_a_lost_node_is_tolerated(tolerations: list[Raw], seconds: int) -> None:
    pod = build(podTemplate={"tolerations": tolerations})
    (found,) = [t for t in pod["spec"]["tolerations"] if t["key"] == "node.kubernetes.io/unreachable"]
    assert found["tolerationSeconds"] == seconds


def test_prometheus_finds_every_worker() -> None:
    annotations = build(rank=1)["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == "9400"
    assert container(build())["ports"] == [{"name": "metrics", "containerPort": 9400, "protocol": "TCP"}]


def test_the_configuration_is_what_a_stage_reads(tmp_path: Path) -> None:
    made = config_map.build(a_run(), a_run().resolved.run_yaml, CONFIG)
    file = tmp_path / "run.yaml"
    file.write_text(made["data"]["run.yaml"])
    run = RunConfig.load(file)
    assert (run.job, run.job_uid, run.workers) == ("team/run", UID, 2)
    assert "s3-credentials" not in made["data"]["run.yaml"]
    assert container(build())["command"] == ["internvl-trainer", "train", "--config", "/etc/internvl/run.yaml"]


def test_the_service_gives_names_to_members_that_are_not_ready_yet() -> None:
    made = service.build(a_run())
    assert made["spec"]["clusterIP"] == "None"
    assert made["spec"]["publishNotReadyAddresses"] is True
    assert made["spec"]["selector"].items() <= build()["metadata"]["labels"].items()


@pytest.mark.parametrize(
    "child",
    [config_map.build(a_run(), a_run().resolved.run_yaml, CONFIG), service.build(a_run()), build()],
    ids=lambda c: c["kind"],
)
def test_every_child_goes_with_its_run_and_is_found_by_label(child: Raw) -> None:
    (reference,) = child["metadata"]["ownerReferences"]
    assert (reference["uid"], reference["controller"], reference["blockOwnerDeletion"]) == (UID, True, False)
    assert child["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "internvl-operator"
    assert child["metadata"]["labels"]["internvl.dev/job"] == "run"
    assert yaml.safe_load(yaml.safe_dump(child)) == child  # plain data, ready for the wire


PROMETHEUS = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}


def test_only_its_own_group_and_the_peers_reach_a_run() -> None:
    config = OperatorConfig(network_policy_peers=(PROMETHEUS,))
    (policy,) = network_policy.build(a_run(gpusPerWorker=4), config)
    own = {"podSelector": {"matchLabels": {"internvl.dev/job-uid": UID}}}
    assert policy["metadata"]["name"] == "ivft-run"
    assert policy["metadata"]["ownerReferences"][0]["uid"] == UID
    assert policy["spec"] == own | {
        "policyTypes": ["Ingress"],
        "ingress": [
            {"from": [own]},
            {"from": [PROMETHEUS], "ports": [{"protocol": "TCP", "port": 9400, "endPort": 9403}]},
        ],
    }
    assert own["podSelector"]["matchLabels"].items() <= build()["metadata"]["labels"].items()


def test_without_peers_no_rule_admits_everybody() -> None:
    (policy,) = network_policy.build(a_run(), OperatorConfig(network_policy_peers=()))
    assert [list(rule) for rule in policy["spec"]["ingress"]] == [["from"]]


def test_no_network_policy_unless_the_operator_has_them() -> None:
    assert network_policy.build(a_run(), OperatorConfig()) == []


def test_every_pod_gets_the_administrators_defaults_beside_the_runs_own() -> None:
    defaults = {
        "nodeSelector": {"pool": "ml"},
        "tolerations": [{"key": "ml", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "registry"}, {"name": "mirror"}],
        "securityContext": {"runAsUser": 2000, "supplementalGroups": [7]},
    }
    options = OperatorConfig(pod_defaults=PodDefaults.model_validate(defaults))
    own = {
        "nodeSelector": {"pool": "theirs", "gpu": "a100"},
        "tolerations": [{"key": "spot", "operator": "Exists"}],
        "imagePullSecrets": [{"name": "registry"}],
    }
    for stage in (PREFLIGHT, TRAIN):
        spec = build(stage, options=options, podTemplate=own)["spec"]
        assert spec["nodeSelector"] == {"pool": "ml", "gpu": "a100"}
        assert [each["key"] for each in spec["tolerations"][:2]] == ["spot", "ml"]
        assert spec["imagePullSecrets"] == [{"name": "registry"}, {"name": "mirror"}]
        assert spec["securityContext"] == {
            "runAsNonRoot": True,
            "runAsUser": 2000,
            "runAsGroup": 10001,
            "fsGroup": 10001,
            "supplementalGroups": [7],
            "seccompProfile": {"type": "RuntimeDefault"},
        }


def test_the_administrators_toleration_of_a_lost_node_replaces_ours() -> None:
    unreachable = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    options = OperatorConfig(pod_defaults=PodDefaults(tolerations=(unreachable | {"tolerationSeconds": 7},)))
    found = [t for t in build(options=options)["spec"]["tolerations"] if t["key"] == unreachable["key"]]
    assert [each["tolerationSeconds"] for each in found] == [7]
