"""The report: what is on the page, that it needs nothing else, and that data cannot act in it."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from internvl_api.address import redact
from internvl_api.constants import ExitCode
from internvl_trainer.__main__ import main
from internvl_trainer.artifacts.sources import open_media
from internvl_trainer.artifacts.storage import sha256_of
from internvl_trainer.errors import Unavailable
from internvl_trainer.report.build import build_report, write_report
from internvl_trainer.report.plots import smoothed
from internvl_trainer.report.record import read_record
from internvl_trainer.report.samples import choose_rows, choose_samples
from internvl_trainer.report.words import duration
from internvl_trainer.stage_store import StageStore
from PIL import Image
from trainer.report.outputs import TASK, Output, evaluated, prediction
from trainer.runs import environment, started, write_config

pytestmark = pytest.mark.slow

_VOID = {"meta", "img", "source", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """The page as a browser reads it: text, elements, attributes; fails where a tag is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._text: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self._text.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self._text).split())

    def tags(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]

    @property
    def pictures(self) -> list[str]:
        return [str(image["src"]) for image in self.tags("img")]


def build(output: Output) -> tuple[Page, dict[str, Path]]:
    """The page, and the files beside it by name."""
    paths = build_report(output.stages, output.folder / "report")
    files = {path.name: path for path in paths}
    return Page(files["index.html"].read_text(encoding="utf-8")), files


def test_everything_is_on_the_page(tmp_path: Path) -> None:
    page, files = build(evaluated(tmp_path, publish_if="CIDEr > baseline.CIDEr"))
    assert set(files) == {"index.html", "metrics.png", "loss.png", "learning-rate.png", "throughput.png"}
    for text in (
        "team/run",
        "The publishing condition was met CIDEr = 1.5000, baseline.CIDEr = 0.2500; publishIf: CIDEr > baseline.CIDEr",
        "CIDEr 0.2500 1.5000 +1.2500 +0.9950 to +1.4900",
        "BLEU_4 0.1250 0.0625 −0.0625",
        "largest gain Before · CIDEr 0.25 before it After · CIDEr 2.45 after it Reference a reference",
        "All were asked: “What is it?”",
        "Training loss 0.8000 3.8095 at the start",
        "Validation loss 1.0000 lowest 1.0000, after step 80",
        "Throughput 2,000 tokens/s on 1 or 2 processes",
        "1 1–30 1 15 s 3 31–80 2 25 s",
        "golden 6 5 all 1",
        "sha256 " + "5a" * 32,
        "Base model: commit c0ffee",
        f"Test set: coco {TASK['annotation']}",
        "MB, manifest sha256 " + sha256_of(tmp_path / "out/stages/train/manifest.json"),
        "internvl-trainer 0.1.0",
        "languageRank: 4",
    ):
        assert text in page.text
    stages = "Stage Finished (UTC) Since the one before preflight 20"
    assert stages in page.text


