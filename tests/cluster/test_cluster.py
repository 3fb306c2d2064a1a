"""What a pod, an administrator and a chaos test can rely on in the two-node cluster."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from internvl_api.constants import GPU
from ivft_cluster import images
from ivft_cluster.cluster import Cluster
from ivft_cluster.releases import binary
from ivft_cluster.shell import run, wait_for
from kubernetes import client
from kubernetes.stream import stream

pytestmark = pytest.mark.e2e

SERVE = """
import http.server

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'training_loss{rank="0"} 1.5\\n')

print('serving')
http.server.ThreadingHTTPServer(('', 8000), Handler).serve_forever()
"""


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    with cluster.namespace() as name:
        yield name


@pytest.fixture
def pair(cluster: Cluster, namespace: str) -> str:
    """A headless service `pair` with pods one.pair (node1, serves HTTP, never Ready) and two.pair (node2)."""
    service = {"clusterIP": "None", "selector": {"app": "pair"}, "publishNotReadyAddresses": True}
    ports = {"ports": [{"port": 8000}]}
    cluster.core.create_namespaced_service(namespace, {"metadata": {"name": "pair"}, "spec": {**service, **ports}})
    never = {"exec": {"command": ["/bin/false"]}}
    run_pod(cluster, namespace, "one", "node1", ["python3", "-u", "-c", SERVE], readinessProbe=never)
    run_pod(cluster, namespace, "two", "node2", ["sleep", "infinity"])
    return namespace


def run_pod(
    cluster: Cluster, namespace: str, name: str, node: str, command: list[str], **container: Any
) -> client.V1Pod:
    """Create a pod `name`.pair that asks to be scraped, and wait until it runs."""
    metadata = {
        "name": name,
        "labels": {"app": "pair", "internvl.dev/stage": "train"},
        "annotations": {"prometheus.io/scrape": "true", "prometheus.io/port": "8000"},
    }
    spec = {
        "nodeName": node,
        "hostname": name,
        "subdomain": "pair",
        "terminationGracePeriodSeconds": 0,
        "containers": [
            {"name": "main", "image": images.base_image().name, "command": command, **container},
        ],
    }
    cluster.core.create_namespaced_pod(namespace, {"metadata": metadata, "spec": spec})

    def running() -> Any:
        pod = cluster.core.read_namespaced_pod(name, namespace)
        return pod if pod.status.phase == "Running" else None

    return wait_for(f"pod {name} runs", running)


def execute(cluster: Cluster, namespace: str, pod: str, script: str) -> str:
    """What a Python script prints inside a pod, through the API server and the kubelet."""
    return str(
        stream(
            cluster.core.connect_get_namespaced_pod_exec,
            pod,
            namespace,
            command=["python3", "-c", script],
            stdout=True,
            stderr=True,
        )
    )


def fetch(url: str) -> str:
    return f"import urllib.request as r; print(r.urlopen({url!r}, timeout=5).read().decode())"


def test_pods_reach_each_other_by_name_before_they_are_ready(cluster: Cluster, pair: str) -> None:
    for name in ("one.pair", f"one.pair.{pair}.svc.cluster.local"):
        shown = wait_for(
            f"{name} answers", lambda name=name: serving(execute(cluster, pair, "two", fetch(f"http://{name}:8000")))
        )
        assert "training_loss" in shown


def test_logs_come_through_the_api(cluster: Cluster, pair: str) -> None:
    # lines of Prometheus's requests may follow
    wait_for("the log", lambda: cluster.core.read_namespaced_pod_log("one", pair).startswith("serving\n"))


def test_names_that_do_not_exist_are_refused_at_once(cluster: Cluster, pair: str) -> None:
    for name in ("three.pair", "nobody.example.com"):
        assert "gaierror" in execute(cluster, pair, "two", f"import socket; socket.gethostbyname({name!r})")


def test_the_api_server_is_reached_by_its_service(cluster: Cluster, pair: str) -> None:
    script = "import socket; print(socket.create_connection(('kubernetes.default', 443), 5).getpeername()[1])"
    assert execute(cluster, pair, "two", script).strip() == "443"


def test_a_pod_stores_and_reads_objects(cluster: Cluster, pair: str) -> None:
    s3 = cluster.s3.client()
    s3.create_bucket(Bucket=pair)
    url = cluster.s3.client(endpoint=cluster.s3_endpoint_inside).generate_presigned_url(
        "put_object", {"Bucket": pair, "Key": "from-pod"}
    )
    put = f"import urllib.request as r; r.urlopen(r.Request({url!r}, b'hello', method='PUT'), timeout=10); print('ok')"
    assert execute(cluster, pair, "two", put).strip() == "ok"
    assert s3.get_object(Bucket=pair, Key="from-pod")["Body"].read() == b"hello"


def test_a_wrong_key_is_refused(cluster: Cluster) -> None:
    s3 = cluster.s3.client(secret_key="wrong")
    with pytest.raises(s3.exceptions.ClientError, match="SignatureDoesNotMatch"):
        s3.list_buckets()


def test_prometheus_scrapes_annotated_pods_with_their_labels(cluster: Cluster, pair: str) -> None:
    (sample,) = wait_for(
        "the sample", lambda: cluster.prometheus.query(f'training_loss{{namespace="{pair}"}}'), timeout=30
    )
    assert sample["value"][1] == "1.5"
    assert sample["metric"].items() >= {"pod": "one", "internvl_dev_stage": "train"}.items()


def test_an_image_is_imported_once(cluster: Cluster) -> None:
    cluster.load(images.base_image())
    assert cluster.load(images.base_image()) == {"node1": [], "node2": []}


def test_a_command_runs_in_the_clusters_network(cluster: Cluster) -> None:
    command = ["sh", "-c", "curl -sf $PROMETHEUS_URL/-/ready && kubectl get nodes -o name"]
    done = cluster.exec(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "node/node1" in done.stdout


def test_requests_resume_after_an_api_server_restart(cluster: Cluster, pair: str) -> None:
    cluster.restart_apiserver()
    assert cluster.core.read_namespaced_pod("one", pair).status.phase == "Running"


def test_a_paused_object_store_answers_again_when_resumed(cluster: Cluster) -> None:
    impatient = cluster.s3.client(read_timeout=1, connect_timeout=1, retries={"max_attempts": 0})
    cluster.s3.pause()
    try:
        with pytest.raises(Exception, match=r"[Tt]imeout"):
            impatient.list_buckets()
    finally:
        cluster.s3.resume()
    assert cluster.s3.client().list_buckets()


def test_objects_survive_a_killed_object_store(cluster: Cluster, namespace: str) -> None:
    s3 = cluster.s3.client()
    s3.create_bucket(Bucket=namespace)
    s3.upload_fileobj(io.BytesIO(b"x" * 1_000_000), namespace, "kept")
    cluster.s3.stop()
    cluster.s3.start()
    cluster.s3.wait_ready()
    assert s3.head_object(Bucket=namespace, Key="kept")["ContentLength"] == 1_000_000


def test_a_cut_between_nodes_drops_packets_until_healed(cluster: Cluster, pair: str) -> None:
    url = "http://one.pair:8000"
    wait_for("pod one answers", lambda: serving(execute(cluster, pair, "two", fetch(url))))
    cluster.cut("node1", "node2")
    try:
        assert "timed out" in execute(cluster, pair, "two", fetch(url))
    finally:
        cluster.heal("node1", "node2")
    assert serving(execute(cluster, pair, "two", fetch(url)))


def test_a_killed_node_comes_back_and_runs_pods(cluster: Cluster, namespace: str) -> None:
    run_pod(cluster, namespace, "one", "node2", ["sleep", "infinity"])
    cluster.kill_node("node2")
    lease = client.CoordinationV1Api(cluster.api).read_namespaced_lease("node2", "kube-node-lease")
    cluster.start_node("node2")

    def renewed() -> bool:
        now = client.CoordinationV1Api(cluster.api).read_namespaced_lease("node2", "kube-node-lease")
        return bool(now.spec.renew_time > lease.spec.renew_time)

    wait_for("node2 reports again", renewed)
    cluster.wait_nodes_ready()
    run_pod(cluster, namespace, "after", "node2", ["sleep", "infinity"])


def serving(shown: str) -> str | None:
    return shown if "training_loss" in shown else None


def test_tools_find_the_cluster_by_the_printed_variables(cluster: Cluster) -> None:
    exported = "; ".join(f"export {name}={shlex.quote(value)}" for name, value in cluster.env.items())
    nodes = json.loads(run(["sh", "-c", f"{exported}; {binary('kubectl')} get nodes -o json"]))
    assert [node["metadata"]["name"] for node in nodes["items"]] == cluster.node_names


def test_the_kubelet_allocates_the_devices_of_a_device_plugin(cluster: Cluster, namespace: str) -> None:
    cluster.add_devices("node1", GPU, 4)
    try:
        for name in ("one", "two"):
            limits = {"limits": {GPU: "2"}}
            run_pod(cluster, namespace, name, "node1", ["sleep", "infinity"], resources=limits)
        shown = "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'])"
        held = [execute(cluster, namespace, name, shown).strip().split(",") for name in ("one", "two")]
        assert sorted(held[0] + held[1]) == [f"GPU-{number}" for number in range(4)]
    finally:
        cluster.remove_devices("node1", GPU)
