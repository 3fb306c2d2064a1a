"""Batches: the same in worker processes and without, and what happens to a row that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import checkpoint, settings, tokenizer_of
from internvl_trainer.data import loader as loader_module
from internvl_trainer.data.dataset_meta import DatasetDescription
from internvl_trainer.data.index import RowIndex
from internvl_trainer.data.loader import Collation, Loader, RowDataset, Window
from internvl_trainer.data.open_datasets import OpenDataset, open_datasets, open_validation
from internvl_trainer.data.sample import Sample
from internvl_trainer.data.sampler import GlobalOrder, Position
from internvl_trainer.errors import AccessDenied, Unavailable, UserError
from trainer.runs import GOLDEN, make_config

pytestmark = pytest.mark.slow

TEMPLATE = "Hermes-2"


def read_file(root: str, relative: str) -> bytes:
    return (Path(root) / relative).read_bytes()


def make_loader(
    open_media: Callable[[str, str], bytes] = read_file, workers: int = 0, lines: str | None = None
) -> Loader:
    path = Path(lines) if lines else GOLDEN / "data" / "samples.jsonl"
    description = DatasetDescription("golden", root=str(GOLDEN / "data"), annotation="s3://bucket/samples.jsonl")
    rows = RowDataset(
        [OpenDataset(description, RowIndex.build(path))],
        settings(TEMPLATE, compat="default", frame_sampling="rand", min_frames=2),
        tokenizer_of(checkpoint("qwen2")),
        open_media,
        seed=1,
        bad_lines={},
    )
    order = GlobalOrder(len(rows), global_batch=4, seed=1)
    draws = order.windows(0, 6, rank=0, world_size=1, micro_batch=2)
    return Loader(rows, draws, collation=Collation(0), workers=workers, pin_memory=False)


def windows(loader: Loader) -> list[Window]:
    return [loader.window() for _ in range(6)]


def test_worker_processes_change_nothing() -> None:
    for here, there in zip(windows(make_loader()), windows(make_loader(workers=2)), strict=True):
        assert (here.supervised_tokens, here.tokens) == (there.supervised_tokens, there.tokens)
        for one, other in zip(here.batches, there.batches, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[name], other[name]) for name in one)


def test_counts_are_those_of_the_batches() -> None:
    window = make_loader().window()
    assert window.tokens == sum(int(batch["row_starts"][-1]) for batch in window.batches) == window.places
    assert window.supervised_tokens == sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window.batches)
    assert all(batch["pixel_values"].dtype == torch.uint8 for batch in window.batches)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("problem", "kind", "message"),
    [
        pytest.param(
            FileNotFoundError(), UserError, "s3://bucket/samples.jsonl:{line}: {field}: {path}", id="an image vanished"
        ),
        pytest.param(AccessDenied("AccessDenied", "refused"), AccessDenied, "refused", id="the secret was revoked"),
        pytest.param(Unavailable("StorageUnavailable", "away"), Unavailable, "away", id="storage went away"),
    ],
)
def test_a_row_that_cannot_be_read_ends_training_with_its_cause(
    workers: int, problem: Exception, kind: type[UserError], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "PATIENCE_SECONDS", 0)

    def broken(_root: str, _relative: str) -> bytes:
        raise problem

    with pytest.raises(kind) as caught:
        windows(make_loader(broken, workers))
    assert type(caught.value) is kind
    if "{line}" in message:
        rows = [json.loads(line) for line in (GOLDEN / "data" / "samples.jsonl").read_text().splitlines()]
        places = [
            message.format(line=number, field=field, path=path)
            for number, row in enumerate(rows, start=1)
            for field, path in (("image", row.get("image")), ("image[0]", (row.get("image") or [None])[0]),
                                ("video", row.get("video")))
        ]  # fmt: skip
        assert any(place in str(caught.value) for place in places)
        assert "did it change after preflight?" in str(caught.value)
    else:
        assert caught.value.message == message


def test_storage_that_comes_back_is_waited_for() -> None:
    failures = iter([Unavailable("StorageUnavailable", "away")])

    def sometimes(root: str, relative: str) -> bytes:
        for failure in failures:
            raise failure
        return read_file(root, relative)

    assert len(windows(make_loader(sometimes))) == 6


def test_held_out_rows_are_never_random() -> None:
    """The golden rows have a video, whose frames are else drawn at random."""

    def tiles(seed: int | None, epoch: int) -> list[torch.Tensor]:
        description = DatasetDescription("golden", str(GOLDEN / "data"), "samples.jsonl", data_augment=True)
        rows = RowDataset(
            [OpenDataset(description, RowIndex.build(GOLDEN / "data" / "samples.jsonl"))],
            settings(TEMPLATE, frame_sampling="rand", min_frames=2),
            tokenizer_of(checkpoint("qwen2")),
            read_file,
            seed=seed,
            bad_lines={},
        )
        drawn = [rows[Position(epoch, row)] for row in range(len(rows))]
        return [torch.from_numpy(each.tiles) for each in drawn if isinstance(each, Sample)]

    first, second = tiles(None, 0), tiles(None, 1)
    assert len(first) == 6
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    drawn, again = tiles(1, 0), tiles(1, 1)
    assert not all(
        one.shape == other.shape and torch.equal(one, other) for one, other in zip(drawn, again, strict=True)
    )


def test_held_out_datasets_have_names_of_their_own(tmp_path: Path) -> None:
    rows = {"annotation": str(GOLDEN / "data" / "samples.jsonl")}
    config = make_config("/out", data={"validation": {"golden": rows}})
    assert [each.description.name for each in open_validation(config)] == ["validation/golden"]
    meta = tmp_path / "meta.json"
    meta.write_text(json.dumps({"validation/x": rows | {"root": str(GOLDEN / "data")}}))
    with pytest.raises(UserError, match=r"spec\.data\.meta: validation/x: found 'validation/x'"):
        open_datasets(make_config("/out", data={"meta": str(meta)}))


def test_a_held_out_file_that_is_missing_names_its_field() -> None:
    config = make_config("/out", data={"validation": {"held": {"annotation": "/nowhere/held.jsonl"}}})
    with pytest.raises(UserError, match=r"spec\.data\.validation\.held\.annotation"):
        open_validation(config)


def test_bad_lines_and_repeat_time(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}\n{"a": 4}\n')  # lines 1, 3, 4, 5

    def rows(repeat_time: float, bad: list[int]) -> list[int]:
        description = DatasetDescription("x", root="", annotation="", repeat_time=repeat_time)
        return OpenDataset(description, RowIndex.build(path)).epoch_rows(bad).tolist()

    assert rows(1.0, []) == [0, 1, 2, 3]
    assert rows(0.5, []) == [0, 1]
    assert rows(2.0, [4]) == [0, 1, 3, 0, 1, 3]
    assert rows(0.5, [1, 3]) == []


def test_meta_json_and_spec_join(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"conversations": []}\n')
    entry = {
        "root": "pictures",
        "annotation": "rows.jsonl",
        "repeat_time": 1,
        "data_augment": True,
        "max_dynamic_patch": 3,
    }
    (tmp_path / "meta.json").write_text(json.dumps({"other": entry}))
    golden, other = open_datasets(make_config("/out", data={"meta": str(tmp_path / "meta.json")}))
    assert golden.description.root == str(GOLDEN / "data")  # the annotation's folder
    assert other.description == DatasetDescription(
        "other", root=f"{tmp_path}/pictures", annotation=f"{tmp_path}/rows.jsonl", max_tiles=3, data_augment=True
    )


def test_a_name_in_meta_and_spec_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"golden": {"root": "", "annotation": "x"}}))
    with pytest.raises(UserError, match="found dataset 'golden' in meta and in train"):
        open_datasets(make_config("/out", data={"meta": str(tmp_path / "meta.json")}))
