"""The parts of podTemplate and of training.deepspeed: what is right stays as it was written, what is wrong is named."""

from typing import Any

import pytest
from api.test_wrong_resources import RIGHT
from controller.builders import CONFIG, a_run
from crd_evaluator import SCHEMA, schema_errors
from internvl_api.spec import InternVLFineTuneSpec
from internvl_api.spec.kubernetes.volumes import VOLUME_KINDS
from internvl_api.validation.check import check_spec
from internvl_operator.core.resources import pods
from internvl_operator.core.stages import Stage

Raw = dict[str, Any]

SELECTOR = {"matchLabels": {"app": "run"}, "matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
POD_TERM = {
    "topologyKey": "kubernetes.io/hostname", "labelSelector": SELECTOR, "namespaces": ["team-a"],
    "namespaceSelector": {}, "matchLabelKeys": ["run"],
}  # fmt: skip
NODE_TERM = {
    "matchExpressions": [{"key": "gpu", "operator": "Gt", "values": ["4"]}],
    "matchFields": [{"key": "metadata.name", "operator": "In", "values": ["node-1"]}],
}
FILES = [{"key": "ca.crt", "path": "certs/ca.crt", "mode": 292}]
FIELDS = [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]
CLAIM = {
    "metadata": {"labels": {"team": "a"}, "annotations": {"cost-centre": "7"}},
    "spec": {
        "accessModes": ["ReadWriteOnce"], "storageClassName": "fast", "volumeMode": "Filesystem", "selector": SELECTOR,
        "resources": {"requests": {"storage": "100Gi"}},
        "dataSource": {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "coco"},
    },
}  # fmt: skip
SOURCES: list[Raw] = [
    {"serviceAccountToken": {"audience": "vault", "expirationSeconds": 3600, "path": "token"}},
    {"configMap": {"name": "certs", "items": FILES, "optional": True}},
    {"secret": {"name": "certs"}},
    {"downwardAPI": {"items": FIELDS}},
    {"clusterTrustBundle": {"name": "internal", "path": "internal.pem"}},
]
KINDS: dict[str, Raw] = {
    "emptyDir": {"medium": "Memory", "sizeLimit": "1.5Gi"},
    "persistentVolumeClaim": {"claimName": "data", "readOnly": True},
    "configMap": {"name": "certs", "items": FILES, "defaultMode": 420, "optional": False},
    "secret": {"secretName": "certs", "items": FILES},
    "projected": {"sources": SOURCES, "defaultMode": 256},
    "downwardAPI": {"items": FIELDS},
    "csi": {"driver": "files.example.org", "volumeAttributes": {"share": "a"}, "nodePublishSecretRef": {"name": "x"}},
    "ephemeral": {"volumeClaimTemplate": CLAIM},
    "hostPath": {"path": "/data", "type": "Directory"},
    "nfs": {"server": "files.example.org", "path": "/data", "readOnly": True},
    "image": {"reference": "registry.example.org/coco:1", "pullPolicy": "IfNotPresent"},
}
TEMPLATE: Raw = {
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": ""}, {"tolerationSeconds": 9}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [NODE_TERM]},
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": NODE_TERM}],
        },
        "podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [POD_TERM]},
        "podAntiAffinity": {
            "preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": POD_TERM}]
        },
    },
    "resources": {"requests": {"cpu": 2, "memory": "1e9"}, "limits": {"example.com/nic": "1"}},
    "imagePullSecrets": [{"name": "registry"}],
    "volumes": [{"name": kind.lower(), kind: source} for kind, source in KINDS.items()],
    "volumeMounts": [
        {"name": kind.lower(), "mountPath": f"/mnt/{kind}", "subPath": "a", "mountPropagation": "None"}
        for kind in KINDS
    ],
    "env": [
        {"name": "A", "value": ""},
        {"name": "B"},
        {"name": "C", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}},
        {"name": "D", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "k"}}},
        {"name": "E", "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "spec.nodeName"}}},
        {"name": "F", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
    ],
}  # fmt: skip
DEEPSPEED: Raw = {
    "gradient_clipping": 0.5,
    "zero_optimization": {
        "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch/nvme", "ratio": 0.5},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "stage3_param_persistence_threshold": 10_000,
        "overlap_comm": False,
    },
    "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
}


