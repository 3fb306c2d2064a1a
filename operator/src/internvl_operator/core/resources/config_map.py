"""Build the ConfigMap with run.yaml, which every pod of the run reads."""

from pathlib import PurePosixPath
from typing import Any

from internvl_api.constants import ANNOTATION_RUN_DIGEST, CONFIG_PATH

from internvl_operator.core.resources import names
from internvl_operator.core.resources.ownership import owned_metadata
from internvl_operator.core.run import Run

KEY = PurePosixPath(CONFIG_PATH).name


def build(run: Run, run_yaml: str) -> dict[str, Any]:
    """The object to apply."""
    metadata = owned_metadata(run, names.config_map(run.name), names.shared_labels(run.name, run.uid))
    metadata["annotations"] = {ANNOTATION_RUN_DIGEST: run.run_digest}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {KEY: run_yaml}}
