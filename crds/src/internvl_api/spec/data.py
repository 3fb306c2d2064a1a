"""The section `data` of a spec."""

from typing import Literal

from pydantic import Field

from internvl_api.types import OUTPUT_PATTERN, ApiModel, DataFormat, Source

DATASET_NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"


class Dataset(ApiModel):
    """One annotation file and its media root: an entry of upstream's meta JSON."""

    annotation: Source = Field(
        description="JSONL file with one conversation a line, or a file in the given `format`: also a JSON array, "
        "Parquet, Arrow or WebDataset tar; `*` in its name, or hf://datasets/owner/name, stands for several shards"
    )
    format: DataFormat = Field(
        "auto",
        description="Kind of the rows; auto recognises it, and preflight reports what it took the file for. Retrieval "
        "models take flickr (lines of image,caption) or coco (Karpathy's JSON), and need it named",
    )
    questions: Source | None = Field(
        None, description="VQAv2's questions file; `annotation` is then its annotations file"
    )
    root: Source | None = Field(
        None,
        description="Folder, archive (.zip, .tar, .tar.gz) or folder in an archive that media paths are relative to; "
        "default: the annotation's folder",
    )
    repeat_time: float = Field(
        1.0,
        gt=0.0,
        description="Times an epoch repeats the rows; below 1 it uses only the FIRST part of them, as upstream does",
    )
    weight: float | None = Field(
        None,
        gt=0.0,
        description="Share of the rows of an epoch, relative to the weights of the other datasets; with a weight for "
        "one dataset, every dataset needs one. Default: each row comes up once",
    )
    data_augment: bool = Field(
        False, description="Compress each training tile as JPEG at a random quality, as upstream does"
    )
    max_dynamic_patch: int | None = Field(
        None, ge=1, le=64, description="Maximum number of tiles of an image; overrides image.maxDynamicPatch"
    )
    length: int | None = Field(
        None, ge=0, description="Expected number of rows in the annotation; preflight fails when it differs"
    )


class Preflight(ApiModel):
    """How many rows preflight checks, in how many pods, and where it keeps the results."""

    sample: int | None = Field(
        None,
        ge=1,
        le=2**31 - 1,
        description="Rows of each dataset to check, spread evenly over it; training ends at a bad row among the "
        "others. Default: every row",
    )
    cache: str | None = Field(
        None,
        pattern=OUTPUT_PATTERN,
        max_length=1024,
        description="Where preflight keeps results of checked rows for runs with other outputs: s3://bucket/prefix, "
        "gs://bucket/prefix, az://container/prefix or an absolute path on a mounted volume; whoever can write there "
        "can hide bad rows. Default: nowhere",
    )
    workers: int = Field(
        1,
        ge=1,
        le=64,
        description="Pods that share the check of the rows, without GPUs; for millions of rows, or rows with large "
        "pictures",
    )


class Data(ApiModel):
    """Training data: named datasets, upstream's meta JSON, or both. Absent with method none."""

    train: dict[str, Dataset] = Field(default_factory=dict, max_length=1000, description="Training datasets by name")
    meta: Source | None = Field(None, description="Upstream's meta JSON; its datasets are added to those of data.train")
    mixing_temperature: float | None = Field(
        None,
        ge=1.0,
        description="Draw datasets in proportion to rows^(1/temperature): 1 is by size, larger values favour small "
        "datasets; instead of weights",
    )
    meta_root: Source | None = Field(
        None,
        description="Folder that the relative paths of meta and validationMeta start at, as upstream's start at its "
        "working directory; default: the folder of the JSON",
    )
    validation_meta: Source | None = Field(
        None, description="Meta JSON of held-out datasets; they are added to those of data.validation"
    )
    validation: dict[str, Dataset] = Field(
        default_factory=dict,
        max_length=100,
        description="Held-out datasets by name; training measures the loss on them",
    )
    preflight: Preflight = Field(default_factory=Preflight)
    bad_rows: Literal["fail", "skip"] = Field(
        "fail", description="What to do with rows that cannot be used: fail the run in preflight, or skip them"
    )
    max_bad_rows: int = Field(
        0, ge=0, description="With badRows: skip, the largest number of bad rows that is skipped; more fail the run"
    )
    compat: Literal["default", "upstream"] = Field(
        "default", description="upstream reproduces the defects of upstream's labels, to compare numbers with it"
    )

    @property
    def has_validation(self) -> bool:
        """Whether there are held-out datasets, by name or in a meta JSON."""
        return bool(self.validation) or self.validation_meta is not None
