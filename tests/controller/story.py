"""A run on a real API server, driven through its stages by a test that plays the workers."""

import json
from typing import Any

from controller.builders import Raw, result
from controller.operator_process import Cluster
from ivft_cluster.fake_kubelet import FakeKubelet


class Story:
    """A run and those who act on it."""

    def __init__(self, cluster: Cluster, kubelet: FakeKubelet) -> None:
        self.cluster, self.kubelet = cluster, kubelet

    def finish(self, pod: str, stage: str, code: int = 0, **words: Any) -> None:
        """End a pod with a StageResult."""
        self.kubelet.wait_phase(self.cluster.namespace, pod)
        message = json.dumps(result(stage, **({"outcome": "failed"} | words if code else words)))
        self.kubelet.finish(self.cluster.namespace, pod, exit_code=code, message=message)

    def to_training(self, attempt: int = 1) -> None:
        """Until both workers run."""
        self.finish("run-preflight-0", "preflight")
        self.training(attempt)

    def training(self, attempt: int = 1) -> None:
        """Until both workers of this attempt run."""
        self.cluster.wait(
            f"attempt {attempt} trains",
            lambda s: (s["stage"], s["phase"], s["attempt"]) == ("train", "Running", attempt),
        )

    def to_the_end(self) -> Raw:
        """From training to Complete."""
        for rank in (0, 1):
            self.finish(f"run-train-{rank}", "train")
        self.finish("run-publish-0", "publish", artifacts={"adapter": "s3://out/run/artifacts/adapter"})
        self.cluster.wait_condition("Complete")
        return self.cluster.get()["status"]  # type: ignore[no-any-return]
