"""The same rows written in upstream's JSONL and in every other format."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from golden import GOLDEN, ROWS
from internvl_trainer.data.formats.captions import QUESTION
from internvl_trainer.data.formats.vqa import VQA_QUESTION

MEDIA = GOLDEN / "data"
PICTURES = ("images/wide.png", "images/photo.jpg", "images/square.jpg", "images/tall.png")
Row = dict[str, Any]
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


@dataclass(frozen=True)
class FormatFile:
    """A file in another format, and upstream's rows that it stands for."""

    name: str
    rows: list[Row]
    write: Callable[[Path, list[Row]], Path]
    taken_for: str
    questions: str | None = None


def conversations() -> list[Row]:
    """20 rows: text, one and several pictures, video, several rounds, a system turn, grounding."""
    rows = [ROWS[number % len(ROWS)] for number in range(18)]
    system = {"from": "system", "value": "Answer briefly."}
    return [
        *rows,
        {"id": 18, "conversations": [system, *ROWS[0]["conversations"]]},
        {"id": 19, "image": PICTURES[0], "conversations": [system, *ROWS[2]["conversations"]]},
    ]


def rounds() -> list[Row]:
    """20 rows of upstream's without system turns and grounding marks."""
    return [ROWS[number % len(ROWS)] for number in range(20)]


def captions() -> list[Row]:
    """20 captions of pictures."""
    return [
        {
            "image": PICTURES[number % 4],
            "conversations": [
                {"from": "human", "value": f"<image>\n{QUESTION}"},
                {"from": "gpt", "value": f"A picture, number {number}, of a red square."},
            ],
        }
        for number in range(20)
    ]


def answers() -> list[Row]:
    """20 answers to questions about pictures that are named as COCO's."""
    return [
        {
            "image": f"COCO_train2014_{number:012d}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\n" + VQA_QUESTION.format(f"What is number {number}?")},
                {"from": "gpt", "value": "a cat"},
            ],
        }
        for number in range(20)
    ]


def _lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in records), encoding="utf-8")
    return path


def _media(row: Row) -> Row:
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    return {**({"images": images} if images else {}), **({"videos": [row["video"]]} if "video" in row else {})}


def _parts(row: Row) -> list[Row]:
    """Messages whose content lists name their media."""
    images = iter(_media(row).get("images", []))
    messages = []
    for turn in row["conversations"]:
        parts: list[Row] = []
        text = turn["value"].replace("<video>\n", "\0<image>\n")
        for position, piece in enumerate(text.split("<image>\n")):
            if position:
                is_video = parts and parts[-1].get("text", "").endswith("\0")
                if is_video:
                    parts.pop()
                    parts.append({"type": "video", "video": row["video"]})
                else:
                    parts.append({"type": "image_url", "image_url": {"url": next(images)}})
            if piece:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": _ROLES[turn["from"]], "content": parts})
    return messages


def write_upstream(path: Path, rows: list[Row]) -> Path:
    return _lines(path / "upstream.jsonl", rows)


def _array(path: Path, rows: list[Row]) -> Path:
    (path / "llava.json").write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    return path / "llava.json"


def _sharegpt(path: Path, rows: list[Row]) -> Path:
    records = []
    for row in rows:
        turns = [{**turn, "from": _ROLES[turn["from"]]} for turn in row["conversations"]]
        head = {"system": turns.pop(0)["value"]} if turns[0]["from"] == "system" else {}
        records.append({**head, **_media(row), "conversations": turns})
    return _lines(path / "sharegpt.jsonl", records)


