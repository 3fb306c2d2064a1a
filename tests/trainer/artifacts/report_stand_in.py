"""A stand-in of internvl_trainer.report: publishing is tested here, drawing elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import internvl_trainer
from internvl_trainer.stage_store import StageStore

PAGE = b"<!doctype html><title>stand-in</title>"
CARD = "---\nbase_model: OpenGVLab/InternVL2-2B\ntags:\n- internvl\n---\n# A model card\n"
HUB_CARD = CARD.replace("A model card", "A model card for the Hub")


def _build_report(_stages: StageStore, target: Path) -> list[Path]:
    (target / "index.html").write_bytes(PAGE)
    (target / "loss.png").write_bytes(b"\x89PNG stand-in")
    return [target / "index.html", target / "loss.png"]


def _write_report(stages: StageStore, folder: str) -> str:
    stages.storage.write(f"{folder}/index.html", PAGE)
    return f"{stages.storage.uri}/{folder}/index.html"


def stand_ins() -> dict[str, ModuleType]:
    """Modules by name."""
    package = ModuleType("internvl_trainer.report")
    package.__path__ = [str(Path(internvl_trainer.__path__[0], "report"))]  # what draws nothing is the real one
    run, card = ModuleType("internvl_trainer.report.build"), ModuleType("internvl_trainer.report.model_card")
    run.build_report = _build_report  # type: ignore[attr-defined]
    run.write_report = _write_report  # type: ignore[attr-defined]
    card.model_card = lambda _stages: CARD  # type: ignore[attr-defined]
    card.hub_card = lambda _stages: HUB_CARD  # type: ignore[attr-defined]
    return {package.__name__: package, run.__name__: run, card.__name__: card}


def main() -> int:
    """The trainer's command line with the stand-in in place."""
    sys.modules.update(stand_ins())
    from internvl_trainer.__main__ import main as trainer

    return trainer()


if __name__ == "__main__":
    sys.exit(main())
