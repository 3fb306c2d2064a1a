"""The published chat models: names, templates, dimensions.

Source: the config.json of each Hub repository. The parameter counts computed from the dimensions equal the published
counts wherever one is known (tests/api/test_catalogue.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from internvl_api.models.kinds import RETRIEVAL_MODELS
from internvl_api.types import Template

# How upstream stores the language model; decides how it is converted to the native class.
LanguageKind = Literal["qwen2", "internlm2", "llama", "phi3"]

# (inputs, outputs) of a matrix.
Shape = tuple[int, int]

PATCH_SIZE = 14  # pixels, in every InternViT
IMAGE_SIZE = 448  # side of a tile in pixels that the position embeddings are made for
DOWNSAMPLE_RATIO = 0.5  # of the pixel shuffle: a context token stands for 2 x 2 patches
SIDE_OF_TOKEN = round(PATCH_SIZE / DOWNSAMPLE_RATIO)  # pixels


@dataclass(frozen=True)
class VisionTower:
    """An InternViT. `layer_norm` False means RMSNorm, which has no bias."""

    name: str
    hidden: int
    layers: int
    heads: int
    intermediate: int
    qkv_bias: bool
    qk_norm: bool
    layer_norm: bool

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Matrices of one layer as upstream stores them: qkv, proj, fc1, fc2."""
        hidden, inner = self.hidden, self.intermediate
        return (hidden, 3 * hidden), (hidden, hidden), (hidden, inner), (inner, hidden)

    @property
    def layer_vectors(self) -> int:
        """Parameters of one layer outside its matrices: biases, norms, layer scales."""
        norms = 2 * self.hidden * (2 if self.layer_norm else 1) + (2 * self.hidden if self.qk_norm else 0)
        biases = (3 * self.hidden if self.qkv_bias else 0) + self.hidden + self.intermediate + self.hidden
        return norms + biases + 2 * self.hidden

    @property
    def embeddings(self) -> int:
        """Parameters before the first layer: patch projection, class token, positions."""
        positions = count_patches(IMAGE_SIZE) + 1
        return (3 * PATCH_SIZE**2 + 1) * self.hidden + self.hidden + positions * self.hidden

    @property
    def parameters(self) -> int:
        return self.embeddings + self.layers * (add_areas(self.shapes) + self.layer_vectors)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of an adapter on every matrix of `shapes`."""
        return self.layers * _adapter(self.shapes, rank)


@dataclass(frozen=True)
class LanguageModel:
    """A decoder. Every published InternVL stores two embedding matrices, even for models with tied embeddings."""

    name: str
    kind: LanguageKind
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    attention_bias: bool = False  # on query, key and value alone

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def kv_width(self) -> int:
        """Elements of one token's keys; its values have as many."""
        return self.kv_heads * self.head_dim

    @property
    def upstream_shapes(self) -> tuple[Shape, ...]:
        """Matrices of one layer as upstream stores and adapts them: InternLM2 fuses q, k, v; Phi-3 gate and up too."""
        query, key_value = (self.hidden, self.hidden), (self.hidden, self.kv_width)
        fused = (self.hidden, self.hidden + 2 * self.kv_width)
        attention = (fused,) if self.kind in ("internlm2", "phi3") else (query, key_value, key_value)
        return (*attention, query, *self._mlp_shapes)

    @property
    def native_shapes(self) -> tuple[Shape, ...]:
        """Matrices of one layer as transformers holds them: only Phi-3 has fused ones."""
        if self.kind == "phi3":
            return self.upstream_shapes
        query, key_value = (self.hidden, self.hidden), (self.hidden, self.kv_width)
        return (query, key_value, key_value, query, *self._mlp_shapes)

    @property
    def _mlp_shapes(self) -> tuple[Shape, ...]:
        up, down = (self.hidden, self.intermediate), (self.intermediate, self.hidden)
        return ((self.hidden, 2 * self.intermediate), down) if self.kind == "phi3" else (up, up, down)

    @property
    def layer_vectors(self) -> int:
        """Parameters of one layer outside its matrices."""
        return 2 * self.hidden + (self.hidden + 2 * self.kv_width if self.attention_bias else 0)

    @property
    def linear_parameters(self) -> int:
        """Parameters of all layers' matrices, without embeddings and head: what QLoRA quantizes."""
        return self.layers * add_areas(self.upstream_shapes)

    @property
    def parameters(self) -> int:
        vectors = self.layers * self.layer_vectors + self.hidden
        return self.linear_parameters + vectors + 2 * self.vocab * self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Parameters of upstream's adapter: on every matrix of `upstream_shapes`, with one A for a fused matrix."""
        return self.layers * _adapter(self.upstream_shapes, rank)