def test_what_is_right_stays_as_it_was_written() -> None:
    raw = RIGHT | {"podTemplate": TEMPLATE, "training": {"deepspeed": DEEPSPEED}}
    assert set(KINDS) == set(VOLUME_KINDS)
    assert schema_errors(raw) == []
    assert check_spec(raw).violations == ()
    dumped = InternVLFineTuneSpec.model_validate(raw).model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert (dumped["podTemplate"], dumped["training"]) == (TEMPLATE, {"deepspeed": DEEPSPEED})


def test_a_pod_has_the_parts_as_they_were_written() -> None:
    pod = pods.build(a_run(podTemplate=TEMPLATE), Stage("train"), 1, 0, CONFIG)["spec"]
    (container,) = pod["containers"]
    assert pod["affinity"] == TEMPLATE["affinity"]
    assert pod["imagePullSecrets"] == TEMPLATE["imagePullSecrets"]
    assert pod["tolerations"][: len(TEMPLATE["tolerations"])] == TEMPLATE["tolerations"]
    assert pod["volumes"][-len(KINDS) :] == TEMPLATE["volumes"]
    assert container["volumeMounts"][-len(KINDS) :] == TEMPLATE["volumeMounts"]
    assert container["resources"] == TEMPLATE["resources"]
    for variable in TEMPLATE["env"]:
        assert variable in container["env"]


def nested(levels: int) -> Raw:
    value: Raw = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("changes", "field", "message"),
    [
        pytest.param(
            {"podTemplate": {"volumes": [{"name": "x", "iscsi": {"lun": 1}}]}},
            "spec.podTemplate.volumes[0].iscsi", "unknown field", id="a volume of an unknown kind",
        ),
        pytest.param(
            {"podTemplate": {"volumes": [{"name": "x", "secret": {"secretname": "s"}}]}},
            "spec.podTemplate.volumes[0].secret.secretname", "unknown field (did you mean 'secretName'?)",
            id="a field far inside",
        ),
        pytest.param(
            {"podTemplate": {"env": [{"name": "A", "value": 5}]}},
            "spec.podTemplate.env[0].value", "invalid value (not shown", id="what may be a secret",
        ),
        pytest.param(
            {"podTemplate": {"resources": {"limits": {"cpu": 0.5}}}},
            "spec.podTemplate.resources.limits.cpu", "found '0.5', expected a quantity from 0 to below 8Ei, such as 8",
            id="a fraction of a core",
        ),
        pytest.param(
            {"training": {"deepspeed": {"zero_optimization": {"offload_param": nested(20)}}}},
            "spec.training.deepspeed.zero_optimization.offload_param.a", "unknown field", id="depth within the limit",
        ),
        pytest.param(
            {"zero_optimization": {}},
            "spec.zero_optimization", "unknown field (did you mean spec.training.deepspeed.zero_optimization?)",
            id="settings of DeepSpeed in the wrong place",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changes: Raw, field: str, message: str) -> None:
    first = check_spec(RIGHT | changes).violations[0]
    assert first.field == field
    assert first.message.startswith(message)


def test_every_part_of_a_pod_explains_itself() -> None:
    """`kubectl explain` shows these; the walk over the whole schema is in test_crd.py."""
    volume = SCHEMA["properties"]["podTemplate"]["properties"]["volumes"]["items"]
    assert volume["description"] == "A volume of the pods, of exactly one kind."
    assert volume["properties"]["nfs"]["description"] == "Folder of an NFS server"
    assert volume["properties"]["nfs"]["required"] == ["server", "path"]
