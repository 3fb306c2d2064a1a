"""The command line of the harness."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from ivft_cluster import images, machine
from ivft_cluster.cluster import Cluster
from ivft_cluster.contexts import COMPONENTS
from ivft_cluster.oci import Image
from ivft_cluster.paths import default_state_dir
from ivft_cluster.shell import HarnessError, console, phase

EPILOG = """examples:
  export PYTHONPATH=tests/cluster
  python -m ivft_cluster setup                      once a machine: packages, Kubernetes, base image
  python -m ivft_cluster up                         two nodes, object storage, Prometheus
  python -m ivft_cluster kubectl -- get nodes
  python -m ivft_cluster exec -- helm list          any command in the cluster's network, KUBECONFIG set
  eval "$(python -m ivft_cluster env)"              KUBECONFIG and S3 variables for this shell
  python -m ivft_cluster down
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        "python -m ivft_cluster",
        description="A real Kubernetes with object storage and Prometheus on this Debian machine. Needs root.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument(
        "--state-dir",
        type=Path,
        default=os.environ.get("IVFT_CLUSTER_STATE") or default_state_dir(),
        help="where a cluster keeps its data and logs (default: $IVFT_CLUSTER_STATE, else %(default)s)",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    prepare = commands.add_parser("setup", help="install and build what is missing (minutes once, then under 2 s)")
    prepare.add_argument("--control-plane", action="store_true", help="only what an API server without nodes needs")
    up = commands.add_parser("up", help="start a fresh cluster and wait until it is ready")
    up.add_argument("--nodes", type=int, default=2, choices=range(1, 10), metavar="N", help="default: 2")
    commands.add_parser("down", help="remove every trace of the cluster but its logs; safe to repeat")
    commands.add_parser("status", help="show members, addresses and readiness of nodes")
    commands.add_parser("env", help="print shell variables for using the cluster from this machine")
    make = commands.add_parser("build", help="build the project's images, and load them into a cluster that is up")
    make.add_argument("components", nargs="*", metavar="COMPONENT", help="default: all")
    load = commands.add_parser("import", help="load OCI image archives into every node")
    load.add_argument("archives", nargs="+", type=Path, metavar="IMAGE.tar")
    for name, told in (
        ("kubectl", "run kubectl as administrator"),
        ("exec", "run a command inside the control plane's network"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument("arguments", nargs=argparse.REMAINDER, metavar="-- ARGS")
    return top


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    cluster = Cluster(options.state_dir)
    started = time.monotonic()
    match options.command:
        case "setup" if options.control_plane:
            machine.setup_servers()
        case "setup":
            machine.setup()
        case "up":
            up(cluster, options.nodes)
        case "down":
            machine.require_root()
            with phase("down"):
                cluster.down()
        case "status":
            return status(cluster)
        case "env":
            print("\n".join(f"export {name}='{value}'" for name, value in cluster.env.items()))
        case "import":
            with phase(f"import of {', '.join(path.name for path in options.archives)}"):
                cluster.load_archives(*options.archives)
        case "build":
            build(cluster, options.components or [*COMPONENTS])
        case "kubectl":
            return cluster.exec(["kubectl", *_words(options.arguments)]).returncode
        case "exec":
            return cluster.exec(_words(options.arguments)).returncode
    if options.command in ("setup", "up"):
        console.print(f"[bold]{options.command}[/bold] took {time.monotonic() - started:.1f} s")
    return 0


def up(cluster: Cluster, nodes: int) -> None:
    cluster.up(nodes)
    load(cluster, images.base_image())
    status(cluster)


def build(cluster: Cluster, components: list[str]) -> None:
    for component in components:
        with phase(f"image of {component}"):
            image = images.component_image(component)
        print(image.name)
        if cluster.is_up():
            load(cluster, image)


def load(cluster: Cluster, image: Image) -> None:
    with phase(f"import of {image.name}"):
        imported = cluster.load(image)
    for node, names in imported.items():
        console.print(f"  {node}: {'imported' if names else 'had it'}")


def status(cluster: Cluster) -> int:
    if not cluster.is_up():
        console.print(f"no cluster is up in {cluster.state}")
        return 1
    print(cluster.kubectl("get", "nodes", "-o", "wide"))
    facts = {
        "state": str(cluster.state),
        "KUBECONFIG": str(cluster.kubeconfig),
        "S3": f"{cluster.s3.endpoint}  (from pods: {cluster.s3_endpoint_inside})",
        "Prometheus": f"{cluster.prometheus.url}  (from pods: {cluster.prometheus_inside})",
    }
    print(json.dumps(facts, indent=2))
    return 0


def _words(arguments: list[str]) -> list[str]:
    return arguments[1:] if arguments[:1] == ["--"] else arguments


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HarnessError as error:
        console.print(f"[red]error:[/red] {error}", markup=True)
        sys.exit(1)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
