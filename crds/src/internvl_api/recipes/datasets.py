"""Published data sets of the guides: where their files are, and which recipes learn from them."""

from fnmatch import fnmatchcase
from typing import NamedTuple

_RELEASE = "https://github.com/OpenGVLab/InternVL/releases/download/data"
_KARPATHY = "https://github.com/mehdidc/retrieval_annotations/releases/download/1.0.0/flickr30k_{}_karpathy.txt"
_COCO_PICTURES = (
    "http://images.cocodataset.org/zips/train2014.zip",
    "http://images.cocodataset.org/zips/val2014.zip",
)
_COCO_CAPTIONS = (
    f"{_RELEASE}/coco_karpathy_train_567k.zip",
    f"{_RELEASE}/coco_karpathy_test.json",
)
_COCO_PAIRS = (
    "https://storage.googleapis.com/sfr-vision-language-research/datasets/coco_karpathy_train.json",
    f"{_RELEASE}/coco_karpathy_test.json",
)
_FLICKR_PICTURES = "https://bryanplummer.com/Flickr30kEntities/"
_FLICKR_CN = tuple(f"{_RELEASE}/flickr30k_{name}" for name in ("cn_train.txt", "cn_test.txt"))
_FLICKR = (*(_KARPATHY.format(split) for split in ("train", "val", "test")), f"{_RELEASE}/flickr30k_test_karpathy.json")
_UI = ("https://github.com/sjtuzc954/InternVL/releases/download/release/ui-dataset.zip",)


class Dataset(NamedTuple):
    """A published data set. `recipes` is a pattern of names; `form` is a page where the pictures are asked for."""

    name: str
    recipes: str
    files: tuple[str, ...]
    form: str | None = None

    @property
    def addresses(self) -> tuple[str, ...]:
        """Everything to fetch."""
        return (*self.files, *((self.form,) if self.form else ()))


DATASETS = (
    Dataset("COCO captions", "internvl2*-2b-lora-coco", (*_COCO_PICTURES, *_COCO_CAPTIONS)),
    Dataset("COCO retrieval", "internvl-14b-*-coco", (*_COCO_PICTURES, *_COCO_PAIRS)),
    Dataset("Flickr30K", "internvl-14b-*-flickr", _FLICKR, _FLICKR_PICTURES),
    Dataset("Flickr30K-CN", "internvl-14b-*-flickr-cn", _FLICKR_CN, _FLICKR_PICTURES),
    Dataset("UI", "internvl2-[18]b-lora", _UI),
)


def datasets_of(recipe: str) -> list[Dataset]:
    """The published data sets that a recipe's guide learns from; none for recipes for your own rows."""
    return [dataset for dataset in DATASETS if fnmatchcase(recipe, dataset.recipes)]
