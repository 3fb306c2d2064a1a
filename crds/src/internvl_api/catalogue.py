"""The models of InternVL's guides, and the later ones of the same shape.

Source of the figures: the published model cards and configs of each Hub repository.
"""

from typing import Literal, NamedTuple

from internvl_api.spec import Template

VisionTower = Literal["InternViT-300M-448px", "InternViT-6B-448px"]


class CatalogueModel(NamedTuple):
    """One published model. `context_tokens` is for one tile; `billions` counts all parameters."""

    name: str
    hub_repository: str
    vision: VisionTower
    language: str
    template: Template
    billions: float
    tile_size: int = 448
    context_tokens: int = 256


_SMALL: VisionTower = "InternViT-300M-448px"
_LARGE: VisionTower = "InternViT-6B-448px"

_MODELS: list[tuple[str, VisionTower, str, Template, float]] = [
    ("InternVL-Chat-V1-2-Plus", _LARGE, "Nous-Hermes-2-Yi-34B", "Hermes-2", 40.1),
    ("InternVL-Chat-V1-5", _LARGE, "InternLM2-20B", "internlm2-chat", 25.5),
    ("Mini-InternVL-Chat-2B-V1-5", _SMALL, "InternLM2-1.8B", "internlm2-chat", 2.2),
    ("Mini-InternVL-Chat-4B-V1-5", _SMALL, "Phi-3-mini-128k", "phi3-chat", 4.2),
    ("InternVL2-1B", _SMALL, "Qwen2-0.5B", "Hermes-2", 0.9),
    ("InternVL2-2B", _SMALL, "InternLM2-1.8B", "internlm2-chat", 2.2),
    ("InternVL2-4B", _SMALL, "Phi-3-mini-128k", "phi3-chat", 4.2),
    ("InternVL2-8B", _SMALL, "InternLM2.5-7B", "internlm2-chat", 8.1),
    ("InternVL2-26B", _LARGE, "InternLM2-20B", "internlm2-chat", 25.5),
    ("InternVL2-40B", _LARGE, "Nous-Hermes-2-Yi-34B", "Hermes-2", 40.1),
    ("InternVL2-Llama3-76B", _LARGE, "Hermes-2-Theta-Llama-3-70B", "internlm2-chat", 76.3),
    ("InternVL2_5-1B", _SMALL, "Qwen2.5-0.5B", "internvl2_5", 0.9),
    ("InternVL2_5-2B", _SMALL, "InternLM2.5-1.8B", "internvl2_5", 2.2),
    ("InternVL2_5-4B", _SMALL, "Qwen2.5-3B", "internvl2_5", 3.7),
    ("InternVL2_5-8B", _SMALL, "InternLM2.5-7B", "internvl2_5", 8.1),
    ("InternVL2_5-26B", _LARGE, "InternLM2.5-20B", "internvl2_5", 25.5),
    ("InternVL2_5-38B", _LARGE, "Qwen2.5-32B", "internvl2_5", 38.4),
    ("InternVL2_5-78B", _LARGE, "Qwen2.5-72B", "internvl2_5", 78.4),
    ("InternVL3-1B", _SMALL, "Qwen2.5-0.5B", "internvl2_5", 0.9),
    ("InternVL3-2B", _SMALL, "Qwen2.5-1.5B", "internvl2_5", 2.1),
    ("InternVL3-8B", _SMALL, "Qwen2.5-7B", "internvl2_5", 7.9),
    ("InternVL3-9B", _SMALL, "InternLM3-8B", "internvl2_5", 9.1),
    ("InternVL3-14B", _SMALL, "Qwen2.5-14B", "internvl2_5", 15.1),
    ("InternVL3-38B", _LARGE, "Qwen2.5-32B", "internvl2_5", 38.4),
    ("InternVL3-78B", _LARGE, "Qwen2.5-72B", "internvl2_5", 78.4),
]

CATALOGUE: dict[str, CatalogueModel] = {
    name: CatalogueModel(name, f"OpenGVLab/{name}", vision, language, template, billions)
    for name, vision, language, template, billions in _MODELS
}


def find_model(name: str) -> CatalogueModel | None:
    """The catalogue's entry of that exact name, or None."""
    return CATALOGUE.get(name)
