"""Conversion between upstream's checkpoint format (model_type internvl_chat) and transformers' native one.

`config` maps config.json, `tensors` maps names and tensors as streams, `files` reads and writes directories shard by
shard. All of it is data handling: no code that a checkpoint ships is ever run.
"""

from .config import Architecture, UnsupportedArchitecture, native_config, read_architecture
from .tensors import to_native, to_upstream

__all__ = [
    "Architecture",
    "UnsupportedArchitecture",
    "native_config",
    "read_architecture",
    "to_native",
    "to_upstream",
]