def test_the_page_needs_nothing_but_itself(tmp_path: Path) -> None:
    page, _ = build(evaluated(tmp_path))
    assert len(page.pictures) == 4 + 12  # figures and samples
    addresses = [value for _, attributes in page.elements for name, value in attributes.items()
                 if name in ("src", "srcset", "href", "data", "action", "poster", "background")]  # fmt: skip
    assert {str(value).partition(":")[0] for value in addresses} == {"data"}
    assert not {tag for tag, _ in page.elements} & {"script", "link", "iframe", "object", "form", "base"}
    assert "url(" not in page.source
    assert "@import" not in page.source
    policy = next(meta["content"] for meta in page.tags("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_figures_are_whole_pictures_in_both_themes(tmp_path: Path) -> None:
    page, files = build(evaluated(tmp_path))
    embedded = [base64.b64decode(address.partition(",")[2]) for address in page.pictures if "image/png" in address]
    assert sorted(embedded) == sorted(path.read_bytes() for name, path in files.items() if name.endswith(".png"))
    dark = [base64.b64decode(str(each["srcset"]).partition(",")[2]) for each in page.tags("source")]
    assert len(dark) == len(embedded) == 4
    for data, is_dark in [*((data, False) for data in embedded), *((data, True) for data in dark)]:
        image = np.asarray(Image.open(io.BytesIO(data)).convert("L"))
        assert image.shape[1] == 1008
        assert image.shape[0] >= 300
        assert (image[0, 0] < 128) == is_dark
        assert len(np.unique(image)) > 20, "something is drawn"


def test_pictures_of_samples_are_small_copies(tmp_path: Path) -> None:
    wide = Image.new("RGB", (2000, 500), "red")
    (tmp_path / "pictures").mkdir()
    wide.save(tmp_path / "pictures" / "wide.png")
    task = {**TASK, "root": str(tmp_path / "pictures")}
    output = Output(tmp_path, evaluation={"tasks": {"coco": task}}).train()
    output.evaluate({"CIDEr": 1.0}, [prediction(0, image="wide.png")])
    page, _ = build(output)
    (address,) = (address for address in page.pictures if "image/jpeg" in address)
    assert Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).size == (360, 90)


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> {{ 7 * 7 }}"


def test_data_cannot_act_in_the_page(tmp_path: Path) -> None:
    output = Output(tmp_path, method="lora", evaluation={"tasks": {"coco": TASK}}).train()
    finding = {"severity": "error", "reason": EVIL, "dataset": EVIL, "file": EVIL, "line": 3, "field": EVIL}
    output.preflight({**finding, "message": EVIL}, name=EVIL)
    rows = [prediction(1, EVIL, references=[EVIL], question=EVIL), prediction(2, image=EVIL, question="other")]
    output.evaluate({"CIDEr": 1.0}, rows)
    page, _ = build(output)
    assert not page.tags("script")
    assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
    assert page.text.count("<script>alert(1)</script>") >= 8
    assert "{{ 7 * 7 }}" in page.text


def test_text_that_is_none_is_shown_all_the_same(tmp_path: Path) -> None:
    output = Output(tmp_path, evaluation={"tasks": {"coco": TASK}}).train(2)
    rows = [prediction(1, "a\x1cb\x00c\ufffd", references=["half a pair: \ud83d."]), prediction(2, "")]
    page, _ = build(output.evaluate({"CIDEr": 1.0}, rows))
    assert "a␜b␀c\ufffd" in page.text
    assert "half a pair: ?." in page.text
    assert "(empty)" in page.text


def test_links_are_shown_without_what_gives_access(tmp_path: Path) -> None:
    link = "https://data.example/rows.jsonl?X-Amz-Signature=s3cr3t&x=1"
    output = Output(tmp_path, data={"train": {"golden": {"annotation": link}}}).train(2)
    output.preflight({"severity": "warning", "reason": "R", "dataset": "golden", "file": link, "line": 1, "field": None,
                      "message": f"{link}: odd"})  # fmt: skip
    page, _ = build(output)
    assert "https://data.example/rows.jsonl?…" in page.text
    assert "s3cr3t" not in page.source
    assert "hunter2" not in page.source


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        pytest.param("https://h.example/a?sig=1 b", "https://h.example/a?… b", id="signature"),
        pytest.param("http://u:p@10.0.0.1/a", "http://10.0.0.1/a", id="password"),
        pytest.param("hf://o/m@v1.0 s3://b/k", "hf://o/m@v1.0 s3://b/k", id="revision stays"),
        pytest.param("what? me@example.org", "what? me@example.org", id="no link"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_run_below_its_condition_says_so_first(tmp_path: Path) -> None:
    page, _ = build(evaluated(tmp_path, publish_if="CIDEr >= 2.5"))
    assert "Not published: the publishing condition was not met" in page.text
    assert "CIDEr = 1.5000; publishIf: CIDEr >= 2.5. The adapter and this report are kept" in page.text
    assert [each["class"] for each in page.tags("div") if "banner" in str(each.get("class"))] == ["banner bad"]


def test_without_an_evaluation(tmp_path: Path) -> None:
    page, files = build(Output(tmp_path).preflight().train())
    assert "Trained No evaluation was asked for" in page.text
    assert "metrics.png" not in files
    assert "Every row was read, every picture opened" in page.text


def test_without_a_baseline(tmp_path: Path) -> None:
    page, files = build(evaluated(tmp_path, baseline=False))
    assert "CIDEr – 1.5000" in page.text
    assert "The base model was not evaluated" in page.text
    assert "metrics.png" in files
    assert "before it" not in page.text
    assert page.text.index("highest score After · CIDEr 2.45") < page.text.index("lowest score After · CIDEr 0.55")


def test_a_condition_that_cannot_be_told(tmp_path: Path) -> None:
    page, _ = build(evaluated(tmp_path, baseline=False, publish_if="CIDEr > 0.2"))
    assert "The publishing condition was met" in page.text
    output = Output(tmp_path / "early", evaluation={"tasks": {"coco": TASK}, "publishIf": "CIDEr > 0.2"})
    output.folder.mkdir()
    page, _ = build(output.train())
    assert "Training is not finished" not in page.text
    assert "cannot be told publishIf: CIDEr > 0.2; the trained model has not been evaluated yet" in page.text


def test_while_training_the_newest_checkpoint_is_shown(tmp_path: Path) -> None:
    page, files = build(Output(tmp_path).checkpoint(10).checkpoint(20))
    assert "Training is not finished The curves show what the newest checkpoint has: up to step 20." in page.text
    assert "loss.png" in files


def test_before_anything_has_run(tmp_path: Path) -> None:
    page, files = build(Output(tmp_path))
    assert set(files) == {"index.html"}
    assert "no step has been kept yet" in page.text
    assert "The data have not been checked" in page.text


def test_what_another_configuration_left_does_not_count(tmp_path: Path) -> None:
    output = evaluated(tmp_path)
    task = output.config.evaluation.tasks["coco"].model_copy(update={"prompt": "Another?"})
    evaluation = output.config.evaluation.model_copy(update={"tasks": {"coco": task}})
    record = read_record(StageStore(output.config.model_copy(update={"evaluation": evaluation}), output.storage))
    assert record.trained, "a changed evaluation repeats no training"
    assert (record.final, record.baseline, record.predictions) == ({}, {}, {"coco": (None, None)})


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        pytest.param("images/none.jpg", "images/none.jpg cannot be shown", id="absent"),
        pytest.param("../checkpoints/qwen2/config.json", "leaves the dataset's root", id="outside of the root"),
        pytest.param("/etc/passwd", "leaves the dataset's root", id="absolute"),
        pytest.param("samples.jsonl", "cannot be decoded", id="no picture"),
    ],
)
def test_a_picture_that_cannot_be_shown_says_why(tmp_path: Path, image: str, problem: str) -> None:
    output = Output(tmp_path, evaluation={"tasks": {"coco": TASK}}).train(2)
    page, _ = build(output.evaluate({"CIDEr": 1.0}, [prediction(0, "a fine caption", image=image)]))
    assert problem in page.text
    assert "a fine caption" in page.text
    assert len([address for address in page.pictures if "image/jpeg" in address]) == 0


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(Unavailable("StorageUnavailable", "the store does not answer"), id="object storage"),
        pytest.param(OSError("the disk does not answer"), id="a disk"),
    ],
)
def test_storage_that_is_away_costs_only_the_pictures(tmp_path: Path, failure: Exception) -> None:
    def away(_root: str, _path: str) -> bytes:
        raise failure

    output = evaluated(tmp_path)
    samples = choose_samples(read_record(output.stages), away)["coco"]
    assert len(samples) == 12
    assert {sample.picture_problem for sample in samples} == {f"images/photo.jpg cannot be shown: {failure}"}


