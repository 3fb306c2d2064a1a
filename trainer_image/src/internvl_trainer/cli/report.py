"""`internvl-trainer report`: what a run has to show so far, as a page to open."""

from __future__ import annotations

import sys
from pathlib import Path

from internvl_api.constants import ExitCode
from internvl_api.run_config import RunConfig

from internvl_trainer.artifacts.fingerprint import check_output
from internvl_trainer.artifacts.storage import open_storage
from internvl_trainer.errors import UserError
from internvl_trainer.exit_status import exit_code_of
from internvl_trainer.report.build import build_report
from internvl_trainer.report.model_card import CARD, model_card


def write_here(config: RunConfig, target: Path) -> int:
    """Write report and model card into `target` and print their paths; an exit code, with one line on stderr if bad."""
    try:
        storage = open_storage(config.output, field="output")
        check_output(storage, config)
        paths = build_report(config, storage, target)
        card = target / CARD
        card.write_text(model_card(config, storage), encoding="utf-8")
    except UserError as error:
        print(f"{error.reason}: {error}", file=sys.stderr)
        return exit_code_of(error)
    except OSError as error:
        print(f"{target} cannot be written: {error}", file=sys.stderr)
        return ExitCode.UNAVAILABLE
    for path in [*paths, card]:
        print(path)
    return ExitCode.OK
