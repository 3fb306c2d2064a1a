"""The end of a stage: its exit code, the termination message for the operator, and one line for a person."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from internvl_api.address import redact as redact_addresses
from internvl_api.constants import TERMINATION_MESSAGE_LIMIT, TERMINATION_MESSAGE_PATH, ExitCode
from internvl_api.publish_condition import ANSWER_METRICS
from internvl_api.status import EvaluationStatus, StageName, StageResult

from internvl_trainer import faults
from internvl_trainer.errors import AccessDenied, LeaseLost, Rejected, Unavailable, UserError, first_line
from internvl_trainer.signals import StopRequested
from internvl_trainer.terminal import printable

logger = logging.getLogger(__name__)

ENV_TERMINATION_LOG = "INTERNVL_TERMINATION_LOG"
_SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "HF_WRITE_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS_JSON", "AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_TOKEN", "AZURE_CLIENT_SECRET",
    "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "WANDB_API_KEY", "SWANLAB_API_KEY",
)  # fmt: skip
SOURCE_VARIABLES = "SOURCE_"  # variables that an address may name as its query, $(SOURCE_NAME)
_KEY_PART = re.compile(r"[A-Za-z0-9+/%]{40,}={0,2}")  # of a connection string or of a key in JSON
_SHORTEST_SECRET = 6  # redacting a shorter value would remove ordinary words
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Outcome(NamedTuple):
    """Exit code and StageResult of one stage."""

    code: int
    result: StageResult


def conclude(stage: StageName, work: Callable[[], StageResult]) -> Outcome:
    """Do a stage's work; whatever happens becomes an exit code and a StageResult."""
    try:
        result = work()
    except StopRequested as stopped:
        return Outcome(ExitCode.RESUME, _failed(stage, "Stopped", f"stopped by {stopped}; start me again", "resume"))
    except Rejected as error:
        return Outcome(ExitCode.REJECTED, error.result)
    except UserError as error:
        return Outcome(exit_code_of(error), _failed(stage, error.reason, str(error)))
    except Exception as error:
        logger.error("%s failed", stage, exc_info=True)
        return Outcome(ExitCode.INTERNAL, _failed(stage, *_fault_of(error)))
    return Outcome(ExitCode.RESUME if result.outcome == "resume" else ExitCode.OK, result)


def leave(stage: StageName) -> NoReturn:
    """End this process at once, with the last word of one that was asked to stop and has nothing to save."""
    report(Outcome(ExitCode.RESUME, _failed(stage, "Stopped", "stopped; start me again", "resume")))
    logging.shutdown()
    os._exit(ExitCode.RESUME)


def exit_code_of(error: UserError) -> ExitCode:
    """The exit code of an error, by what can help: a new Secret, time, another attempt, or the user."""
    if isinstance(error, AccessDenied):
        return ExitCode.ACCESS_DENIED
    if isinstance(error, LeaseLost):
        return ExitCode.INTERNAL
    return ExitCode.UNAVAILABLE if isinstance(error, Unavailable) else ExitCode.USER_ERROR


def aborted(stage: StageName, printed: str, rank: int) -> StageResult | None:
    """The last word for a process that a thread of NCCL or torch aborted; None when `printed` does not say why."""
    found = faults.diagnose_abort(printed)
    return _failed(stage, found.fault.reason, faults.explain(found, str(rank))) if found else None


def _fault_of(error: Exception) -> tuple[str, str]:
    """Reason and message of an exception that nobody expected."""
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return "DiskFull", first_line(error)
    if found := faults.diagnose(error):
        return found.fault.reason, faults.explain(found)
    return "InternalError", first_line(error)


def report(outcome: Outcome) -> None:
    """Say it to a person (stderr) and to the operator (termination message)."""
    result = outcome.result
    if result.outcome == "failed":
        print(f"{result.stage}: {result.reason}: {printable(redact(result.message))}", file=sys.stderr, flush=True)
    else:
        logger.info("%s: %s: %s", result.stage, result.reason, result.message)
    path = termination_path()
    if path is not None:
        path.write_bytes(termination_message(result))


def termination_path() -> Path | None:
    """Where the last word goes; None outside of a pod."""
    path = Path(os.environ.get(ENV_TERMINATION_LOG, TERMINATION_MESSAGE_PATH))
    return path if path.exists() else None


def termination_message(result: StageResult) -> bytes:
    """Compact JSON of at most TERMINATION_MESSAGE_LIMIT bytes; a long message is cut, then figures go."""
    message = printable(redact(result.message))
    data = _encode(result, message)
    while len(data) > TERMINATION_MESSAGE_LIMIT:
        if not message and result.evaluation is not None:  # dozens of tasks; all figures are in storage
            result = result.model_copy(update={"evaluation": _fewer(result.evaluation)})
        message = message[: len(message) * 9 // 10]
        data = _encode(result, f"{message} …")
    return data


def _fewer(figures: EvaluationStatus) -> EvaluationStatus | None:
    """The figures without those of the answers themselves; None when these are gone already."""
    fewer = EvaluationStatus(
        **{
            model: {
                task: {name: value for name, value in metrics.items() if name not in ANSWER_METRICS}
                for task, metrics in tasks.items()
            }
            for model, tasks in (("baseline", figures.baseline), ("final", figures.final))
        }
    )
    return None if fewer == figures else fewer


def _encode(result: StageResult, message: str) -> bytes:
    return result.model_copy(update={"message": message}).model_dump_json(by_alias=True, exclude_none=True).encode()


def redact(text: str) -> str:
    """`text` without the credentials of this process and the secret parts of addresses."""
    sources = [name for name in os.environ if name.startswith(SOURCE_VARIABLES)]
    for name in (*_SECRET_VARIABLES, *sources):
        value = os.environ.get(name, "").strip()  # a message may show the end of the line in another way
        for secret in (value, *_KEY_PART.findall(value.replace("\\n", "\n"))):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, f"<{name}>")
    return redact_addresses(text)


class RedactingFormatter(logging.Formatter):
    """A log line, tracebacks included, without credentials and control sequences."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(redact(super().format(record)))


def configure_logging(handler: logging.Handler | None = None) -> None:
    """Plain lines on stderr, of one process a machine; from the others and the libraries only what is wrong."""
    handler = handler or logging.StreamHandler()
    local_rank = os.environ.get("LOCAL_RANK")
    rank = f" rank {os.environ['RANK']}" if local_rank else ""
    handler.setFormatter(RedactingFormatter(f"%(asctime)s %(levelname)s{rank} %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("internvl_trainer").setLevel(logging.INFO if local_rank in (None, "0") else logging.WARNING)
    # deprecations inside DeepSpeed and transformers, which users cannot change
    warnings.filterwarnings("ignore", category=FutureWarning)


def _failed(stage: StageName, reason: str, message: str, outcome: str = "failed") -> StageResult:
    return StageResult.model_validate({"stage": stage, "outcome": outcome, "reason": reason, "message": message})
