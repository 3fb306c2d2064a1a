"""Dimensions of the retrieval models, as far as the estimates need them.

Source: config.json of OpenGVLab/InternVL-14B-224px (vision_config, qllama_config, clip_embed_dim). The parameters of
the dimensions, 13.83 billion, are those that the model card gives.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from internvl_api.models.catalogue import CatalogueModel, LanguageModel, Shape, VisionTower, add_areas

_QUERIES = 96  # learned queries before a text


@dataclass(frozen=True)
class RetrievalCatalogueModel(CatalogueModel):
    """InternVL 1.0 stage 2: a vision tower, QLLaMA with cross-attention in every other layer, two pooling blocks.

    Attributes:
        embed_dim: of the space in which images and texts are compared.
        slots: learned queries before each text.
    """

    embed_dim: int = 768
    slots: int = _QUERIES

    @property
    def projector_shapes(self) -> tuple[Shape, ...]:
        """Matrices between and after the towers: cross-attention of one layer, pooling blocks, the text projection."""
        vision, language = self.vision.hidden, self.language.hidden
        pools = tuple(shape for width in (vision, language) for shape in ((width, 3 * width), (width, self.embed_dim)))
        return (*self._cross_shapes, *pools, (language, self.embed_dim))

    @property
    def projector_parameters(self) -> int:
        return add_areas(self._cross_shapes) * (self.language.layers // 2 - 1) + add_areas(self.projector_shapes)

    @property
    def head_parameters(self) -> int:
        """Parameters that the methods head and lora train beside an adapter: language head and text projection."""
        return self.language.vocab * self.language.hidden + self.language.hidden * self.embed_dim

    @property
    def _cross_shapes(self) -> tuple[Shape, ...]:
        vision, language = self.vision.hidden, self.language.hidden
        return (language, language), (vision, language), (vision, language), (language, language)

    def matrices(self) -> Iterator[tuple[int, int]]:
        yield from super().matrices()
        for inputs, outputs in self._cross_shapes:
            yield inputs * outputs, self.language.layers // 2 - 1


_VIT_6B = VisionTower("InternViT-6B-224px", 3200, 48, 25, 12800, qkv_bias=False, qk_norm=True, layer_norm=False)
_QLLAMA = LanguageModel("QLLaMA-8B", "llama", 4096, 32, 32, 32, 11008, 49954)

RETRIEVAL_CATALOGUE: dict[str, RetrievalCatalogueModel] = {
    "InternVL-14B-224px": RetrievalCatalogueModel(
        "InternVL-14B-224px", _VIT_6B, _QLLAMA, "Hermes-2", max_dynamic_patch=1, tile_size=224
    )
}
