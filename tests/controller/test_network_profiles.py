"""What a network profile adds to a worker of training, and who may use which."""

import json
import re
from typing import Any

import pytest
import yaml
from controller.builders import CONFIG, Raw, a_run, custom_resource
from internvl_api.validation.policy import Policy
from internvl_operator.core.network_profiles import BUILT_IN, NetworkProfile, with_known_profiles
from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import pods
from internvl_operator.core.run import read_run
from internvl_operator.core.stages import Stage
from internvl_operator.settings import Settings, SettingsError, variable

TRAIN = Stage("train")
OWN = {
    "by-claim": NetworkProfile(
        resource_claims=({"name": "nics", "resourceClaimTemplateName": "eight-nics"},),
        sidecars=({"name": "daemon", "image": "daemon:1"},),
        volumes=({"name": "libraries", "hostPath": {"path": "/lib/nccl"}}, {"name": "scratch", "emptyDir": {}}),
        volume_mounts=({"name": "libraries", "mountPath": "/lib/nccl"}, {"name": "x", "mountPath": "/scratch"}),
        annotations={"a.example/nics": "8", "prometheus.io/scrape": "false"},
    )
}
WITH_OWN = OperatorConfig(network_profiles=OWN)


def built(profile: str | None, stage: Stage = TRAIN, config: OperatorConfig = CONFIG, **changes: Any) -> Raw:
    network = {"network": {"profile": profile}} if profile else {}
    return pods.build(a_run(**network, **changes), stage, 1, 0, config)


def trainer(pod: Raw) -> Raw:
    (container,) = pod["spec"]["containers"]
    return container  # type: ignore[no-any-return]


def env(pod: Raw) -> dict[str, str]:
    return {item["name"]: item.get("value") for item in trainer(pod)["env"]}


