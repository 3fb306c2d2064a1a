"""Config files of an exported model: upstream's config.json, and the image processor's for transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_api.run_config import RunConfig
from PIL import Image

from internvl_trainer.model.chat_model import IMAGENET_MEAN, IMAGENET_STD

PROCESSOR_FILE = "preprocessor_config.json"


def trained_config(upstream: Mapping[str, Any], config: RunConfig, *, template: str, image_size: int) -> dict[str, Any]:
    """The base model's config.json with the tiles and the template of this run, for inference to use the same.

    Args:
        template, image_size: the checkpoint's own, used where the run sets none.
    """
    size = config.image.tile_size or image_size
    return {
        **upstream,
        "template": config.model.template or template,
        "force_image_size": size,
        "vision_config": {**upstream["vision_config"], "image_size": size},
        "dynamic_image_size": config.image.dynamic,
        "min_dynamic_patch": config.image.min_dynamic_patch,
        "max_dynamic_patch": config.image.max_dynamic_patch,
        "use_thumbnail": config.image.thumbnail,
    }


def write_image_processor(upstream: Mapping[str, Any], image_size: int, directory: Path) -> None:
    """Write the preprocessor_config.json with which AutoImageProcessor cuts the same tiles as training.

    It cannot express use_thumbnail: transformers adds a thumbnail whenever there are several tiles.

    Args:
        upstream: config.json in upstream's format.
        image_size: pixels of a tile's side.
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
