"""Which files of a checkpoint are read, copied into models made from it, or never read."""

from __future__ import annotations

from pathlib import Path

# Pickles may hold code and are never read; the other formats would only cost time. Weights come as safetensors.
_CARRIED_FOLDERS = (".", "upstream")
_CARRIED_SUFFIXES = (".json", ".txt", ".model", ".py", ".md", ".jinja", ".tiktoken")
_CARRIED_NAMES = ("LICENSE", "LICENCE", "NOTICE", "README", "COPYING")
UNUSED_IN_CHECKPOINTS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.gguf")


def is_weights(name: str) -> bool:
    """Whether a file of a checkpoint, by its name, holds weights that are read."""
    return name.endswith(".safetensors")


def is_code(name: str) -> bool:
    """Whether a file of a checkpoint, by its name, holds Python code."""
    return name.endswith(".py")


def is_carried(name: str) -> bool:
    """Whether a file of a base model, by its relative name, is copied into a model made from it.

    An allow-list: what upstream's and transformers' formats read, the model card and the licence.
    """
    path = Path(name)
    if any(part.startswith(".") for part in path.parts) or path.parent.as_posix() not in _CARRIED_FOLDERS:
        return False
    return path.suffix in _CARRIED_SUFFIXES or path.name.upper().startswith(_CARRIED_NAMES)


def is_unused(name: str) -> bool:
    """Whether a file of a checkpoint is never read: weights in a format other than safetensors."""
    return Path(name).suffix in {pattern[1:] for pattern in UNUSED_IN_CHECKPOINTS}