def test_the_mark_of_the_picture_beside_it_is_left_out_of_a_question(tmp_path: Path) -> None:
    output = Output(tmp_path, evaluation={"tasks": {"coco": TASK}}).train(2)
    output.evaluate({"CIDEr": 1.0}, [prediction(0, question="<image>\nWhat is it?")])
    (sample,) = choose_samples(read_record(output.stages))["coco"]
    assert sample.question == "What is it?"


def test_rows_are_paired_by_what_they_are_and_text_needs_no_picture(tmp_path: Path) -> None:
    output = Output(tmp_path, evaluation={"tasks": {"coco": TASK}, "baseline": True}).train(2)
    before = [prediction(2, "two, before"), prediction(1, "one, before")]
    after = [prediction(1, "one, after"), prediction(2, "two, after", image=None), prediction(3, "three, after")]
    output.evaluate({"CIDEr": 0.5}, before, baseline=True).evaluate({"CIDEr": 1.0}, after)
    shown = choose_samples(read_record(output.stages), open_media)["coco"]
    assert [(each.before, each.after, each.picture is None) for each in shown] == [
        ("one, before", "one, after", False),
        (None, "two, after", True),
        (None, "three, after", False),
    ]


@pytest.mark.parametrize(
    ("gains", "count", "places"),
    [
        pytest.param([None] * 10, 4, [0, 2, 5, 7], id="without figures"),
        pytest.param([], 4, [], id="no rows"),
        pytest.param([0.5], 6, [0], id="one row"),
        pytest.param([0.1, 0.9, 0.5], 12, [1, 0, 2], id="few rows are all shown"),
        pytest.param([0, 9, 1, 8, 2, 7, 3, 6, 4, 5], 6, [1, 3, 0, 2, 4, 7], id="most, least, between"),
        pytest.param([1.0, 1.0, 1.0, 1.0], 3, [0, 3, 1], id="ties go by place"),
        pytest.param([None, 2.0, None, 1.0], 3, [1, 3, 0], id="some have none"),
    ],
)
def test_rows_are_chosen_by_their_gain(gains: list[float | None], count: int, places: list[int]) -> None:
    assert [place for place, _ in choose_rows(gains, count)] == places


