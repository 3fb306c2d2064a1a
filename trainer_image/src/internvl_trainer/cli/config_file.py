"""What is wrong with a run.yaml, in words for who wrote it."""

from __future__ import annotations

from pydantic import ValidationError


def explain(error: Exception) -> str:
    """A line for each field that is wrong; any other error's own words."""
    if not isinstance(error, ValidationError):
        return str(error)
    wrong = [(".".join(map(str, each["loc"])), each["msg"]) for each in error.errors()]
    if "apiVersion" in dict(wrong):
        return "it is a manifest for Kubernetes; `internvl-trainer resolve CR.yaml > run.yaml` makes a run.yaml of it"
    return "".join(f"\n  {field}: {message}" if field else message for field, message in wrong)
