"""The sections of a spec about the model: `model`, `image`, `lora`, and `training.freeze`."""

from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from internvl_api.models.catalogue import model_at
from internvl_api.types import ApiModel, Source, Template

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class Model(ApiModel):
    """The base model to fine-tune, or the model to evaluate."""

    name: str | None = Field(
        None,
        pattern=NAME_PATTERN,
        max_length=128,
        description="Name of a model in the catalogue; sets the template and the default source; default: the model "
        "whose Hub repository is the source",
    )
    source: Source | None = Field(
        None,
        description="Checkpoint folder in upstream's or the Hugging Face format; default: the model's Hub repository",
    )
    adapter: Source | None = Field(
        None,
        description="Adapter to evaluate on this model: a folder that a run has published as artifacts/adapter. Needs "
        "method none",
    )
    template: Template | None = Field(
        None,
        description="Conversation template; default: the catalogue's, else the one in the checkpoint's config.json",
    )
    drop_path_rate: float = Field(
        0.0, ge=0.0, lt=1.0, description="Stochastic depth rate of the vision tower during training"
    )
    resize_embeddings: bool = Field(
        False,
        description="Give the language model's embeddings a row for every token of an extended tokenizer: the mean of "
        "the rows that are there. Needs method full and a language model that trains",
    )

    @model_validator(mode="before")
    @classmethod
    def _name_of_repository(cls, given: Any) -> Any:
        """The name of a published model that is given by its repository alone, so that its dimensions are known."""
        if not isinstance(given, dict) or given.get("name") is not None:
            return given
        name = model_at(str(given.get("source") or ""))
        return given if name is None else given | {"name": name}


class Tiling(NamedTuple):
    """How images are cut into tiles: `dynamic`: by aspect ratio; the number of tiles, without the thumbnail."""

    dynamic: bool
    min_tiles: int
    max_tiles: int
    thumbnail: bool


DEFAULT_TILING = Tiling(dynamic=True, min_tiles=1, max_tiles=12, thumbnail=True)
"""The tiling of a checkpoint whose config.json sets none."""


class Image(ApiModel):
    """How images are split into tiles."""

    tile_size: int | None = Field(
        None, ge=14, le=1024, description="Side of a tile in pixels; default: the checkpoint's"
    )
    dynamic: bool | None = Field(
        None,
        description="Split an image into tiles by its aspect ratio; false: one tile per image; default: as the "
        "checkpoint's config.json says, else true",
    )
    min_dynamic_patch: int | None = Field(
        None, ge=1, le=64, description="Minimum number of tiles of an image; default: the checkpoint's, else 1"
    )
    max_dynamic_patch: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Maximum number of tiles of an image, the thumbnail not counted; default: the checkpoint's, else "
        "the catalogue's, else 12",
    )
    thumbnail: bool | None = Field(
        None,
        description="Add the whole image as one more tile when it has several tiles; default: as the checkpoint's "
        "config.json says, else true",
    )
    exif: Literal["ignore", "apply"] = Field(
        "ignore",
        description="What to do with the EXIF orientation of a picture: ignore it, as upstream does, or turn the "
        "picture upright",
    )
    background: Literal["white", "black", "none"] = Field(
        "white",
        description="Colour under the transparent pixels of a picture; none drops the transparency, as upstream and "
        "data.compat: upstream do",
    )
    video_frames: int = Field(8, ge=1, le=512, description="Number of frames sampled from a video, one tile each")

    @property
    def tiling(self) -> Tiling:
        """How images are cut; DEFAULT_TILING for what neither the spec nor, in the trainer, the checkpoint sets."""
        default = DEFAULT_TILING
        return Tiling(
            dynamic=default.dynamic if self.dynamic is None else self.dynamic,
            min_tiles=self.min_dynamic_patch or default.min_tiles,
            max_tiles=self.max_dynamic_patch or default.max_tiles,
            thumbnail=default.thumbnail if self.thumbnail is None else self.thumbnail,
        )


class Freeze(ApiModel):
    """Parts of the model that keep their weights. Method lora also freezes each tower that has an adapter."""

    vision: bool = Field(True, description="Freeze the vision tower")
    projector: bool = Field(False, description="Freeze the projector between the vision tower and the language model")
    language: bool = Field(False, description="Freeze the language model")


class Lora(ApiModel):
    """The LoRA adapter of method lora."""

    language_rank: int = Field(
        16, ge=0, le=1024, description="Rank of the language model's adapter; 0: no adapter there"
    )
    vision_rank: int = Field(0, ge=0, le=1024, description="Rank of the vision tower's adapter; 0: no adapter there")
    language_alpha: float | None = Field(
        None, gt=0, description="Scaling of the language model's adapter; default: twice languageRank"
    )
    vision_alpha: float | None = Field(
        None, gt=0, description="Scaling of the vision tower's adapter; default: twice visionRank"
    )
    dropout: float = Field(0.05, ge=0.0, lt=1.0, description="Dropout probability of the adapter's input")
    dora: bool = Field(False, description="Also train the magnitude of each adapted weight's rows (DoRA)")
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4 stores the language model's frozen weights in 4 bits (QLoRA); needs GPUs and bitsandbytes",
    )
