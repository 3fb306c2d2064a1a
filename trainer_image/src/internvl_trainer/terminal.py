"""Text of strangers on a terminal: never markup, never a control sequence."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """The text with control characters, except newline and tab, shown as escapes."""
    return "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cf", "Cs") else ascii(char)[1:-1]
        for char in text
    )
