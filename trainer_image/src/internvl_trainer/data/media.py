"""A row's media files: fetched from the dataset's root or from the row's own text, and decoded."""

from __future__ import annotations

import base64
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

from PIL import Image

from ..errors import BadFile
from .diagnostics import Finding, RowError
from .media_names import is_base64_picture, is_inline, shown_path
from .pictures import Decoding, ImageProblem, decode_with_notes
from .row_schema import MediaFile, media_path

OpenMedia = Callable[[str, str], bytes]
"""(root, relative path) -> the file's bytes.

Raises FileNotFoundError, whose `hint` may name the path that was meant; IsADirectoryError, whose `files` are the paths
in the folder; or BadFile.
"""


def open_picture(image: MediaFile, root: str, open_media: OpenMedia, decoding: Decoding) -> Image.Image:
    """The RGB picture of a row. Raises RowError with the reason PathLeavesRoot, …Missing, …Unreadable or …Undecodable.

    Every picture is opened by this function or the next: training, checks, evaluation and reports show the same pixels.
    """
    return open_picture_with_notes(image, root, open_media, decoding)[0]


def open_picture_with_notes(
    image: MediaFile, root: str, open_media: OpenMedia, decoding: Decoding
) -> tuple[Image.Image, list[Finding]]:
    """The RGB picture of a row, with warnings about its orientation, transparency and depth. Raises as open_picture."""
    data = fetch_media(image, root, open_media)
    try:
        picture, notes = decode_with_notes(data, decoding)
        name = shown_path(image.path)
        return picture, [Finding(note.reason, f"{name}: {note.message}", image.field, "warning") for note in notes]
    except ImageProblem as error:
        message = f"{shown_path(image.path)}: {error}"
        raise RowError.single(f"{image.kind}Undecodable", message, image.field) from error


def fetch_media(media: MediaFile, root: str, open_media: OpenMedia) -> bytes:
    """The bytes of one file. Raises RowError with the reason PathLeavesRoot, …Missing or …Unreadable."""
    found = fetch_file_or_folder(media, root, open_media)
    if isinstance(found, bytes):
        return found
    message = f"{media.path} is a folder; expected a picture: name each picture, or name the folder as `video`"
    raise RowError.single(f"{media.kind}Unreadable", message, media.field)


def fetch_file_or_folder(media: MediaFile, root: str, open_media: OpenMedia) -> bytes | list[str]:
    """The bytes of one file, or the paths of a folder's files. Raises RowError as fetch_media does.

    A path that exists comes before a picture in base64 with the same text.
    """
    if (inline := read_inline(media)) is not None:
        return inline
    is_base64 = media.is_picture and is_base64_picture(media.path)
    try:
        return open_media(root, media_path(media.path))
    except ValueError as error:
        if is_base64:
            return base64.b64decode(media.path)
        raise RowError.single("PathLeavesRoot", str(error), media.field) from error
    except FileNotFoundError as error:
        if is_base64:
            return base64.b64decode(media.path)
        message = f"{shown_path(media.path)} is not below {root}{getattr(error, 'hint', '')}"
        raise RowError.single(f"{media.kind}Missing", message, media.field) from error
    except IsADirectoryError as error:
        return list(getattr(error, "files", ()))
    except BadFile as error:
        raise RowError.single(f"{media.kind}Unreadable", error.message, media.field) from error


def read_inline(media: MediaFile) -> bytes | None:
    """The bytes of a `data:` URL; None for a path."""
    if not is_inline(media.path):
        return None
    header, _, content = media.path.partition(",")
    try:
        return base64.b64decode(content, validate=True) if header.endswith(";base64") else unquote_to_bytes(content)
    except ValueError as error:
        message = f"{shown_path(media.path)} is no valid data: URL ({error}); expected data:image/png;base64,..."
        raise RowError.single(f"{media.kind}Unreadable", message, media.field) from error
