"""What the stages of one run keep in storage: where, under which fingerprint, and whether a stage is done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internvl_api.pipeline import stage_names
from internvl_api.run_config import RunConfig
from internvl_api.status import StageName, StageResult

from internvl_trainer.artifacts import manifest as manifests
from internvl_trainer.artifacts.cache import digest_of
from internvl_trainer.artifacts.fingerprint import fingerprint, first_difference, identity
from internvl_trainer.artifacts.inputs import TASKS, Versions, describe_inputs, first_changed, training_prefixes
from internvl_trainer.artifacts.manifest import Manifest, ManifestError, ManifestFile
from internvl_trainer.artifacts.output_layout import RUN_FILE
from internvl_trainer.artifacts.storage import Storage
from internvl_trainer.errors import UserError

# Stages that read annotation files, with the prefixes of the fields that name these; () is every field.
_READS_ROWS: dict[StageName, tuple[str, ...]] = {
    "preflight": (),
    "baseline-evaluate": (TASKS,),
    "baseline-score": (TASKS,),
    "evaluate": (TASKS,),
    "score": (TASKS,),
}


def stages_of(config: RunConfig) -> tuple[StageName, ...]:
    """The stages of this run, in their order."""
    return stage_names(config)


def stage_key(stage: StageName, path: str = "") -> str:
    """The storage key, under any output, of a stage's folder or of a path in it."""
    return f"stages/{stage}/{path}" if path else f"stages/{stage}"


