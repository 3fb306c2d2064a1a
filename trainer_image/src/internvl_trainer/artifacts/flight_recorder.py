"""NCCL's flight recorder: each rank's last collectives, which torch writes to a file when one of them times out.

The files say which rank did not come to which collective; torch's own tool reads them
(`python -m torch.distributed.flight_recorder.fr_trace`). They are kept beside the run's other results, because the
pod's disk goes with the pod.
"""

from __future__ import annotations

import logging
import os

from internvl_api.constants import ENV_ATTEMPT
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName

from internvl_trainer.artifacts.output_layout import DIAGNOSTICS
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.distributed import FLIGHT_PREFIX, flight_folder
from internvl_trainer.errors import UserError

logger = logging.getLogger(__name__)

_MOST_FILES = 16  # one for each rank of a machine
_MOST_BYTES = 64 << 20  # of one file; 2,000 entries with their shapes are a few MB


def keep_recordings(config: RunConfig, stage: StageName) -> list[str]:
    """Store what the ranks recorded, and give its addresses; empty when nothing was recorded or nothing can be stored.

    It never raises: the stage has failed, and its own error is what counts.
    """
    try:
        paths = [path for path in sorted(flight_folder().glob(f"{FLIGHT_PREFIX}*")) if path.is_file()]
        small = [path for path in paths if 0 < path.stat().st_size <= _MOST_BYTES][:_MOST_FILES]
        if not small:
            return []
        storage = open_storage(config.output, field="spec.output")
        folder = f"{DIAGNOSTICS}/{stage}-attempt-{os.environ.get(ENV_ATTEMPT, '0')}"
        for path in small:
            storage.upload(path, f"{folder}/{path.name}")
        kept = [f"{storage.uri}/{folder}/{path.name}" for path in small]
    except (OSError, UserError) as error:
        logger.warning("the recordings of NCCL's flight recorder could not be stored: %s", error)
        return []
    logger.error("NCCL's flight recorder of %d ranks is in %s", len(kept), kept[0].rpartition("/")[0])
    return kept
