"""The end of the demo: status, artifacts, Prometheus's answers and the loss curve, each checked before it is shown."""

from __future__ import annotations

import subprocess
from pathlib import Path

from internvl_api.status import InternVLFineTuneStatus
from ivft_cluster.cluster import Cluster
from ivft_cluster.prometheus import Prometheus
from ivft_cluster.shell import console, wait_for

from ivft_demo.data import Run
from ivft_demo.display import show_table
from ivft_demo.results import ResultProblem, download, learnt, losses, verify_manifest

LEARNT_BELOW = 0.7  # of the first losses


def show(cluster: Cluster, run: Run, status: InternVLFineTuneStatus, folder: Path) -> None:
    """Print the results of the run, and download its report into `folder`.

    Raises ResultProblem when an artifact differs from its manifest or nothing was learnt, HarnessError when Prometheus
    has no answer.
    """
    show_status(run.name, status)
    show_artifacts(cluster, f"{run.output}/artifacts")
    show_metrics(cluster.prometheus, run.name)
    show_evaluation(status)
    show_losses(cluster, run, status, folder)


def show_evaluation(status: InternVLFineTuneStatus) -> None:
    """Print metrics before and after, if the run has evaluation tasks."""
    measured = status.evaluation
    if measured is None:
        return
    rows = [
        [
            task,
            metric,
            f"{before:.4f}" if (before := measured.baseline.get(task, {}).get(metric)) is not None else "",
            f"{after:.4f}",
        ]
        for task, metrics in measured.final.items()
        for metric, after in metrics.items()
    ]
    show_table("evaluation", ["task", "metric", "before", "after"], rows)


def show_status(name: str, status: InternVLFineTuneStatus) -> None:
    show_table(
        f"status of {name}: {status.phase}",
        ["condition", "status", "reason", "message"],
        [[each.type, each.status, each.reason, each.message] for each in status.conditions],
    )


def show_artifacts(cluster: Cluster, uri: str) -> None:
    files = verify_manifest(cluster.s3.client(), uri)
    rows = [[each.path, f"{each.size:,}", each.sha256[:12]] for each in files]
    show_table(f"{uri}: every file matches the manifest", ["file", "bytes", "sha256"], rows)


def questions(name: str) -> dict[str, str]:
    """Prometheus queries about a finished run, with ranges because its pods' series have ended."""
    job = f'{{job_name="{name}"}}'
    return {
        "last training loss (trainer)": f"last_over_time(internvl_train_loss{job}[30m])",
        "best tokens per second (trainer)": f"max_over_time(internvl_train_tokens_per_second{job}[30m])",
        "jobs that succeeded (operator)": 'internvl_operator_jobs{phase="Succeeded"}',
    }


def ask(prometheus: Prometheus, expression: str) -> float:
    """The largest value of an instant query; waits for the next scrape if there is no value. Raises HarnessError."""
    found = wait_for(f"Prometheus answers {expression}", lambda: prometheus.query(expression), timeout=15, every=0.5)
    return max(float(series["value"][1]) for series in found)


def show_metrics(prometheus: Prometheus, name: str) -> None:
    rows = [[text, query, f"{ask(prometheus, query):.4g}"] for text, query in questions(name).items()]
    show_table(f"answers of {prometheus.url}/api/v1/query", ["question", "query", "answer"], rows)


def show_losses(cluster: Cluster, run: Run, status: InternVLFineTuneStatus, folder: Path) -> None:
    s3 = cluster.s3.client()
    curve = losses(s3, run.output)
    part = learnt(curve)
    console.print(f"loss: {curve[0].loss:.3f} → {curve[-1].loss:.3f} in {len(curve)} steps ({part:.0%} of the start)")
    if part >= LEARNT_BELOW:
        raise ResultProblem(f"the loss ended at {part:.0%} of its start; expected less than {LEARNT_BELOW:.0%}")
    download(s3, status.artifacts["report"].rpartition("/")[0], folder / "report")
    console.print(f"report, with the loss curve: {folder / 'report' / 'index.html'}")
    download(s3, f"{run.output}/artifacts/tensorboard", folder / "tensorboard")


def save_logs(cluster: Cluster, folder: Path) -> None:
    """Write the log of every pod and the description of every run into `folder`, for a person to read."""
    wanted = {"resources.txt": ["describe", "ivft,pods", "--all-namespaces"]}
    for pod in cluster.core.list_pod_for_all_namespaces().items:
        where = [f"--namespace={pod.metadata.namespace}", pod.metadata.name]
        wanted[f"{pod.metadata.name}.log"] = ["logs", "--all-containers", *where]
    for file, arguments in wanted.items():
        try:
            text = cluster.kubectl(*arguments, stderr=subprocess.STDOUT)
        except subprocess.CalledProcessError as error:  # a container that never started has no log
            text = str(error.output)
        (folder / file).write_text(text)


NEXT_STEPS = """  eval "$(PYTHONPATH=tests/cluster .venv/bin/python -m ivft_cluster env)"   # KUBECONFIG, S3, Prometheus
  kubectl get ivft
  kubectl describe ivft {name}
  kubectl apply -f examples/quickstart-full.yaml && kubectl get ivft -w
  kubectl delete pod quickstart-full-train-1        # during training: starts a new attempt from the newest checkpoint
  curl -s "$PROMETHEUS_URL/api/v1/query?query=internvl_train_loss"
  .venv/bin/tensorboard --logdir demo-output/tensorboard
  make demo-down"""


def show_next_steps(name: str, *, up: bool) -> None:
    console.print("[bold]next steps[/bold]" + ("" if up else " (KEEP=1 make demo leaves the cluster up)"))
    console.print(NEXT_STEPS.format(name=name), markup=False, soft_wrap=True)
