"""Upstream's config.json of a trained model: the base's, with what training changed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvl_api.run_config import RunConfig


def trained_config(upstream: Mapping[str, Any], config: RunConfig, *, template: str, image_size: int) -> dict[str, Any]:
    """So that inference cuts the same tiles and writes the same conversation.

    Args:
        template, image_size: the checkpoint's own, which the run's settings go before.
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
