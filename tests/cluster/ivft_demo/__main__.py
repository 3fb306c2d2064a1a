"""`python -m ivft_demo up [--keep]` and `down`: the whole way, from an empty machine to a published adapter."""

from __future__ import annotations

import argparse
import sys
import time

from ivft_cluster import machine
from ivft_cluster.cluster import Cluster
from ivft_cluster.helm import HelmReleaseError
from ivft_cluster.paths import CHECKOUT, cache_dir
from ivft_cluster.shell import HarnessError, console

from ivft_demo import data, install, report
from ivft_demo.display import RunDisplay, Timetable
from ivft_demo.follow import RunProblem, follow
from ivft_demo.results import ResultProblem

OUTPUT = CHECKOUT / "demo-output"


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    cluster = Cluster()
    if options.command == "down":
        machine.require_root()
        cluster.down()
        console.print("every process, mount, namespace and cgroup of the demo is gone")
        return 0
    try:
        up(cluster, data.load_example(options.example), options.started)
        report.show_next_steps(options.example, up=options.keep)
        return 0
    except (RunProblem, ResultProblem, HarnessError, HelmReleaseError) as problem:
        console.print(f"[red]error:[/red] {problem}")
        if cluster.is_up():
            report.save_logs(cluster, OUTPUT)
            console.print(f"logs of every pod: {OUTPUT}")
        return 1
    finally:
        if not options.keep:
            cluster.down()


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser("python -m ivft_demo", description="A fine-tuning run on a real cluster. Needs root.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser("up", help="set up what is missing, run the example, show the result")
    command.add_argument("--keep", action="store_true", help="leave the cluster up afterwards")
    command.add_argument("--example", default="quickstart", help="of examples/ (default: %(default)s)")
    command.add_argument(
        "--started", type=float, metavar="EPOCH", help="when the command began: what came before is a phase too"
    )
    commands.add_parser("down", help="remove every trace: processes, mounts, namespaces, cgroups")
    return top


def up(cluster: Cluster, run: data.Run, started: float | None = None) -> None:
    """The phases, one after the other. Raises RunProblem, ResultProblem, HarnessError, HelmReleaseError."""
    OUTPUT.mkdir(exist_ok=True)
    times = Timetable(cache_dir() / "demo-times.json")
    if started is not None:
        times.add("virtualenv", time.time() - started)
    with times.phase("machine"):
        machine.setup(tests=False)
    with times.phase("images"):
        images = install.build_images()
    with times.phase("cluster, object storage, Prometheus"):
        cluster.up()
    with times.phase("images into the nodes"):
        cluster.load(*images)
    with times.phase("data"):
        objects = data.upload_demo_data(cluster.s3)
        data.write_secret(cluster)
        console.print(f"{objects} objects in s3://{data.BUCKET}: a tiny checkpoint and forty captioned photographs")
    with times.phase("Helm install"):
        install.install_operator(cluster, images)
    with times.phase(f"run {run.name}"), RunDisplay() as display:
        cluster.kubectl("apply", "-f", str(run.manifest))
        status = follow(cluster.api, run.name, on_change=display)
    with times.phase("results"):
        report.show(cluster, run, status, OUTPUT)
    times.show()


if __name__ == "__main__":
    sys.exit(main())
