"""A small captioned set of real photographs, cut from pictures that scikit-image and scikit-learn carry.

Both packages document the pictures as free to use (see README.txt in their image folders).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

PROMPT = "<image>\nProvide a one-sentence caption for the provided image."
LONGEST_SIDE = 320  # pixels; the demo's model sees tiles of 56

Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the picture
WHOLE: Box = (0, 0, 1, 1)


class View(NamedTuple):
    """A part of a photograph and what can be seen on it."""

    box: Box
    caption: str


PHOTOGRAPHS: dict[str, list[View]] = {
    "skimage/astronaut.png": [
        View(WHOLE, "A smiling astronaut in an orange space suit in front of a flag."),
        View((0.25, 0, 0.6, 0.45), "The face of a smiling woman with short curly hair."),
        View((0.5, 0.55, 1, 1), "A white and black space helmet beside an orange suit."),
    ],
    "skimage/brick.png": [
        View(WHOLE, "A wall of grey bricks with light joints."),
        View((0, 0, 0.5, 0.5), "Grey bricks and light joints, seen closely."),
    ],
    "skimage/camera.png": [
        View(WHOLE, "A man in a dark coat looks through a camera on a tripod."),
        View((0.2, 0.05, 0.7, 0.45), "The head of a man who looks through a camera."),
        View((0.5, 0.3, 1, 1), "The legs of a tripod on a lawn."),
    ],
    "skimage/chelsea.png": [
        View(WHOLE, "The face of a brown tabby cat with green eyes."),
        View((0.2, 0.15, 0.85, 0.6), "The green eyes of a brown tabby cat."),
        View((0.4, 0.55, 0.8, 1), "The nose and the mouth of a cat."),
    ],
    "skimage/coffee.png": [
        View(WHOLE, "A cup of coffee on a red saucer with a small spoon."),
        View((0.25, 0, 0.75, 0.6), "Coffee in a white cup with a red outside."),
        View((0.5, 0.5, 0.75, 0.9), "A small spoon on a red saucer."),
    ],
    "skimage/coins.png": [
        View(WHOLE, "Four rows of old coins on a dark cloth."),
        View((0, 0, 1, 0.3), "One row of old coins on a dark cloth."),
        View((0.78, 0, 1, 0.25), "One old coin with a standing figure."),
    ],
    "skimage/grass.png": [
        View(WHOLE, "Dry grass seen from above."),
        View((0.5, 0.5, 1, 1), "Blades of dry grass, seen closely."),
    ],
    "skimage/gravel.png": [
        View(WHOLE, "Grey gravel seen from above."),
        View((0, 0, 0.4, 0.4), "Grey stones, seen closely."),
    ],
    "skimage/hubble_deep_field.jpg": [
        View(WHOLE, "Thousands of galaxies on a black sky."),
        View((0.55, 0.35, 0.95, 0.8), "Some bright galaxies on a black sky."),
    ],
    "skimage/moon.png": [
        View(WHOLE, "Craters on the grey surface of the moon."),
        View((0.1, 0.05, 0.4, 0.35), "One round crater on the moon."),
    ],
    "skimage/motorcycle_left.png": [
        View(WHOLE, "A red motorcycle parked in a garage."),
        View((0.1, 0.45, 0.45, 1), "The rear wheel of a motorcycle."),
        View((0.65, 0.5, 1, 1), "The front wheel of a motorcycle."),
        View((0.3, 0.45, 0.75, 0.9), "The engine of a red motorcycle."),
    ],
    "skimage/retina.jpg": [
        View(WHOLE, "Red blood vessels in a human eye."),
        View((0.05, 0.3, 0.4, 0.65), "The bright disc in a human eye where blood vessels meet."),
    ],
    "skimage/rocket.jpg": [
        View(WHOLE, "A white rocket between tall towers at dusk."),
        View((0.35, 0.25, 0.65, 1), "A white rocket on its launch pad at dusk."),
        View((0, 0, 0.25, 1), "A dark steel tower in front of a blue evening sky."),
    ],
    "sklearn/china.jpg": [
        View(WHOLE, "A Chinese tower with red columns above a lake."),
        View((0.1, 0.05, 0.7, 0.75), "A tower with red columns and many roofs."),
        View((0.6, 0.3, 1, 1), "Trees in front of a lake under a pale sky."),
    ],
    "sklearn/flower.jpg": [
        View(WHOLE, "An orange dahlia in front of dark green leaves."),
        View((0.25, 0.1, 0.72, 0.85), "The petals of an orange dahlia, seen closely."),
        View((0, 0, 0.3, 0.6), "Dark green leaves out of focus."),
    ],
}
FOLDERS = {"skimage": ("skimage", "data"), "sklearn": ("sklearn", "datasets/images")}


def write_dataset(folder: Path) -> Path:
    """Write `images/*.jpg`, `train.jsonl` and `captions.txt` into `folder`: a row for each view in both.

    Returns train.jsonl, which has conversations; captions.txt is for retrieval, in Flickr30K's format.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    captioned = list(_write_pictures(folder / "images"))
    lines = ["image,caption", *(f"images/{path.name},{caption}" for path, caption in captioned)]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    rows = [
        {
            "id": number,
            "image": f"images/{path.name}",
            "conversations": [
                {"from": "human", "value": PROMPT},
                {"from": "gpt", "value": caption},
            ],
        }
        for number, (path, caption) in enumerate(captioned)
    ]
    annotation = folder / "train.jsonl"
    annotation.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return annotation


def _write_pictures(folder: Path) -> Iterator[tuple[Path, str]]:
    for name, views in PHOTOGRAPHS.items():
        photograph = _open(name)
        for number, view in enumerate(views):
            path = folder / f"{Path(name).stem}-{number}.jpg"
            _cut(photograph, view.box).save(path, quality=90)
            yield path, view.caption


def _open(name: str) -> Image.Image:
    package, file = name.split("/")
    module, inner = FOLDERS[package]
    with resources.as_file(resources.files(module) / inner / file) as path:
        return Image.open(path).convert("RGB")


def _cut(photograph: Image.Image, box: Box) -> Image.Image:
    width, height = photograph.size
    left, top, right, bottom = box
    part = photograph.crop((int(left * width), int(top * height), int(right * width), int(bottom * height)))
    return ImageOps.contain(part, (LONGEST_SIDE, LONGEST_SIDE)) if max(part.size) > LONGEST_SIDE else part
