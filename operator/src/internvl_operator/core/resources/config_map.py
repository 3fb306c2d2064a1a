"""Build the ConfigMap that every pod of the run mounts: run.yaml, and the administrator's certificate authorities."""

from pathlib import PurePosixPath
from typing import Any

from internvl_api.constants import ANNOTATION_RUN_DIGEST, CONFIG_PATH

from internvl_operator.core.operator_config import OperatorConfig
from internvl_operator.core.resources import egress, names
from internvl_operator.core.resources.ownership import owned_metadata
from internvl_operator.core.run import Run

KEY = PurePosixPath(CONFIG_PATH).name


def build(run: Run, run_yaml: str, config: OperatorConfig) -> dict[str, Any]:
    """The object to apply."""
    metadata = owned_metadata(run, names.config_map(run.name), names.shared_labels(run.name, run.uid))
    metadata["annotations"] = {ANNOTATION_RUN_DIGEST: run.run_digest}
    data = {KEY: run_yaml} | ({egress.CA_KEY: config.ca_bundle} if config.ca_bundle else {})
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
