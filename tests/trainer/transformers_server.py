"""`transformers ARGUMENTS…` without torchvision: pictures are cut with Pillow, and there is no video processor."""

from __future__ import annotations

import sys
from typing import Any

from transformers import InternVLProcessor
from transformers.cli.transformers import app
from transformers.models.auto.video_processing_auto import AutoVideoProcessor


def no_processor(*_: Any, **__: Any) -> None:
    """InternVLProcessor asks for a video processor, which needs torchvision; pictures do not."""


InternVLProcessor.check_argument_for_proper_class = no_processor
AutoVideoProcessor.from_pretrained = no_processor
app(sys.argv[1:])