@dataclass(frozen=True)
class CatalogueModel:
    """One published model.

    Attributes:
        max_dynamic_patch: maximum tiles of one image without the thumbnail, as in the checkpoint's config.json.
        pixel_shuffle: version; v1 does not swap height and width back.
        caveat: what is not tested with this model; None without a caveat.
    """

    name: str
    vision: VisionTower
    language: LanguageModel
    template: Template
    max_dynamic_patch: int = 12
    tile_size: int = IMAGE_SIZE
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    caveat: str | None = None

    @property
    def hub_repository(self) -> str:
        """owner/name on the Hugging Face Hub."""
        return hub_repository(self.name)

    @property
    def context_tokens(self) -> int:
        """`<IMG_CONTEXT>` tokens of one tile."""
        return count_context_tokens(self.tile_size)

    @property
    def projector_shapes(self) -> tuple[Shape, ...]:
        """The two matrices between the towers; the first sees 2 x 2 patches at once."""
        inputs = self.vision.hidden * round(DOWNSAMPLE_RATIO**-2)
        return (inputs, self.language.hidden), (self.language.hidden, self.language.hidden)

    @property
    def projector_parameters(self) -> int:
        (inputs, hidden), _ = self.projector_shapes
        return 2 * inputs + add_areas(self.projector_shapes) + 2 * hidden

    @property
    def parameters(self) -> int:
        return self.vision.parameters + self.projector_parameters + self.language.parameters

    def matrices(self) -> Iterator[tuple[int, int]]:
        """(elements of a matrix, number of such matrices), over the native model."""
        for inputs, outputs in self.language.native_shapes:
            yield inputs * outputs, self.language.layers
        yield self.language.vocab * self.language.hidden, 2
        (hidden, tripled), *others = self.vision.shapes
        for inputs, outputs in [(hidden, tripled // 3)] * 3 + others:
            yield inputs * outputs, self.vision.layers
        for inputs, outputs in self.projector_shapes:
            yield inputs * outputs, 1


def count_patches(tile_size: int) -> int:
    """Patches of a square tile, the class token not counted."""
    return (tile_size // PATCH_SIZE) ** 2


def count_context_tokens(tile_size: int) -> int:
    """Context tokens of one tile in the language model."""
    return int(count_patches(tile_size) * DOWNSAMPLE_RATIO**2)


def add_areas(shapes: tuple[Shape, ...]) -> int:
    """The number of elements of all matrices."""
    return sum(inputs * outputs for inputs, outputs in shapes)


def _adapter(shapes: tuple[Shape, ...], rank: int) -> int:
    return rank * sum(inputs + outputs for inputs, outputs in shapes)


_VIT_300M = VisionTower("InternViT-300M-448px", 1024, 24, 16, 4096, qkv_bias=True, qk_norm=False, layer_norm=True)
# Every InternViT-6B at 448 pixels has 45 layers: upstream dropped the last three of 48.
_VIT_6B = VisionTower("InternViT-6B-448px", 3200, 45, 25, 12800, qkv_bias=False, qk_norm=True, layer_norm=False)

# A vocabulary is the language model's tokenizer plus nine tokens of InternVL. For Yi, Phi-3 and InternLM3 that is
# computed, not read from a published config.json; a dozen rows more or less are 0.002 % of the parameters.
_QWEN2_0_5B = LanguageModel("Qwen2-0.5B", "qwen2", 896, 24, 14, 2, 4864, 151655, attention_bias=True)
_QWEN25_0_5B = LanguageModel("Qwen2.5-0.5B", "qwen2", 896, 24, 14, 2, 4864, 151674, attention_bias=True)
_QWEN25_1_5B = LanguageModel("Qwen2.5-1.5B", "qwen2", 1536, 28, 12, 2, 8960, 151674, attention_bias=True)
_QWEN25_3B = LanguageModel("Qwen2.5-3B", "qwen2", 2048, 36, 16, 2, 11008, 151674, attention_bias=True)
_QWEN25_7B = LanguageModel("Qwen2.5-7B", "qwen2", 3584, 28, 28, 4, 18944, 151674, attention_bias=True)
_QWEN25_14B = LanguageModel("Qwen2.5-14B", "qwen2", 5120, 48, 40, 8, 13824, 151674, attention_bias=True)
_QWEN25_32B = LanguageModel("Qwen2.5-32B", "qwen2", 5120, 64, 40, 8, 27648, 151674, attention_bias=True)
_QWEN25_72B = LanguageModel("Qwen2.5-72B", "qwen2", 8192, 80, 64, 8, 29568, 151674, attention_bias=True)
_INTERNLM2_1_8B = LanguageModel("InternLM2-1.8B", "internlm2", 2048, 24, 16, 8, 8192, 92553)
_INTERNLM25_1_8B = LanguageModel("InternLM2.5-1.8B", "internlm2", 2048, 24, 16, 8, 8192, 92553)
_INTERNLM25_7B = LanguageModel("InternLM2.5-7B", "internlm2", 4096, 32, 32, 8, 14336, 92553)
_INTERNLM2_20B = LanguageModel("InternLM2-20B", "internlm2", 6144, 48, 48, 8, 16384, 92553)
_INTERNLM25_20B = LanguageModel("InternLM2.5-20B", "internlm2", 6144, 48, 48, 8, 16384, 92553)
_INTERNLM3_8B = LanguageModel("InternLM3-8B", "internlm2", 4096, 48, 32, 2, 10240, 128521)
_PHI3_MINI = LanguageModel("Phi-3-mini-128k", "phi3", 3072, 32, 32, 32, 8192, 32020)
_YI_34B = LanguageModel("Nous-Hermes-2-Yi-34B", "llama", 7168, 60, 56, 8, 20480, 64009)
_LLAMA3_70B = LanguageModel("Hermes-2-Theta-Llama-3-70B", "llama", 8192, 80, 64, 8, 28672, 128265)

# Upstream's trainer has a recipe for this model but no InternLM3: the checkpoint stores it in InternLM2's layout.
_INTERNLM3_CAVEAT = "InternLM3 in InternLM2's layout: loads only if its config.json says internlm2; not tested"

_MODELS = (
    CatalogueModel("InternVL-Chat-V1-2-Plus", _VIT_6B, _YI_34B, "Hermes-2", max_dynamic_patch=1, pixel_shuffle="v1"),
    CatalogueModel("InternVL-Chat-V1-5", _VIT_6B, _INTERNLM2_20B, "internlm2-chat"),
    CatalogueModel("Mini-InternVL-Chat-2B-V1-5", _VIT_300M, _INTERNLM2_1_8B, "internlm2-chat"),
    CatalogueModel("Mini-InternVL-Chat-4B-V1-5", _VIT_300M, _PHI3_MINI, "phi3-chat"),
    CatalogueModel("InternVL2-1B", _VIT_300M, _QWEN2_0_5B, "Hermes-2"),
    CatalogueModel("InternVL2-2B", _VIT_300M, _INTERNLM2_1_8B, "internlm2-chat"),
    CatalogueModel("InternVL2-4B", _VIT_300M, _PHI3_MINI, "phi3-chat"),
    CatalogueModel("InternVL2-8B", _VIT_300M, _INTERNLM25_7B, "internlm2-chat"),
    CatalogueModel("InternVL2-26B", _VIT_6B, _INTERNLM2_20B, "internlm2-chat"),
    CatalogueModel("InternVL2-40B", _VIT_6B, _YI_34B, "Hermes-2"),
    CatalogueModel("InternVL2-Llama3-76B", _VIT_6B, _LLAMA3_70B, "internlm2-chat"),
    CatalogueModel("InternVL2_5-1B", _VIT_300M, _QWEN25_0_5B, "internvl2_5"),
    CatalogueModel("InternVL2_5-2B", _VIT_300M, _INTERNLM25_1_8B, "internvl2_5"),
    CatalogueModel("InternVL2_5-4B", _VIT_300M, _QWEN25_3B, "internvl2_5"),
    CatalogueModel("InternVL2_5-8B", _VIT_300M, _INTERNLM25_7B, "internvl2_5"),
    CatalogueModel("InternVL2_5-26B", _VIT_6B, _INTERNLM25_20B, "internvl2_5"),
    CatalogueModel("InternVL2_5-38B", _VIT_6B, _QWEN25_32B, "internvl2_5"),
    CatalogueModel("InternVL2_5-78B", _VIT_6B, _QWEN25_72B, "internvl2_5"),
    CatalogueModel("InternVL3-1B", _VIT_300M, _QWEN25_0_5B, "internvl2_5"),
    CatalogueModel("InternVL3-2B", _VIT_300M, _QWEN25_1_5B, "internvl2_5"),
    CatalogueModel("InternVL3-8B", _VIT_300M, _QWEN25_7B, "internvl2_5"),
    CatalogueModel("InternVL3-9B", _VIT_300M, _INTERNLM3_8B, "internvl2_5", caveat=_INTERNLM3_CAVEAT),
    CatalogueModel("InternVL3-14B", _VIT_300M, _QWEN25_14B, "internvl2_5"),
    CatalogueModel("InternVL3-38B", _VIT_6B, _QWEN25_32B, "internvl2_5"),
    CatalogueModel("InternVL3-78B", _VIT_6B, _QWEN25_72B, "internvl2_5"),
)

CATALOGUE: dict[str, CatalogueModel] = {model.name: model for model in _MODELS}

MODEL_NAMES = (*CATALOGUE, *RETRIEVAL_MODELS)
"""Every published model, of both kinds."""


def hub_repository(model: str) -> str:
    """owner/name of an InternVL model's repository on the Hugging Face Hub."""
    return f"OpenGVLab/{model}"


def model_at(source: str) -> str | None:
    """The published model whose own repository a source names, `hf://owner/name[@revision]`; None for other sources."""
    address = source.partition("@")[0].rstrip("/")
    return next((name for name in MODEL_NAMES if address == f"hf://{hub_repository(name)}"), None)


def find_model(name: str) -> CatalogueModel | None:
    """The catalogue's entry with exactly this name, or None."""
    return CATALOGUE.get(name)
