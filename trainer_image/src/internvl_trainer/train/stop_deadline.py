"""What fits into the grace period of a worker that is told to stop."""

from __future__ import annotations

_MARGIN_SECONDS = 10.0  # for the manifest, and to end


def has_time_to_save(grace: float | None, *, elapsed: float, store_seconds: float, in_flight_seconds: float) -> bool:
    """Whether the checkpoint in flight and then another one can be complete before the worker is killed.

    When not, the stop waits for the one in flight alone: a stop that ends in time costs no restart.

    Args:
        grace: seconds from the signal until the worker is killed; None: no limit.
        elapsed: seconds since the signal.
        store_seconds: that a checkpoint takes, as measured or estimated.
        in_flight_seconds: since the snapshot of the one in flight.
    """
    remaining = max(0.0, store_seconds - in_flight_seconds)
    return grace is None or elapsed + remaining + store_seconds + _MARGIN_SECONDS <= grace


def too_slow_to_stop(grace: float | None, pass_seconds: float, store_seconds: float) -> str | None:
    """A warning when a measured checkpoint does not fit into the grace period; None when it does.

    Args:
        pass_seconds: of one micro-batch, which a stop waits for.
        store_seconds: of storing a checkpoint.
    """
    needed = pass_seconds + store_seconds + _MARGIN_SECONDS
    if grace is None or needed <= grace:
        return None
    parts = (
        f"one micro-batch {pass_seconds:.0f} s + storing a checkpoint {store_seconds:.0f} s + {_MARGIN_SECONDS:.0f} s"
    )
    return (
        f"a stop takes {needed:.0f} s ({parts}), and the worker is killed after {grace:.0f} s: a stop would lose the "
        "steps since the last checkpoint. Raise podTemplate.terminationGracePeriodSeconds, or lower "
        "checkpoint.everySteps"
    )
