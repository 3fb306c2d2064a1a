"""How pictures become tiles, in the words of transformers' image processor for InternVL."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .chat_model import IMAGENET_MEAN, IMAGENET_STD

PROCESSOR_FILE = "preprocessor_config.json"


def write_image_processor(upstream: Mapping[str, Any], image_size: int, directory: Path) -> None:
    """preprocessor_config.json of upstream's config.json; AutoImageProcessor then cuts the tiles that training cut.

    One thing it cannot say is use_thumbnail: transformers adds a thumbnail wherever there are several tiles.
    """
    settings = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": bool(upstream.get("dynamic_image_size", True)),
        "min_patches": upstream.get("min_dynamic_patch", 1),
        "max_patches": upstream.get("max_dynamic_patch", 12),
        "size": {"height": image_size, "width": image_size},
        "resample": int(Image.Resampling.BICUBIC),
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
    }
    (directory / PROCESSOR_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