@pytest.mark.parametrize(
    ("gains", "reasons"),
    [
        pytest.param([3.0, 2.0, 1.0], ["largest gain", "smallest gain", "from across the set"], id="gains"),
        pytest.param([0.0, 0.0, 0.0], ["no gain", "from across the set", "from across the set"], id="all the same"),
        pytest.param([-1.0, -2.0, -3.0], ["largest loss", "from across the set", "from across the set"], id="losses"),
    ],
)
def test_only_a_gain_is_called_one(gains: list[float | None], reasons: list[str]) -> None:
    assert [why for _, why in choose_rows(gains, 3)] == reasons


def test_boxes_are_drawn_on_the_picture_of_a_sample(tmp_path: Path) -> None:
    output = Output(tmp_path, evaluation={"tasks": {"coco": TASK}}).train(2)
    box = "<box>[[100, 100, 900, 900]]</box>"
    plain, boxed = (prediction(number, references=[text]) for number, text in enumerate(("a cat", box)))
    output.evaluate({"box_accuracy": 0.0}, [plain, boxed])
    first, second = choose_samples(read_record(output.stages))["coco"]
    assert (first.boxes, second.boxes) == ((), ("reference",))
    assert first.picture != second.picture


def test_the_condition_is_said_once(tmp_path: Path) -> None:
    page, _ = build(evaluated(tmp_path, publish_if="CIDEr > baseline.CIDEr"))
    assert page.text.partition("The whole configuration")[0].count("CIDEr > baseline.CIDEr") == 1


