"""JSON from strangers: every way in which a text can be no JSON, or none that may be read, is one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from internvl_trainer.errors import UserError
from internvl_trainer.git_lfs import POINTER


class InvalidJson(UserError):
    """The text is no JSON, or nests too deeply, or has a number of thousands of digits. `line` is None if unknown."""

    def __init__(self, message: str, where: str | None = None, line: int | None = None) -> None:
        super().__init__("InvalidJson", message, f"{where}:{line}" if where and line else where)
        self.line = line


def parse_json(
    text: str | bytes, where: str | None = None, *, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value of a JSON text; `pairs` makes the objects. Raises InvalidJson naming `where`, and nothing else."""
    if text[: len(POINTER)] in (POINTER, POINTER.decode()):
        message = "it is a git-lfs pointer, not the file itself; run `git lfs pull` where it comes from"
        raise InvalidJson(message, where)
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise InvalidJson(f"not valid JSON: {error.msg} (column {error.colno})", where, error.lineno) from error
    except UnicodeDecodeError as error:
        message = f"not valid UTF-8 (byte {error.start}); convert the file: iconv -t UTF-8"
        raise InvalidJson(message, where) from error
    except RecursionError as error:
        raise InvalidJson("nested too deeply to be read", where) from error
    except ValueError as error:  # Python reads no integer of more than 4300 digits
        raise InvalidJson("it has a number of more than 4300 digits; shorten it", where) from error