@pytest.mark.parametrize("profile", [None, "none"])
def test_without_a_profile_a_pod_has_the_pod_network(profile: str | None) -> None:
    pod = built(profile)
    assert not {"hostNetwork", "resourceClaims", "initContainers"} & pod["spec"].keys()
    assert trainer(pod)["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert "NCCL_NET" not in env(pod)


@pytest.mark.parametrize(
    ("profile", "resource", "transport"),
    [
        ("infiniband", "rdma/rdma_shared_device_a", "IB"),
        ("roce", "rdma/rdma_shared_device_a", "IB"),
        ("efa", "vpc.amazonaws.com/efa", "AWS Libfabric"),
    ],
)
def test_rdma_needs_a_device_locked_memory_and_its_transport(profile: str, resource: str, transport: str) -> None:
    pod = built(profile, gpusPerWorker=2)
    assert set(trainer(pod)["resources"]["limits"]) == {resource, "nvidia.com/gpu"}
    assert trainer(pod)["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert env(pod)["NCCL_NET"] == transport, "NCCL must not fall back to TCP"
    assert "hostNetwork" not in pod["spec"]


def test_tcpxo_has_a_daemon_that_is_ready_before_the_trainer_and_eight_cards() -> None:
    pod = built("gke-tcpxo", gpusPerWorker=8)
    (daemon,) = pod["spec"]["initContainers"]
    assert (daemon["name"], daemon["restartPolicy"]) == ("tcpxo-daemon", "Always")
    assert daemon["startupProbe"]["exec"]["command"] == ["cat", "/run/health-check"]
    assert daemon["securityContext"]["runAsUser"] == 0
    annotations = pod["metadata"]["annotations"]
    interfaces = json.loads(annotations["networking.gke.io/interfaces"])
    assert [each["interfaceName"] for each in interfaces] == [f"eth{number}" for number in range(9)]
    devices = yaml.safe_load(annotations["devices.gke.io/container.tcpxo-daemon"])
    assert {"path": "/dev/nvidia7"} in devices
    assert len(devices) == 11
    variables = env(pod)
    assert variables["NCCL_FASTRAK_IFNAME"] == "eth1,eth2,eth3,eth4,eth5,eth6,eth7,eth8"
    mounted = {mount["name"] for part in (daemon, trainer(pod)) for mount in part["volumeMounts"]}
    assert mounted <= {volume["name"] for volume in pod["spec"]["volumes"]}
    paths = {mount["mountPath"] for mount in trainer(pod)["volumeMounts"]}
    assert {"/dev/aperture_devices", "/usr/local/nvidia/lib64"} <= paths


def test_an_administrator_changes_parts_of_a_built_in_profile() -> None:
    profile = NetworkProfile(
        extends="gke-tcpxo",
        annotations={"networking.gke.io/interfaces": "[]"},
        sidecars=({"name": "tcpxo-daemon", "image": "mirror.example/daemon:2"}, {"name": "second", "image": "x"}),
        volumes=(
            {"name": "tcpxo-sys", "hostPath": {"path": "/other"}},
            {"name": "tcpxo-libraries", "image": {"reference": "mirror.example/libraries:1"}},
        ),
        volume_mounts=({"name": "more", "mountPath": "/more"},),
        capabilities=("IPC_LOCK",),
        env={"NCCL_DEBUG": "INFO", "NCCL_CROSS_NIC": "2"},
    )
    pod = built("gke-tcpxo", config=OperatorConfig(network_profiles={"gke-tcpxo": profile}))
    daemon, second = pod["spec"]["initContainers"]
    assert (daemon["image"], second["name"]) == ("mirror.example/daemon:2", "second")
    assert daemon["startupProbe"], "what it does not name stays"
    assert pod["metadata"]["annotations"]["networking.gke.io/interfaces"] == "[]"
    assert pod["metadata"]["annotations"]["networking.gke.io/default-interface"] == "eth0"
    assert (env(pod)["NCCL_DEBUG"], env(pod)["NCCL_CROSS_NIC"], env(pod)["NCCL_BUFFSIZE"]) == ("INFO", "2", "8388608")
    paths = {volume["name"]: volume.get("hostPath") for volume in pod["spec"]["volumes"]}
    assert paths["tcpxo-sys"] == {"path": "/other"}
    assert paths["tcpxo-libraries"] is None, "a volume has one source"
    assert trainer(pod)["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]


@pytest.mark.parametrize("stage", ["preflight", "evaluate", "merge", "publish"])
def test_other_stages_get_nothing(stage: Any) -> None:
    assert built("host", Stage(stage)) == built(None, Stage(stage)) | {
        "metadata": built("host", Stage(stage))["metadata"]
    }


def test_the_nodes_network_keeps_the_clusters_names() -> None:
    spec = built("host")["spec"]
    assert (spec["hostNetwork"], spec["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")


def test_the_administrators_profile_with_a_claim_and_a_sidecar() -> None:
    pod = built("by-claim", config=WITH_OWN)
    assert pod["spec"]["resourceClaims"] == [{"name": "nics", "resourceClaimTemplateName": "eight-nics"}]
    assert trainer(pod)["resources"]["claims"] == [{"name": "nics"}]
    assert pod["spec"]["initContainers"] == [{"name": "daemon", "image": "daemon:1", "restartPolicy": "Always"}]
    names = [volume["name"] for volume in pod["spec"]["volumes"]]
    assert names.count("scratch") == 1, "a profile replaces none of the run's volumes"
    assert "libraries" in names
    assert [m["name"] for m in trainer(pod)["volumeMounts"] if m["mountPath"] == "/scratch"] == ["scratch"]
    assert pod["metadata"]["annotations"]["a.example/nics"] == "8"
    assert pod["metadata"]["annotations"]["prometheus.io/scrape"] == "true"


def test_the_run_wins_over_its_profile() -> None:
    template = {
        "env": [{"name": "NCCL_NET", "value": "Socket"}],
        "resources": {"limits": {"rdma/rdma_shared_device_a": "2"}},
    }
    pod = built("infiniband", podTemplate=template)
    assert env(pod)["NCCL_NET"] == "Socket"
    assert trainer(pod)["resources"]["limits"]["rdma/rdma_shared_device_a"] == "2"


@pytest.mark.parametrize(
    ("listed", "own", "allowed"),
    [
        pytest.param(("*",), {}, {"none", "infiniband", "roce", "efa"}, id="all but the nodes network"),
        pytest.param(("*", "host", "gke-tcpxo"), {}, set(BUILT_IN), id="those that reach into the node are listed"),
        pytest.param(("*",), OWN, {"none", "infiniband", "roce", "efa", "by-claim"}, id="the administrators too"),
        pytest.param(("infiniband", "gone"), {}, {"infiniband"}, id="one that does not exist"),
        pytest.param((), OWN, set(), id="none"),
    ],
)
def test_who_may_use_what(listed: tuple[str, ...], own: dict[str, NetworkProfile], allowed: set[str]) -> None:
    assert set(with_known_profiles(Policy(network_profiles=listed), own).network_profiles) == allowed


@pytest.mark.parametrize("profile", ["host", "infinband", "gke-tcpxo"])
def test_what_is_not_allowed_or_not_there_is_refused_with_what_is(profile: str) -> None:
    policy = Settings.from_env({}).operator_config().policy
    error = read_run(custom_resource(network={"profile": profile}), policy=policy).mistake
    assert error is not None
    assert f"found {profile}, which the policy of this cluster does not allow" in error.message
    assert "(allowed: none, infiniband, roce, efa)" in error.message


def test_the_setting_is_read_and_checked() -> None:
    name = variable("network_profiles")
    read = Settings.from_env({name: '{"fast": {"hostNetwork": false, "env": {"A": "b"}}}'}).operator_config()
    assert read.network_profiles["fast"].env == {"A": "b"}
    assert "fast" in read.policy.network_profiles


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"resourceClaims": [{}]}, "resourceClaims: found [{}]: Value error, found None, expected a name in each part"),
        ({"extends": "host"}, "extends: found 'host'"),
        ({"volumes": [{"emptyDir": {}}]}, "expected a name in each part"),
        ({"sidecars": [{"name": "trainer", "image": "x"}]}, "found 'trainer', the name of the trainer's container"),
        ({"sidecars": [{"name": "a"}, {"name": "a"}]}, "found 'a' twice, expected a name of its own in each part"),
        ({"volumeMounts": [{"name": "x"}]}, "expected name and mountPath in each mount"),
    ],
)
def test_a_profile_of_which_no_pod_can_be_made_is_refused_at_start(wrong: Raw, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        Settings.from_env({variable("network_profiles"): json.dumps({"mine": wrong})})
