"""The profile gke-tcpxo: GPUDirect-TCPXO of GKE's a3-megagpu-8g nodes, as Google publishes it. Not tested on GKE.

Sources: github.com/GoogleCloudPlatform/container-engine-accelerators, folder gpudirect-tcpxo, commit 992db81 (2026-06):
README.md (release of 9 January 2026: versions and NCCL's settings), nccl-test-latest.yaml (annotations, volumes and
capabilities), best-practice.md (sidecar and start-up probe). That a pod must use all GPUs and all network cards of its
node is in cloud.google.com/kubernetes-engine/docs/how-to/gpu-bandwidth-gpudirect-tcpx.
"""

import json
from typing import Any

DAEMON = "tcpxo-daemon"
IMAGE = "us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpxo/tcpgpudmarxd-dev:v1.0.21"
_LIBRARIES = "/usr/local/nvidia/lib64"
_APERTURES = "/dev/aperture_devices"
_READY = "/run/health-check"  # the daemon writes it once it is initialised, after about 30 s
GPUS = 8  # of a node; a pod takes them all, with all its cards
_NICS = 8

_DEVICES = [*(f"nvidia{number}" for number in range(GPUS)), "nvidiactl", "nvidia-uvm", "dmabuf_import_helper"]
_INTERFACES = [
    {"interfaceName": "eth0", "network": "default"},
    *({"interfaceName": f"eth{number}", "network": f"vpc{number}"} for number in range(1, _NICS + 1)),
]

ANNOTATIONS = {
    f"devices.gke.io/container.{DAEMON}": "".join(f"- path: /dev/{name}\n" for name in _DEVICES),
    "networking.gke.io/default-interface": "eth0",
    "networking.gke.io/interfaces": json.dumps(_INTERFACES),
}

SIDECAR: dict[str, Any] = {
    "name": DAEMON,
    "image": IMAGE,
    "command": ["/bin/sh", "-c"],
    "args": [
        "set -ex; chmod 755 /fts/entrypoint_rxdm_container.sh; exec /fts/entrypoint_rxdm_container.sh --num_hops=2"
    ],
    # The pod's user is not root; the daemon sets up the network cards.
    "securityContext": {
        "runAsUser": 0,
        "runAsGroup": 0,
        "runAsNonRoot": False,
        "capabilities": {"add": ["NET_ADMIN", "NET_BIND_SERVICE"]},
    },
    "env": [
        {"name": "LD_LIBRARY_PATH", "value": _LIBRARIES},
        {"name": "HEALTH_CHECK_LOG_FILE", "value": _READY},
    ],
    "startupProbe": {"exec": {"command": ["cat", _READY]}, "periodSeconds": 5, "failureThreshold": 24},
    "volumeMounts": [
        {"name": "tcpxo-libraries", "mountPath": _LIBRARIES},
        {"name": "tcpxo-sys", "mountPath": "/hostsysfs"},
        {"name": "tcpxo-proc-sys", "mountPath": "/hostprocsysfs"},
    ],
}

VOLUMES = tuple(
    {"name": name, "hostPath": {"path": path}}
    for name, path in (
        ("tcpxo-libraries", "/home/kubernetes/bin/nvidia/lib64"),
        ("tcpxo-sys", "/sys"),
        ("tcpxo-proc-sys", "/proc/sys"),
        ("tcpxo-apertures", _APERTURES),
    )
)

MOUNTS = (
    {"name": "tcpxo-libraries", "mountPath": _LIBRARIES},
    {"name": "tcpxo-apertures", "mountPath": _APERTURES},
)

ENV = {
    "LD_LIBRARY_PATH": _LIBRARIES,
    "NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY": _APERTURES,
    "NCCL_FASTRAK_CTRL_DEV": "eth0",
    "NCCL_FASTRAK_IFNAME": ",".join(f"eth{number}" for number in range(1, _NICS + 1)),
    "NCCL_SOCKET_IFNAME": "eth0",
    "NCCL_CROSS_NIC": "0",
    "NCCL_PROTO": "Simple,LL128",
    "NCCL_MIN_NCHANNELS": "4",
    "NCCL_TUNER_PLUGIN": "libnccl-tuner.so",
    "NCCL_TUNER_CONFIG_PATH": f"{_LIBRARIES}/a3plus_tuner_config.textproto",
    "NCCL_SHIMNET_GUEST_CONFIG_CHECKER_CONFIG_FILE": f"{_LIBRARIES}/a3plus_guest_config.textproto",
    "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(GPUS))),
    "NCCL_NVLSTREE_MAX_CHUNKSIZE": "131072",
    "NCCL_P2P_NET_CHUNKSIZE": "524288",
    "NCCL_P2P_PCI_CHUNKSIZE": "524288",
    "NCCL_P2P_NVL_CHUNKSIZE": "1048576",
    "NCCL_FASTRAK_NUM_FLOWS": "2",
    "NCCL_FASTRAK_USE_SNAP": "1",
    "NCCL_FASTRAK_PLUGIN_ACCEPT_TIMEOUT_MS": "600000",
    "NCCL_FASTRAK_ENABLE_CONTROL_CHANNEL": "0",
    "NCCL_BUFFSIZE": "8388608",
    "NCCL_NET_GDR_LEVEL": "PIX",
    "NCCL_FASTRAK_ENABLE_HOTPATH_LOGGING": "0",
    "NCCL_FASTRAK_USE_LLCM": "1",
    "NCCL_NVLS_ENABLE": "1",
}
