"""Caption figures by pycocoevalcap: BLEU, METEOR, ROUGE_L and CIDEr, as COCO's evaluation computes them.

Two of its parts are Java programs. Its wrapper of the tokenizer writes into its own package folder, which may be
read-only: here the same jar is given the text on stdin.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_trainer.errors import UserError

_TOKENIZER = "edu.stanford.nlp.process.PTBTokenizer"

Scores = tuple[dict[str, float], list[dict[str, float]]]
"""Figures of all rows together, and of each."""


def check_tools() -> None:
    """Raises UserError when the package or a Java runtime is missing: better before any answer is generated."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise UserError(
            "ScorerMissing",
            "captions are scored by pycocoevalcap, which is not installed; pip install 'internvl-trainer[eval]', or "
            "use the trainer's image",
            "spec.evaluation.tasks",
        )
    if shutil.which("java") is None:
        raise UserError(
            "JavaMissing",
            "captions are scored by programs that need a Java runtime, and there is no `java` on the PATH; install one "
            "(Debian: apt-get install default-jre-headless), or use the trainer's image",
            "spec.evaluation.tasks",
        )


def score_captions(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Figures under their names in publishIf. Raises UserError where a tool is missing or fails."""
    check_tools()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    candidates = dict(enumerate(_tokenize([[prediction] for prediction in predictions])))
    wanted = dict(enumerate(_tokenize(references)))
    if not any(map(any, wanted.values())):
        raise UserError("ReferenceEmpty", "no reference has a word in it, but punctuation", "spec.evaluation.tasks")
    totals: dict[str, float] = {}
    rows: list[dict[str, float]] = [{} for _ in predictions]

    def add(name: str, total: Any, each: Any) -> None:
        totals[name] = float(total)
        for row, value in zip(rows, each, strict=True):
            row[name] = float(value)

    bleu, each_bleu = Bleu(4).compute_score(wanted, candidates, verbose=0)
    for order in range(4):
        add(f"BLEU_{order + 1}", bleu[order], each_bleu[order])
    for name, scorer in (("METEOR", Meteor), ("ROUGE_L", Rouge), ("CIDEr", Cider)):
        add(name, *_computed(name, scorer, wanted, candidates))
    return totals, rows


def _computed(name: str, scorer: Any, wanted: dict[int, list[str]], candidates: dict[int, list[str]]) -> Any:
    try:
        return scorer().compute_score(wanted, candidates)
    except (OSError, ValueError) as error:  # METEOR's program ended, or answered with no number
        hint = "; its Java program needs about 1.2 GB of memory" if name == "METEOR" else ""
        message = f"{name} could not be computed ({error}){hint}"
        raise UserError("ScorerFailed", message, "spec.evaluation.tasks") from error


def _tokenize(captions: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each caption as words of the Penn Treebank, lower case, a space between them, without punctuation."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    folder = Path(ptbtokenizer.__file__).parent
    command = ["java", "-cp", str(folder / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR), _TOKENIZER]
    flat = [" ".join(caption.split()) for group in captions for caption in group]  # a line of its own for each
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input="\n".join([*flat, ""]).encode(), capture_output=True
    )
    lines = done.stdout.decode().split("\n")[:-1]
    if done.returncode or len(lines) != len(flat):
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        message = f"the tokenizer gave {len(lines)} lines for {len(flat)} captions (exit {done.returncode}: {last})"
        raise UserError("ScorerFailed", message, "spec.evaluation.tasks")
    words = iter(" ".join(word for word in line.split() if word not in ptbtokenizer.PUNCTUATIONS) for line in lines)
    return [[next(words) for _ in group] for group in captions]