def test_many_tasks_share_the_pictures(tmp_path: Path) -> None:
    tasks = {f"t{number}": TASK for number in range(20)}
    output = Output(tmp_path, evaluation={"tasks": tasks}).train(2)
    output.evaluate({"CIDEr": 1.0}, [prediction(number, cider=0.1) for number in range(9)], task="t7")
    record = read_record(output.stages)
    rows = record.predictions["t7"]
    everywhere = record.__class__(config=record.config, predictions=dict.fromkeys(tasks, rows))
    assert {len(shown) for shown in choose_samples(everywhere).values()} == {3}


def test_one_step_and_one_figure_can_be_drawn(tmp_path: Path) -> None:
    output = Output(tmp_path, evaluation={"tasks": {"coco": TASK}}).train(1).evaluate({"box_accuracy": 0.0}, [])
    page, files = build(output)
    assert len(files) == 5
    assert "box_accuracy – 0.0000" in page.text


def test_findings_are_counted_and_the_first_shown(tmp_path: Path) -> None:
    finding = {
        "severity": "warning",
        "reason": "LengthMismatch",
        "dataset": "golden",
        "field": "image",
        "file": "a.jsonl",
    }
    found = [{**finding, "line": line, "message": f"message {line}"} for line in range(1, 41)]
    page, _ = build(Output(tmp_path).preflight(*found))
    assert "warning LengthMismatch golden 40" in page.text
    assert "a.jsonl:30 image message 30" in page.text
    assert "message 31" not in page.text
    assert "10 more are in preflight.json." in page.text


def test_smoothing_is_a_mean_of_neighbours() -> None:
    values = np.array([1.0, 2.0, 6.0, 4.0, 7.0])
    assert smoothed(values, 0).tolist() == values.tolist()
    assert smoothed(values, 1).tolist() == pytest.approx([1.5, 3.0, 4.0, 17 / 3, 5.5])


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "below 1 s"), (42.4, "42 s"), (754, "12 min 34 s"), (100_000, "27 h 46 min")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stage_writes_it_into_the_output(tmp_path: Path) -> None:
    output = evaluated(tmp_path)
    uri = write_report(output.stages, "stages/evaluate/report")
    assert uri == f"{output.config.output}/stages/evaluate/report/index.html"
    stored = {file.key.rpartition("/")[2] for file in output.storage.list("stages/evaluate/report/")}
    assert stored == {"index.html", "metrics.png", "loss.png", "learning-rate.png", "throughput.png"}


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    output = evaluated(tmp_path)
    first = build(output)[1]["index.html"].read_bytes()
    assert build(output)[1]["index.html"].read_bytes() == first


def test_the_command_writes_page_and_card(tmp_path: Path) -> None:
    output = evaluated(tmp_path)
    path = write_config(output.config, tmp_path)
    target = tmp_path / "here"
    arguments = ["report", "--config", str(path), "--out", str(target)]
    with started(arguments, environment(tmp_path), tmp_path / "result") as command:
        assert command.wait() == ExitCode.OK, command.output
    assert f"{target}/index.html" in command.lines
    assert {path.name for path in target.iterdir()} >= {"index.html", "README.md", "loss.png"}


def test_the_command_refuses_the_output_of_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = evaluated(tmp_path)
    StageStore(output.config.model_copy(update={"method": "full"}), output.storage).claim_output()
    config = write_config(output.config, tmp_path)
    assert main(["report", "--config", str(config), "--out", str(tmp_path / "here")]) == ExitCode.USER_ERROR
    assert capsys.readouterr().err.startswith("OutputHoldsAnotherRun: spec.output: ")
    assert not (tmp_path / "here").exists()


def test_the_command_on_a_broken_output_says_so(tmp_path: Path) -> None:
    output = evaluated(tmp_path)
    (tmp_path / "out" / "stages" / "train" / "metrics.jsonl").unlink()
    path = write_config(output.config, tmp_path)
    with started(["report", "--config", str(path)], environment(tmp_path), tmp_path / "result") as command:
        assert command.wait() == ExitCode.USER_ERROR
    assert "NotFound: " in command.output
    assert "stages/train/metrics.jsonl" in command.output
    assert "Traceback" not in command.output