class StageStore:
    """The stages of one run under its output. A stage is done when its manifest has this run's fingerprint."""

    def __init__(self, config: RunConfig, storage: Storage) -> None:
        self.config, self.storage = config, storage
        self._inputs: Versions | None = None

    def key(self, stage: StageName, path: str = "") -> str:
        """The storage key of a stage's folder, or of a path in it."""
        return stage_key(stage, path)

    def uri(self, stage: StageName, path: str = "") -> str:
        """The same as a URI, for messages and results."""
        return f"{self.storage.uri}/{self.key(stage, path)}"

    def fingerprint(self, stage: StageName) -> str:
        """The digest of what decides this stage's result."""
        return fingerprint(self.config, stage)

    @property
    def inputs(self) -> Versions:
        """The versions of the annotation files, looked up once by this store or by rank 0."""
        if self._inputs is None:
            self._inputs = describe_inputs(self.config)
        return self._inputs

    def use_inputs(self, inputs: Versions) -> None:
        """Set the versions to those that another rank has looked up."""
        self._inputs = inputs

    def task_version(self, stage: StageName) -> str:
        """The stage's fingerprint with a digest of the tasks' annotation files: answers to other rows are not its."""
        tasks = {name: version for name, version in self.inputs.items() if name.startswith(TASKS)}
        return self.fingerprint(stage) + digest_of(json.dumps(tasks, sort_keys=True))

    def manifest(self, stage: StageName) -> Manifest | None:
        """The manifest of a stage that is done for this configuration. Raises ManifestError for a broken one."""
        found = manifests.read_manifest(self.storage, self.key(stage))
        return found if found is not None and found.fingerprint == self.fingerprint(stage) else None

    def find(self, stage: StageName) -> Manifest | None:
        """The same, with None for a broken one: the stage has to be done again."""
        try:
            return self.manifest(stage)
        except ManifestError:
            return None

    def has_manifest(self, stage: StageName) -> bool:
        """Whether any run has finished this stage here, whatever its configuration."""
        return self.storage.stat(self.key(stage, manifests.MANIFEST)) is not None

    def require(self, stage: StageName) -> Manifest:
        """The manifest of a stage that must be done. Raises UserError when it is not."""
        found = self.manifest(stage)
        if found is None:
            raise UserError(
                "StageMissing",
                f"found no finished {stage} stage of this run under {self.storage.uri}; "
                f"run `internvl-trainer {stage}` first",
                "spec.output",
            )
        return found

    def result(self, stage: StageName) -> StageResult | None:
        """The result of an earlier attempt that finished the stage."""
        found = self.find(stage)
        if found is None or self._has_other_inputs(stage, found):
            return None
        return StageResult(
            stage=stage,
            outcome="succeeded",
            reason="AlreadyDone",
            message=f"done at {found.created}",
            progress=found.extra.get("progress"),
            artifacts=found.extra.get("artifacts", {}),
            evaluation=found.extra.get("evaluation"),
        )

    def upload(self, stage: StageName, files: Mapping[str, Path]) -> list[ManifestFile]:
        """Store local files in the stage's folder; their entries for its manifest."""
        return manifests.upload_files(self.storage, self.key(stage), files)

    def commit(self, stage: StageName, files: list[ManifestFile], **extra: Any) -> Manifest:
        """Write the manifest of files that are already stored; the stage is done from here on."""
        if stage in _READS_ROWS:
            extra["inputs"] = self.inputs
        return manifests.commit(self.storage, self.key(stage), files, self.fingerprint(stage), **extra)

    def fetch(self, stage: StageName, files: Iterable[ManifestFile], target: Path) -> None:
        """Download files of a stage into `target` and check them. Raises ManifestError for one that differs."""
        manifests.fetch_files(self.storage, self.key(stage), files, target)

    def check_sizes(self, stage: StageName, manifest: Manifest) -> None:
        """Raises ManifestError for the first file of the stage that is absent or has another size."""
        manifests.check_sizes(self.storage, self.key(stage), manifest)

    def discard(self, stage: StageName) -> None:
        """Delete everything that an earlier attempt left of the stage, its manifest first."""
        manifests.discard(self.storage, self.key(stage))

    def withdraw(self, stage: StageName) -> None:
        """Delete only the manifest: the stage is no longer done, its files stay."""
        self.storage.delete(self.key(stage, manifests.MANIFEST))

    def claim_output(self) -> None:
        """Record the run that owns the output, before its first checkpoint is stored."""
        document = {
            "job": self.config.job,
            "fingerprint": self.fingerprint("train"),
            "identity": identity(self.config),
            "inputs": self.inputs,
        }
        self.storage.write(RUN_FILE, json.dumps(document, indent=1, sort_keys=True).encode())

    def check_output(self, *, reads_rows: bool = False) -> None:
        """Raises UserError when another run has already stored checkpoints or results here.

        With `reads_rows` also when this run has, from annotation files that have changed since.
        """
        found = self.storage.read_tagged(RUN_FILE)
        if found is None:
            return
        place = f"{self.storage.uri}/{RUN_FILE}"
        try:
            stored = json.loads(found.data)
            other, owner, inputs = stored["identity"], stored["job"], dict(stored.get("inputs", {}))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "OutputHoldsAnotherRun",
                f"{place} cannot be read ({error!r}); choose another output or delete that one",
                "spec.output",
            ) from error
        difference = first_difference(other, identity(self.config))
        if difference is not None:
            field, theirs, ours = difference
            raise UserError(
                "OutputHoldsAnotherRun",
                f"{self.storage.uri} holds the run of {owner}, which differs in spec.{field}: it has "
                f"{_shown(theirs)}, this run {_shown(ours)}; choose another output, or delete that one",
                "spec.output",
            )

        if reads_rows and (changed := first_changed(inputs, self.inputs, *training_prefixes(self.config))):
            raise UserError(
                "InputChanged",
                f"spec.{changed} has changed since {self.storage.uri} was begun with it; to train on the new file "
                f"choose another output or delete that one, to go on put the old file back",
                "spec.data",
            )

    def check_preflight_inputs(self) -> None:
        """Raises UserError when a file that preflight checked has changed since."""
        found = self.find("preflight")
        recorded = found.extra.get("inputs", {}) if found else {}
        if changed := first_changed(recorded, self.inputs, *training_prefixes(self.config)):
            message = f"spec.{changed} has changed since preflight checked it; run preflight again"
            raise UserError("InputChanged", message, "spec.data")

    def _has_other_inputs(self, stage: StageName, found: Manifest) -> bool:
        """Whether the files that a finished stage read have changed; older manifests do not record them."""
        prefixes = _READS_ROWS.get(stage)
        return prefixes is not None and bool(first_changed(found.extra.get("inputs", {}), self.inputs, *prefixes))


def _shown(value: Any) -> str:
    return "the default" if value is None else repr(value)
