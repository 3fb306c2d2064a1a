"""The administrator's policy: what each setting refuses, in Python and in the CEL of the ValidatingAdmissionPolicy."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from crd_evaluator import evaluate
from internvl_api.admission_policy import build_admission_policy
from internvl_api.constants import PLURAL
from internvl_api.crd import spec_schema
from internvl_api.spec import InternVLFineTuneSpec, PodTemplate
from internvl_api.types import SOURCE_PATTERN
from internvl_api.validation.check import check_spec
from internvl_api.validation.cluster import InCluster
from internvl_api.validation.policy import Policy
from internvl_api.validation.policy_rules import RULES
from ivft_cluster.paths import CHECKOUT
from pydantic import ValidationError

Raw = dict[str, Any]
BUILT = build_admission_policy()
BASE = {"model": {"source": "s3://models/tiny"}, "output": "s3://out/run"}
BASE["data"] = {"train": {"pets": {"annotation": "s3://data/pets.jsonl"}}}


def pods(**template: Any) -> Raw:
    return {"podTemplate": template}


def volume(**parts: Any) -> Raw:
    return pods(volumes=[{"name": "data", **parts}])


def projected(**source: Any) -> Raw:
    return volume(projected={"sources": [{"configMap": {"name": "words"}}, source]})


def node(key: str, operator: str = "Exists", *, preferred: bool = False) -> Raw:
    term = {"matchExpressions": [{"key": "gpu", "operator": "Exists"}, {"key": key, "operator": operator}]}
    affinity: Raw = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    if preferred:
        affinity = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "preference": term}]}
    return pods(affinity={"nodeAffinity": affinity})


def beside(*, preferred: bool = False, kind: str = "podAntiAffinity", **term: Any) -> Raw:
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {}, **term}
    if preferred:
        affinity: Raw = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": term}]}
    else:
        affinity = {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    return pods(affinity={kind: affinity})


def tolerating(**toleration: Any) -> Raw:
    return pods(tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists"}, toleration])


def env(secret: str) -> Raw:
    return pods(env=[{"name": "A", "valueFrom": {"secretKeyRef": {"name": secret, "key": "a"}}}, {"name": "B"}])


def cloned(**source: Any) -> Raw:
    return volume(ephemeral={"volumeClaimTemplate": {"spec": source}})


def data(section: str = "train", name: str = "pets", **parts: Any) -> Raw:
    return {"data": {section: {name: {"annotation": "s3://data/pets.jsonl", **parts}}}}


def claim(**metadata: Any) -> Raw:
    return volume(ephemeral={"volumeClaimTemplate": {"metadata": metadata, "spec": {}}})


ROLE = "node-role.kubernetes.io/control-plane"
LISTED = Policy(
    volume_types=("*", "hostPath"), images=("registry.example.org/team/", "a.example/trainer:1", "b.example/trainer@"),
    service_accounts=("trainer",), priority_classes=("system-node-critical",), labels=("app.kubernetes.io/",),
    annotations=("sidecar.istio.io/inject",), node_labels=("node-role.kubernetes.io/gpu",), tolerations=("(all)",),
    secrets=("s3-credentials",), runtime_classes=("gvisor",), affinity_namespaces=("shared",),
    claims=("data", "team:"), queues=("team-a",), schedulers=("bin-packing",),
    network_profiles=("host",),
)  # fmt: skip
NOTHING = Policy.model_validate({rule.setting: [] for rule in RULES})
DEFAULT = Policy()

ALLOWED = [
    pytest.param(pods(), DEFAULT, id="nothing asked"),
    pytest.param(pods(), NOTHING, id="nothing asked, nothing allowed"),
    pytest.param(volume(emptyDir={}), DEFAULT, id="emptyDir"),
    pytest.param(volume(persistentVolumeClaim={"claimName": "data"}), DEFAULT, id="claim"),
    pytest.param(volume(ephemeral={"volumeClaimTemplate": {}}), DEFAULT, id="ephemeral"),
    pytest.param(projected(downwardAPI={"items": []}), DEFAULT, id="projected"),
    pytest.param(volume(hostPath={"path": "/data"}), LISTED, id="hostPath listed"),
    pytest.param(volume(csi={"driver": "any.example.org"}), LISTED, id="csi under *"),
    pytest.param(pods(image="nginx"), DEFAULT, id="any image"),
    pytest.param(pods(image="registry.example.org/team/trainer:2"), LISTED, id="image below a prefix"),
    pytest.param(pods(image="a.example/trainer:1"), LISTED, id="whole image"),
    pytest.param(pods(image="b.example/trainer@sha256:00"), LISTED, id="image by digest"),
    pytest.param(pods(serviceAccountName="default"), DEFAULT, id="default account"),
    pytest.param(pods(serviceAccountName="trainer"), LISTED, id="account listed"),
    pytest.param(pods(priorityClassName="batch"), DEFAULT, id="priority"),
    pytest.param(pods(priorityClassName="system-node-critical"), LISTED, id="system priority listed"),
    pytest.param(pods(labels={"team": "a", "kueue.x-k8s.io/priority-class": "high"}), DEFAULT, id="labels"),
    pytest.param(pods(labels={"app.kubernetes.io/part-of": "a"}), LISTED, id="label's domain listed"),
    pytest.param(pods(annotations={"note": "a"}), DEFAULT, id="annotation"),
    pytest.param(claim(labels={"team": "a"}, annotations={"note": "a"}), DEFAULT, id="a claim's label and annotation"),
    pytest.param(pods(annotations={"sidecar.istio.io/inject": "false"}), LISTED, id="annotation listed"),
    pytest.param(pods(nodeSelector={"nvidia.com/gpu.product": "A100"}), DEFAULT, id="node"),
    pytest.param(node(ROLE, "DoesNotExist"), DEFAULT, id="away from the control plane"),
    pytest.param(node("zone"), DEFAULT, id="affinity"),
    pytest.param(pods(runtimeClassName="nvidia"), DEFAULT, id="runtime class"),
    pytest.param(beside(), DEFAULT, id="apart from its own namespace's pods"),
    pytest.param(beside(kind="podAffinity", preferred=True), DEFAULT, id="near its own namespace's pods"),
    pytest.param(beside(namespaces=["shared"]), LISTED, id="namespace listed"),
    pytest.param(tolerating(key="spot", operator="Exists"), DEFAULT, id="toleration"),
    pytest.param(pods(tolerations=[{"operator": "Exists"}]), LISTED, id="every taint listed"),
    pytest.param(env("token") | {"secrets": {"huggingFace": "hf"}}, DEFAULT, id="any Secret"),
    pytest.param(env("s3-credentials"), LISTED, id="Secret listed"),
    pytest.param({"scheduling": {"gang": "kueue", "queue": "any"}}, DEFAULT, id="any queue"),
    pytest.param({"scheduling": {"gang": "volcano", "queue": "team-a"}}, LISTED, id="queue listed"),
    pytest.param({"scheduling": {"schedulerName": "bin-packing"}}, LISTED, id="scheduler listed"),
    pytest.param({"scheduling": {"gang": "volcano"}}, NOTHING, id="no queue and no scheduler asked for"),
    pytest.param({"model": {"source": "pvc://any"}} | data(root="pvc://data"), DEFAULT, id="any claim"),
    pytest.param({"model": {"source": "pvc://data/tiny"}} | data(root="pvc://data"), LISTED, id="claim listed"),
    pytest.param(data(root="s3://bucket/pvc://theirs/x"), LISTED, id="no claim in an address of another kind"),
    pytest.param({"network": {"profile": "infiniband"}}, DEFAULT, id="network profile"),
    pytest.param({"network": {"profile": "host"}}, LISTED, id="network of the node listed"),
    pytest.param({"network": {"profile": "none"}}, NOTHING, id="the pod network by its name"),
]  # fmt: skip
REFUSED = [
    pytest.param(volume(hostPath={"path": "/"}), DEFAULT, "VolumeType", "hostPath", id="hostPath"),
    pytest.param({"network": {"profile": "host"}}, DEFAULT, "NetworkProfile", "host", id="network of the node"),
    pytest.param(
        pods(annotations={"kueue.x-k8s.io/queue-name": "theirs"}), Policy(queues=("ours",)), "Queue", "theirs",
        id="queue of an annotation",
    ),
    pytest.param({"network": {"profile": "roce"}}, NOTHING, "NetworkProfile", "roce", id="no network profile"),
    pytest.param(volume(hostPath={}), Policy(volume_types=("*",)), "VolumeType", "hostPath", id="hostPath under *"),
    pytest.param(volume(csi={"driver": "secrets-store.csi.k8s.io"}), DEFAULT, "VolumeType", "csi", id="csi"),
    pytest.param(volume(nfs={"server": "a", "path": "/"}), DEFAULT, "VolumeType", "nfs", id="nfs"),
    pytest.param(volume(image={"reference": "a"}), DEFAULT, "VolumeType", "image", id="image volume"),
    pytest.param(volume(newInKubernetes={}), DEFAULT, "VolumeType", "newInKubernetes", id="a type of later"),
    pytest.param(volume(emptyDir={}, hostPath={}), DEFAULT, "VolumeType", "hostPath", id="two types at once"),
    pytest.param(
        projected(serviceAccountToken={"audience": "vault", "path": "token"}), DEFAULT, "VolumeType",
        "serviceAccountToken", id="token for an audience",
    ),
    pytest.param(projected(podCertificate={}), DEFAULT, "VolumeType", "podCertificate", id="certificate of a pod"),
    pytest.param(
        pods(volumes=[{"name": "a", "nfs": {}}, {"name": "b", "emptyDir": {}}, {"name": "c", "hostPath": {}}]), DEFAULT,
        "VolumeType", "nfs, hostPath", id="several volumes",
    ),
    pytest.param(volume(emptyDir={}), NOTHING, "VolumeType", "emptyDir", id="no volume at all"),
    pytest.param(pods(image="registry.example.org/other/x"), LISTED, "Image", "registry.example.org/other/x", id="im"),
    pytest.param(
        pods(image="registry.example.org.evil.example/team/x"), LISTED, "Image",
        "registry.example.org.evil.example/team/x", id="a registry that begins alike",
    ),
    pytest.param(pods(image="a.example/trainer:1.x"), LISTED, "Image", "a.example/trainer:1.x", id="begins alike"),
    pytest.param(volume(image={"reference": "evil"}), LISTED, "Image", "evil", id="image of a volume"),
    pytest.param(claim(labels={"a.b/c": "x"}), DEFAULT, "Label", "a.b/c", id="label of a claim"),
    pytest.param(claim(annotations={"a.b/c": "x"}), DEFAULT, "Annotation", "a.b/c", id="annotation of a claim"),
    pytest.param(pods(image="a"), NOTHING, "Image", "a", id="no image of one's own"),
    pytest.param(pods(serviceAccountName="admin"), DEFAULT, "ServiceAccount", "admin", id="another account"),
    pytest.param(pods(serviceAccountName="default"), LISTED, "ServiceAccount", "default", id="default not listed"),
    pytest.param(
        pods(priorityClassName="system-cluster-critical"), DEFAULT, "PriorityClass", "system-cluster-critical",
        id="priority",
    ),
    pytest.param(pods(priorityClassName="batch"), LISTED, "PriorityClass", "batch", id="priority not listed"),
    *(
        pytest.param(pods(labels={key: "x"}), DEFAULT, "Label", key, id=f"label {key}")
        for key in ("app.kubernetes.io/name", "k8s.io/x", "pod.k8s.io/x", "internvl.dev/job", "istio.io/rev")
    ),
    *(
        pytest.param(pods(annotations={"a": "b", key: "x"}), DEFAULT, "Annotation", key, id=f"annotation {key}")
        for key in (
            "container.apparmor.security.beta.kubernetes.io/trainer", "internvl.dev/run-digest",
            "iam.amazonaws.com/role", "k8s.v1.cni.cncf.io/networks", "vault.hashicorp.com/agent-inject",
        )
    ),
    pytest.param(pods(annotations={"sidecar.istio.io/x": "y"}), LISTED, "Annotation", "sidecar.istio.io/x", id="key"),
    pytest.param(pods(nodeSelector={ROLE: ""}), DEFAULT, "NodeLabel", ROLE, id="node selector"),
    pytest.param(node(ROLE), DEFAULT, "NodeLabel", ROLE, id="required affinity"),
    pytest.param(node(ROLE, "In", preferred=True), DEFAULT, "NodeLabel", ROLE, id="preferred affinity"),
    pytest.param(pods(runtimeClassName="runc"), LISTED, "RuntimeClass", "runc", id="runtime class"),
    pytest.param(beside(namespaces=["a", "b"]), DEFAULT, "AffinityNamespace", "a, b", id="away from others' pods"),
    pytest.param(
        beside(namespaces=["a"], kind="podAffinity", preferred=True), DEFAULT, "AffinityNamespace", "a", id="near"
    ),
    pytest.param(beside(namespaceSelector={}), DEFAULT, "AffinityNamespace", "(selected)", id="every namespace"),
    pytest.param(
        beside(namespaceSelector={"matchLabels": {"team": "b"}}, preferred=True),
        Policy(affinity_namespaces=("*",)), "AffinityNamespace", "(selected)", id="a selector under *",
    ),
    pytest.param(tolerating(key=ROLE, operator="Exists"), DEFAULT, "Toleration", ROLE, id="toleration"),
    pytest.param(tolerating(operator="Exists"), DEFAULT, "Toleration", "(all)", id="every taint"),
    pytest.param(tolerating(key="", operator="Exists"), DEFAULT, "Toleration", "(all)", id="every taint, empty key"),
    pytest.param(env("payments"), LISTED, "Secret", "payments", id="Secret of a variable"),
    pytest.param({"secrets": {"objectStorage": "payments"}}, LISTED, "Secret", "payments", id="Secret of storage"),
    pytest.param(pods(imagePullSecrets=[{"name": "theirs"}]), LISTED, "Secret", "theirs", id="pull secret"),
    pytest.param(volume(secret={"secretName": "payments"}), LISTED, "Secret", "payments", id="Secret as a volume"),
    pytest.param(projected(secret={"name": "payments"}), LISTED, "Secret", "payments", id="projected Secret"),
    pytest.param(
        volume(csi={"driver": "x", "nodePublishSecretRef": {"name": "a"}}), LISTED, "Secret", "a", id="Secret of csi"
    ),
    pytest.param(volume(cephfs={"secretRef": {"name": "ceph"}}), LISTED, "Secret", "ceph", id="Secret of a volume"),
    pytest.param(
        volume(persistentVolumeClaim={"claimName": "payroll"}), LISTED, "Claim", "payroll", id="claim of a volume"
    ),
    pytest.param(cloned(dataSource={"kind": "A", "name": "b"}), LISTED, "Claim", "b", id="a clone of a claim"),
    pytest.param(cloned(dataSourceRef={"kind": "A", "name": "b"}), LISTED, "Claim", "b", id="a volume's origin"),
    pytest.param({"model": {"source": "pvc://payroll"}}, LISTED, "Claim", "payroll", id="claim of the model"),
    pytest.param({"model": {"source": "pvc://datasets/x"}}, LISTED, "Claim", "datasets", id="claim that begins alike"),
    pytest.param({"data": {"metaRoot": "pvc://payroll/a"}}, LISTED, "Claim", "payroll", id="claim of metaRoot"),
    pytest.param(data(questions="pvc://payroll/q"), LISTED, "Claim", "payroll", id="claim of questions"),
    pytest.param(data("validation", "name", root="pvc://x"), LISTED, "Claim", "x", id="claim of a dataset called name"),
    pytest.param(
        {"evaluation": {"tasks": {"coco": {"annotation": "pvc://a/b", "root": "pvc://b"}}}}, LISTED, "Claim", "a, b",
        id="claims of a task",
    ),
    pytest.param(data(root="pvc://any"), NOTHING, "Claim", "any", id="no claim at all"),
    pytest.param({"scheduling": {"gang": "kueue", "queue": "team-b"}}, LISTED, "Queue", "team-b", id="queue"),
    pytest.param(
        pods(labels={"kueue.x-k8s.io/queue-name": "team-b"}), LISTED, "Queue", "team-b", id="queue by a label"
    ),
    pytest.param(
        pods(annotations={"scheduling.volcano.sh/queue-name": "team-b"}), LISTED, "Queue", "team-b",
        id="queue by an annotation",
    ),
    pytest.param(
        pods(labels={"kueue.x-k8s.io/priority-class": "high"}), LISTED, "PriorityClass", "high", id="kueue's priority"
    ),
    pytest.param({"scheduling": {"schedulerName": "theirs"}}, LISTED, "Scheduler", "theirs", id="scheduler"),
]  # fmt: skip


def said_by_python(parts: Raw, policy: Policy) -> list[str]:
    found = (rule.violation(parts, policy) for rule in RULES)
    return [f"{each.field}: {each.message}" for each in found if each]


def said_by_cel(parts: Raw, policy: Policy) -> list[str]:
    """The messages of the validations that fail, each variable evaluated before those that use it."""
    written: Mapping[str, Any] = policy.to_dict()
    variables = {name: list(written[name]) for name in BUILT["settings"]}
    known = {"object": {"spec": BASE | parts}, "variables": variables}
    for each in BUILT["variables"]:
        variables[each["name"]] = evaluate(each["expression"], known)
    failed = [each for each in BUILT["validations"] if evaluate(each["expression"], known) is not True]
    return [evaluate(each["messageExpression"], known) for each in failed]


@pytest.mark.parametrize(("parts", "policy"), ALLOWED)
def test_what_is_allowed_is_refused_by_neither(parts: Raw, policy: Policy) -> None:
    assert said_by_python(parts, policy) == said_by_cel(parts, policy) == []


@pytest.mark.parametrize(("parts", "policy", "reason", "found"), REFUSED)
def test_python_and_cel_refuse_in_the_same_words(parts: Raw, policy: Policy, reason: str, found: str) -> None:
    refused = {rule.reason: rule.violation(parts, policy) for rule in RULES}
    violation = refused[f"{reason}NotAllowed"]
    assert violation is not None
    assert violation.reason == f"{reason}NotAllowed"
    assert violation.message.startswith(f"found {found}, which the policy of this cluster does not allow (allowed: ")
    assert said_by_python(parts, policy) == said_by_cel(parts, policy)


def test_a_message_says_what_is_allowed_and_who_can_change_it() -> None:
    (violation,) = check_spec(BASE | pods(priorityClassName="system-x"), InCluster()).violations
    assert (violation.reason, violation.field) == ("PriorityClassNotAllowed", "spec.podTemplate.priorityClassName")
    assert violation.message == (
        "found system-x, which the policy of this cluster does not allow (allowed: any without the prefix system-); "
        "change it, or ask the cluster's administrator, who sets policy.priorityClasses of the operator's chart"
    )


def test_the_policy_holds_in_a_cluster_only() -> None:
    spec = BASE | pods(serviceAccountName="trainer")
    assert check_spec(spec).violations == ()
    assert [each.reason for each in check_spec(spec, InCluster()).violations] == ["ServiceAccountNotAllowed"]
    assert check_spec(spec, InCluster(policy=LISTED)).violations == ()


@pytest.mark.parametrize("address", ["s3://out/a\x00b", "s3://out/\x1b[2J", "/data/a\x85b"])
def test_an_address_with_control_characters_is_refused(address: str) -> None:
    found = check_spec(BASE | {"output": f"{address}/out"} | data(root=address)).violations
    told = [each.field for each in found if "control characters" in each.message]
    assert told == ["spec.output", "spec.data.train.pets.root"]


@pytest.mark.parametrize("path", sorted((CHECKOUT / "examples").rglob("*.yaml")), ids=lambda path: str(path.name))
def test_the_default_policy_allows_every_example(path: Any) -> None:
    for each in yaml.safe_load_all(path.read_text(encoding="utf-8")):
        if isinstance(each, dict) and each.get("kind") == "InternVLFineTune":
            assert said_by_python(each["spec"], DEFAULT) == said_by_cel(each["spec"], DEFAULT) == [], PLURAL


@pytest.mark.parametrize(
    "field", ["hostNetwork", "hostPID", "hostIPC", "securityContext", "containers", "initContainers", "nodeName",
              "automountServiceAccountToken", "shareProcessNamespace"]
)  # fmt: skip
def test_a_pod_template_cannot_name_what_would_lift_its_confinement(field: str) -> None:
    assert field not in {info.alias for info in PodTemplate.model_fields.values()}
    (violation,) = check_spec(BASE | pods(**{field: True}), InCluster()).violations
    assert violation.field == f"spec.podTemplate.{field}"


# Fields of podTemplate that lend nothing of the namespace, the node or another team.
HARMLESS = {
    "resources", "gpuResource", "gpuClaimTemplate", "stageResources", "shmSize", "terminationGracePeriodSeconds",
    "volumeMounts",
}  # fmt: skip


def test_every_field_of_a_pod_template_is_governed_or_harmless() -> None:
    paths = [path.split(".") for rule in RULES for path in rule.paths]
    governed = {path[1] for path in paths if path[0] == "podTemplate"}
    assert {info.alias for info in PodTemplate.model_fields.values()} - governed - HARMLESS == set()
    assert governed & HARMLESS == set()


def secret_names(schema: Raw, path: str) -> Iterator[str]:
    """Paths of the fields of a schema that name a Secret, in the language of rules."""
    for name, part in schema.get("properties", {}).items():
        if name == "secretName":
            yield f"{path}.{name}"
        elif "secret" in name.lower() and "name" in part.get("properties", {}):
            yield f"{path}.{name}.name"
        else:
            yield from secret_names(part, f"{path}.{name}")
    if "items" in schema:
        yield from secret_names(schema["items"], f"{path}.[]")


def test_every_secret_that_the_schema_can_name_is_governed() -> None:
    (rule,) = [rule for rule in RULES if rule.setting == "secrets"]
    named = set(secret_names(spec_schema()["properties"]["podTemplate"], "podTemplate"))
    any_volume = {re.sub(r"^(podTemplate\.volumes\.\[\])\.\w+(?=\.\w+(\.name)?$)", r"\1.*", path) for path in named}
    assert {each for each in any_volume if each not in rule.paths} == set()


def source_paths(schema: Raw, path: str) -> Iterator[str]:
    """Paths of the fields of a schema that hold an address, in the language of rules."""
    if schema.get("pattern") == SOURCE_PATTERN:
        yield f"{path}.{{claim}}"
    for name, part in schema.get("properties", {}).items():
        yield from source_paths(part, f"{path}.{name}" if path else name)
    if isinstance(values := schema.get("additionalProperties"), dict):
        yield from source_paths(values, f"{path}.{{values}}")


def test_the_claim_of_every_address_is_governed_and_mounted() -> None:
    (rule,) = [rule for rule in RULES if rule.setting == "claims"]
    paths = {path for path in rule.paths if path.endswith("{claim}")}
    assert paths == set(source_paths(spec_schema(), ""))
    spec: Raw = {"output": "s3://out/run", "evaluation": {"tasks": {"any": {"task": "caption"}}}}
    for number, path in enumerate(sorted(paths)):
        *steps, last = path.removesuffix(".{claim}").replace("{values}", "any").split(".")
        node = spec
        for step in steps:
            node = node.setdefault(step, {})
        node[last] = f"pvc://claim-{number}/a"
    read = InternVLFineTuneSpec.model_validate(spec)
    assert sorted(address for _, address in read.sources()) == sorted(f"pvc://claim-{n}/a" for n in range(len(paths)))


@pytest.mark.parametrize(
    "entry",
    ["registry.example.org/*", "**", "", "two words", "x" * 513],
    ids=["glob", "stars", "empty", "space", "long"],
)
def test_an_entry_that_would_never_match_is_refused(entry: str) -> None:
    with pytest.raises(ValidationError):
        Policy(images=(entry,))


def test_a_message_is_short_whatever_was_found() -> None:
    rule = next(rule for rule in RULES if rule.setting == "labels")
    violation = rule.violation(pods(labels={f"example.org/{number:0200}": "x" for number in range(100)}), DEFAULT)
    assert violation is not None
    assert len(violation.message) < 1500


PODS = {"serviceAccountName": "admin"}


@pytest.mark.parametrize(
    ("new", "old", "asked"),
    [
        pytest.param(pods(**PODS), None, True, id="created"),
        pytest.param(pods(**PODS) | {"runPolicy": {"suspend": True}}, pods(**PODS), False, id="suspended"),
        pytest.param(pods(**PODS), {}, True, id="added"),
        pytest.param({}, pods(**PODS), True, id="removed"),
        pytest.param(pods(**PODS, image="a"), pods(**PODS), True, id="another part changed"),
        pytest.param({"secrets": {"huggingFace": "a"}}, {"secrets": {"huggingFace": "b"}}, True, id="secrets"),
        pytest.param({"scheduling": {"queue": "a"}}, {}, True, id="queue"),
        pytest.param(data(root="pvc://a"), data(root="pvc://b"), True, id="claim"),
        pytest.param({"workers": 2}, {"workers": 1}, False, id="what no rule reads"),
        pytest.param({}, {}, False, id="neither"),
    ],
)
def test_the_admission_policy_looks_at_changed_sections_only(new: Raw, old: Raw | None, asked: bool) -> None:
    (condition,) = BUILT["matchConditions"]
    before = None if old is None else {"spec": BASE | old}
    assert evaluate(condition["expression"], {"object": {"spec": BASE | new}, "oldObject": before}) is asked


@pytest.mark.parametrize(
    "template",
    [
        {"volumes": "x"}, {"volumes": [None, "x", {"projected": "x"}, {"projected": {"sources": "x"}}]},
        {"labels": ["x"], "annotations": 1}, {"affinity": {"nodeAffinity": [1]}}, {"tolerations": [[]], "env": [{}]},
        {"env": [{"valueFrom": {"secretKeyRef": "x"}}], "imagePullSecrets": {"name": "x"}},
        {"volumes": [{"persistentVolumeClaim": "x", "ephemeral": {"volumeClaimTemplate": []}}]},
    ],
    ids=str,
)  # fmt: skip
def test_python_survives_values_of_another_type(template: Raw) -> None:
    for rule in RULES:
        rule.violation({"podTemplate": template, "secrets": "x", "data": {"train": ["x"], "meta": 1}}, LISTED)
        rule.violation({"scheduling": [], "model": {"source": {}}, "data": {"train": {"a": "x"}}}, LISTED)
