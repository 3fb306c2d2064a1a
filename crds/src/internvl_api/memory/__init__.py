"""The estimate of GPU memory: what a run needs, and what to change when it does not fit."""