def messages_of(row: Row) -> Row:
    """ms-swift's record of a row."""
    messages = [{"role": _ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
    return {"messages": messages, **_media(row)}


def _messages(path: Path, rows: list[Row]) -> Path:
    return _lines(path / "messages.jsonl", [messages_of(row) for row in rows])


def _content_lists(path: Path, rows: list[Row]) -> Path:
    return _lines(path / "parts.jsonl", [{"messages": _parts(row)} for row in rows])


def _query_response(path: Path, rows: list[Row]) -> Path:
    records = []
    for row in rows:
        texts = [turn["value"] for turn in row["conversations"]]
        pairs = [list(pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
        records.append({"query": pairs[-1][0], "response": pairs[-1][1], "history": pairs[:-1], **_media(row)})
    return _lines(path / "query.jsonl", records)


def _coco(path: Path, rows: list[Row]) -> Path:
    images = [{"id": 100 + number, "file_name": name} for number, name in enumerate(PICTURES)]
    annotations = [
        {"id": n, "image_id": 100 + PICTURES.index(row["image"]), "caption": row["conversations"][1]["value"]}
        for n, row in enumerate(rows)
    ]
    (path / "coco.json").write_text(json.dumps({"info": {"a": [1]}, "images": images, "annotations": annotations}))
    return path / "coco.json"


def _karpathy(path: Path, rows: list[Row]) -> Path:
    records = [
        {"image": row["image"], "caption": row["conversations"][1]["value"], "image_id": "coco_1"} for row in rows
    ]
    (path / "karpathy.json").write_text(json.dumps(records, indent=0))
    return path / "karpathy.json"


def _flickr(path: Path, rows: list[Row]) -> Path:
    lines = [f"{row['image']},{row['conversations'][1]['value']}\n" for row in rows]
    (path / "flickr.txt").write_text("image,caption\n" + "".join(lines))
    return path / "flickr.txt"


def _flickr_tokens(path: Path, rows: list[Row]) -> Path:
    lines = [f"{row['image']}#{n}\t{row['conversations'][1]['value']}\n" for n, row in enumerate(rows)]
    (path / "results.token").write_text("".join(lines))
    return path / "results.token"


def _vqa(path: Path, rows: list[Row]) -> Path:
    questions = [{"image_id": n, "question": f"What is number {n}?", "question_id": n * 1000} for n in range(len(rows))]
    answered = [
        {"image_id": n, "question_id": n * 1000, "multiple_choice_answer": "a cat", "answers": [{"answer": "cat"}] * 10}
        for n in range(len(rows))
    ]
    (path / "questions.json").write_text(json.dumps({"data_subtype": "train2014", "questions": questions[::-1]}))
    (path / "vqa.json").write_text(json.dumps({"annotations": answered}))
    return path / "vqa.json"


def _table(rows: list[Row]) -> pa.Table:
    """Columns as Hugging Face's image features have them: {bytes, path}; videos stay paths."""
    names = [_media(row).get("images", []) for row in rows]
    stored = [[{"bytes": (MEDIA / name).read_bytes(), "path": name} for name in each] for each in names]
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    return pa.table(
        {
            "images": pa.array(stored, pa.list_(picture)),
            "video": pa.array([row.get("video") for row in rows], pa.string()),
            "conversations": pa.array([row["conversations"] for row in rows], pa.list_(turn)),
        }
    )


def _parquet(path: Path, rows: list[Row]) -> Path:
    pq.write_table(_table(rows), path / "rows.parquet", row_group_size=7)
    return path / "rows.parquet"


def _parquet_shards(path: Path, rows: list[Row]) -> Path:
    (path / "shards").mkdir()
    for shard in range(4):
        pq.write_table(_table(rows[shard * 5 : shard * 5 + 5]), path / "shards" / f"train-{shard:05d}-of-00004.parquet")
    return path / "shards" / "train-*.parquet"


def _arrow_stream(path: Path, rows: list[Row]) -> Path:
    table = _table(rows)
    with pa.OSFile(str(path / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=6)
    return path / "rows.arrow"


def _arrow_captions(path: Path, rows: list[Row]) -> Path:
    table = pa.table(
        {
            "image": [(MEDIA / row["image"]).read_bytes() for row in rows],
            "text": [row["conversations"][1]["value"] for row in rows],
        }
    )
    with pa.OSFile(str(path / "captions.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return path / "captions.arrow"


def _member(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _webdataset(path: Path, rows: list[Row]) -> Path:
    for shard in range(2):
        with tarfile.open(path / f"part-{shard}.tar", "w") as archive:
            for n, row in enumerate(rows[shard * 10 : shard * 10 + 10]):
                key = f"deep/{'folder-' * 20 if n == 3 else ''}{shard}{n:05d}"
                media = _media(row)
                for position, name in enumerate([*media.get("images", []), *media.get("videos", [])]):
                    _member(archive, f"{key}.{position}.{name.rpartition('.')[2]}", (MEDIA / name).read_bytes())
                _member(archive, f"{key}.json", json.dumps(row).encode())
    return path / "part-*.tar"


def _webdataset_captions(path: Path, rows: list[Row]) -> Path:
    with tarfile.open(path / "captions.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for n, row in enumerate(rows):
            _member(archive, f"{n}.{row['image'].rpartition('.')[2].upper()}", (MEDIA / row["image"]).read_bytes())
            _member(archive, f"{n}.txt", row["conversations"][1]["value"].encode())
    return path / "captions.tar"


FORMATS = [
    FormatFile("llava array", conversations(), _array, "chat rows in a JSON array"),
    FormatFile("sharegpt", conversations(), _sharegpt, "sharegpt rows in JSON Lines"),
    FormatFile("messages", conversations(), _messages, "messages rows in JSON Lines"),
    FormatFile("content lists", rounds(), _content_lists, "messages rows in JSON Lines"),
    FormatFile("query and response", rounds(), _query_response, "query-response rows in JSON Lines"),
    FormatFile("coco", captions(), _coco, "coco captions"),
    FormatFile("karpathy", captions(), _karpathy, "coco rows in a JSON array"),
    FormatFile("flickr", captions(), _flickr, "flickr captions"),
    FormatFile("flickr tokens", captions(), _flickr_tokens, "flickr captions"),
    FormatFile("vqav2", answers(), _vqa, "vqav2 questions and answers", "questions.json"),
    FormatFile("parquet", conversations(), _parquet, "sharegpt rows in Parquet"),
    FormatFile("parquet shards", conversations(), _parquet_shards, "sharegpt rows in Parquet"),
    FormatFile("arrow stream", conversations(), _arrow_stream, "sharegpt rows in Arrow"),
    FormatFile("arrow captions", captions(), _arrow_captions, "coco rows in Arrow"),
    FormatFile("webdataset", conversations(), _webdataset, "chat rows in WebDataset shards"),
    FormatFile("webdataset captions", captions(), _webdataset_captions, "coco rows in WebDataset shards"),
]
