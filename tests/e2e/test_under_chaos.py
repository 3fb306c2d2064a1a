"""Many concurrent runs on two real nodes, while workers, nodes, servers, storage, network and operator break."""

from __future__ import annotations

import os
import time

import pytest
from e2e.chaos import Chaos, unfinished_uploads
from e2e.chaos_plan import KINDS, plan
from e2e.chaos_report import show
from e2e.chaos_verdict import complaints, differences
from e2e.harness import NAMESPACE, Platform
from internvl_api.constants import LABEL_MANAGED_BY, MANAGED_BY
from ivft_cluster.shell import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(5400)]

SEED = int(os.environ.get("CHAOS_SEED") or 1)
RUNS = int(os.environ.get("CHAOS_RUNS") or 3)  # as many as go on at a time; `make chaos` and `make soak` have more
UNDISTURBED = "chaos-undisturbed"


def test_every_disturbed_run_has_the_undisturbed_result(platform: Platform) -> None:
    began = time.monotonic()
    chaos = Chaos(platform)
    chaos.run_undisturbed(UNDISTURBED)
    drawn = plan(SEED, RUNS)
    try:
        chaos.run_all(drawn)
    finally:  # show the table also after an aborted session
        chaos.log.stop()
        undisturbed = chaos.product(UNDISTURBED)
        finished = [name for name, told in chaos.told.items() if told.status.phase == "Succeeded"]
        products = {name: chaos.product(name) for name in finished}
        show(chaos, products, undisturbed, SEED, time.monotonic() - began)
    wrong = [f"{name}: {words}" for name in chaos.told for words in complaints(chaos.ending(name))]
    wrong += [f"{name}: {words}" for name, product in products.items() for words in differences(product, undisturbed)]
    landed = {told.planned.kind for told in chaos.told.values() if told.planned and told.landed}
    if len(KINDS) * 2 <= RUNS:  # a single try may come too late for what it breaks
        wrong += [f"{kind.title} never happened" for kind in KINDS if kind not in landed]
    assert landed, "no disturbance reached its run"
    assert not wrong, "\n".join(wrong)
    for name in chaos.told:
        platform.delete(name)
    wait_for("no child and no leaving pod is left", lambda: not left_over(platform), timeout=120)
    assert not unfinished_uploads(platform)


def left_over(platform: Platform) -> list[str]:
    """Children of deleted runs, and stuck pods."""
    pods = platform.core.list_namespaced_pod(NAMESPACE, label_selector=f"{LABEL_MANAGED_BY}={MANAGED_BY}").items
    runs = {f"chaos-{number:02d}" for number in range(1, RUNS + 1)} | {UNDISTURBED}
    leaving = [pod.metadata.name for pod in pods if pod.metadata.deletion_timestamp]
    return leaving + [child for run in runs for child in platform.children(run)]
