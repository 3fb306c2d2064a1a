"""Config files of an exported model: upstream's config.json, and those with which transformers asks as we do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_api.run_config import RunConfig
from PIL import Image

from internvl_trainer.data.tokenize import TEMPLATES
from internvl_trainer.model.chat_model import IMAGENET_MEAN, IMAGENET_STD
from internvl_trainer.model.tokenizer import CONTEXT_TOKEN, IMAGE_END, IMAGE_START

GENERATION_CONFIG = "generation_config.json"
PROCESSOR_FILE, WHOLE_PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
VIDEO_PROCESSOR_FILE = "video_preprocessor_config.json"
_OF_FRAMES = (
    "size", "resample", "do_convert_rgb", "do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
    "image_std",
)  # fmt: skip
CHAT_TEMPLATE_FILE, _TOKENIZER_CONFIG = "chat_template.jinja", "tokenizer_config.json"

# Placeholders: <<SYSTEM>> and so on are replaced by JSON texts, which are Jinja literals too.
_CHAT_TEMPLATE = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}{{ <<CONTEXT>> }}
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set openings = {'system': <<SYSTEM>>, 'user': <<USER>>, 'assistant': <<ASSISTANT>>} -%}
{%- if messages[0]['role'] != 'system' -%}{{ openings['system'] + <<MESSAGE>> + <<END>> }}{%- endif -%}
{%- for message in messages -%}
{{ openings[message['role']] + text_of(message['content']) + <<END>> }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ openings['assistant'] }}{%- endif -%}
"""


def trained_config(
    upstream: Mapping[str, Any], config: RunConfig, *, template: str, image_size: int, vocabulary: int | None = None
) -> dict[str, Any]:
    """The base model's config.json with the tiles and the template of this run, for inference to use the same.

    Args:
        template, image_size: the checkpoint's own, used where the run sets none.
        vocabulary: rows of the embeddings, where the run may have added some.
    """
    rows = {} if vocabulary is None else {"llm_config": {**upstream["llm_config"], "vocab_size": vocabulary}}
    size, tiling = config.image.tile_size or image_size, config.image.tiling
    return {
        **upstream,
        "template": config.model.template or template,
        "force_image_size": size,
        "vision_config": {**upstream["vision_config"], "image_size": size},
        "dynamic_image_size": tiling.dynamic,
        "min_dynamic_patch": tiling.min_tiles,
        "max_dynamic_patch": tiling.max_tiles,
        "use_thumbnail": tiling.thumbnail,
        **rows,
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


def write_processor(template: str, context_tokens: int, directory: Path) -> None:
    """Write the chat template and the processor with which AutoProcessor makes the ids of our own prompts.

    The saved tokenizer gets the names that InternVLProcessor looks for. It has no token for a video, which would need
    a row of the embeddings of its own: a video goes in as its frames.

    Args:
        context_tokens: of a tile.
        directory: holds the tokenizer and preprocessor_config.json.
    """
    style = TEMPLATES[template]
    values = {
        "CONTEXT": f"{CONTEXT_TOKEN}\n",
        "SYSTEM": style.system,
        "USER": style.user,
        "ASSISTANT": style.assistant,
        "MESSAGE": style.system_message,
        "END": style.end,
    }
    text = _CHAT_TEMPLATE
    for name, value in values.items():
        text = text.replace(f"<<{name}>>", json.dumps(value, ensure_ascii=False))
    (directory / CHAT_TEMPLATE_FILE).write_text(text, encoding="utf-8")
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": context_tokens}
    (directory / WHOLE_PROCESSOR_FILE).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")
    pictures = json.loads((directory / PROCESSOR_FILE).read_text(encoding="utf-8"))
    video = {key: pictures[key] for key in _OF_FRAMES} | {"video_processor_type": "InternVLVideoProcessor"}
    (directory / VIDEO_PROCESSOR_FILE).write_text(json.dumps(video, indent=2) + "\n", encoding="utf-8")
    path = directory / _TOKENIZER_CONFIG
    names = {
        "start_image_token": IMAGE_START,
        "end_image_token": IMAGE_END,
        "context_image_token": CONTEXT_TOKEN,
        "video_token": IMAGE_END,  # never in a prompt before the pictures' tokens are written
    }
    settings = json.loads(path.read_text(encoding="utf-8"))
    known = settings.get("extra_special_tokens")
    settings |= {"extra_special_tokens": {**(known if isinstance(known, dict) else {}), **names}, **names}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_generation_config(source: Path, end_token: int, directory: Path) -> None:
    """Write the generation settings of the base model, with the template's end of a turn among its end tokens."""
    path = source / GENERATION_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    ends = settings.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    settings["eos_token_id"] = [*ends, *([] if end_token in ends else [end_token])]
    (directory / GENERATION_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
