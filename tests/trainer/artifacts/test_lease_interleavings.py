"""Two runs with one output, whose attempts are killed, cut off and delayed: fifty seeded histories in virtual time.

A killed process stops anywhere, also with a request under way. One that is cut off goes on while its successor runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from internvl_trainer.artifacts import manifest as manifests
from internvl_trainer.artifacts.fenced_storage import FencedStorage, raising_lease_loss
from internvl_trainer.artifacts.lease_record import Owner, parse_lease
from internvl_trainer.artifacts.output_layout import LEASE_FILE
from internvl_trainer.artifacts.output_lease import OutputLease
from internvl_trainer.artifacts.storage import ConditionsUnsupported, FolderStorage, StoredFile, Tagged
from internvl_trainer.errors import LeaseLost, UserError
from internvl_trainer.train import checkpoint as checkpoint_module
from internvl_trainer.train.checkpoint import Checkpoints
from trainer.contexts import Alone

from .virtual_time import Actor, Killed, Simulation, VirtualLock

STEPS, EVERY, KEEP = 60, 5, 2
STAGE = "stages/merge"
DISTURBANCES = 6
LIMIT = 20_000.0  # virtual seconds
PROMPT, SLOW = 1.0, 60.0  # the longest delay of a request


def at_once(work: Callable[[], Any]) -> Future[Any]:
    """Does the work before it returns, in this actor: virtual time knows no threads."""
    future: Future[Any] = Future()
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001 - as of a thread
        future.set_exception(error)
    return future


class Spied(FolderStorage):
    """Files in memory. A request takes effect after a delay, and its answer takes another.

    A killed writer's request may still take effect.
    """

    def __init__(self, simulation: Simulation, slowest: float, *, conditional: bool) -> None:
        super().__init__(Path("/nowhere"), field="spec.output")
        self._simulation, self._slowest, self._conditional = simulation, slowest, conditional
        self.files: dict[str, bytes] = {}
        self.epochs: dict[str, int] = {}  # of actors
        self.taken: list[tuple[float, int]] = []  # when a lease with this epoch was stored
        self.late = 0.0  # the longest time after a takeover in which an earlier writer changed something
        self.newest_step = 0  # of the checkpoints that a holder of the lease has committed

    def list(self, prefix: str = "") -> Iterator[StoredFile]:
        self._delay()
        found = [StoredFile(key, len(self.files[key]), "") for key in sorted(self.files) if key.startswith(prefix)]
        self._delay()
        yield from found

    def stat(self, key: str) -> StoredFile | None:
        self._delay()
        return StoredFile(key, len(self.files[key]), "") if key in self.files else None

    def read(self, key: str) -> bytes:
        self._delay()
        data = self.files.get(key)
        self._delay()
        if data is None:
            raise UserError("NotFound", f"found no {key}")
        return data

    def read_tagged(self, key: str) -> Tagged | None:
        self._delay()
        data = self.files.get(key)
        self._delay()
        return Tagged(data, hashlib.sha256(data).hexdigest()) if data is not None else None

    def download(self, key: str, path: Path) -> None:
        path.write_bytes(self.read(key))

    def write(self, key: str, data: bytes) -> None:
        self._change(lambda: self._put(key, data))

    def replace(self, key: str, data: bytes, *, expected: str | None) -> str | None:
        if not self._conditional:
            raise ConditionsUnsupported("made by the test")

        def put() -> str | None:
            found = self.files.get(key)
            if (hashlib.sha256(found).hexdigest() if found is not None else None) != expected:
                return None
            self._put(key, data)
            return hashlib.sha256(data).hexdigest()

        return self._change(put)  # type: ignore[no-any-return]

    def upload(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        data = path.read_bytes()
        self._change(lambda: self._put(key, data))

    def delete(self, prefix: str) -> None:
        for key in [file.key for file in self.list(prefix)]:
            self._change(lambda key=key: self._remove(key))

    def complete(self) -> dict[str, int]:
        """The folders of checkpoints that are whole, to their step."""
        found = {}
        for key in self.files:
            folder, _, name = key.rpartition("/")
            if name == "manifest.json" and folder != STAGE:
                manifest = json.loads(self.files[key])
                stored = {file["sha256"]: self.files.get(f"{folder}/{file['path']}") for file in manifest["files"]}
                for digest, data in stored.items():
                    assert data is None or hashlib.sha256(data).hexdigest() == digest, f"{folder} was damaged"
                if None not in stored.values():
                    found[folder] = manifest["step"]
        return found

    def mixed(self) -> list[str]:
        """Files of the stage that are not as its manifest says."""
        manifest = json.loads(self.files[f"{STAGE}/manifest.json"])
        stored = {file["path"]: self.files.get(f"{STAGE}/{file['path']}", b"") for file in manifest["files"]}
        return [
            file["path"]
            for file in manifest["files"]
            if hashlib.sha256(stored[file["path"]]).hexdigest() != file["sha256"]
        ]

    def _put(self, key: str, data: bytes) -> None:
        self.files[key] = data
        if key == LEASE_FILE:
            lease = parse_lease(data)
            assert lease is not None
            if not self.taken or self.taken[-1][1] != lease.epoch:
                self.taken.append((self._simulation.now(), lease.epoch))
            return
        self._note()
        if key.startswith("checkpoints/") and key.endswith("/manifest.json"):
            step, writer = json.loads(data)["step"], self.epochs[self._simulation.current.name]
            if writer == self.taken[-1][1]:  # the last request of a replaced writer is committed for nobody
                self.newest_step = max(self.newest_step, step)

    def _remove(self, key: str) -> None:
        self.files.pop(key, None)
        self._note()
        assert max(self.complete().values(), default=0) >= self.newest_step, f"deleting {key} lost a checkpoint"

    def _note(self) -> None:
        """Compare the writer with the holder of the lease."""
        mine = self.epochs[self._simulation.current.name]
        later = [when for when, epoch in self.taken if epoch > mine]
        if later:
            self.late = max(self.late, self._simulation.now() - later[0])

    def _change(self, effect: Any) -> Any:
        try:
            self._delay()
        except Killed:
            if self._simulation.random.random() < 0.5:  # the request was under way
                effect()
            raise
        result = effect()
        self._delay()
        return result

    def _delay(self) -> None:
        random = self._simulation.random
        slow = random.random() < 0.03
        self._simulation.pause(random.uniform(0, self._slowest) if slow else random.uniform(0, 0.2))


class Run:
    """A run under an operator: its attempts, one after the other, some of which live on when they should not."""

    def __init__(self, name: str, history: History) -> None:
        self.name, self.history, self.attempt, self.done = name, history, 0, False
        self._living: list[tuple[Actor, Actor | None]] = []

    def supervise(self) -> None:
        """Begin attempts until one succeeds; kill some, and cut others off."""
        simulation = self.history.simulation
        for number in range(1, 200):
            actor = simulation.start(f"{self.name}-{number}", lambda number=number: self._try(number))
            disturbed = number <= DISTURBANCES
            until = simulation.now() + simulation.random.expovariate(1 / 40) if disturbed else LIMIT
            while not actor.ended and simulation.now() < until:
                simulation.pause(1.0)
            if self.done:
                return
            if not actor.ended and simulation.random.random() < 0.6:
                self.history.kill(actor.name)  # else its node cannot be reached, and it goes on
            simulation.pause(simulation.random.uniform(0, 8) if disturbed else 20.0)
        raise AssertionError(f"{self.name} never ended")

    def _try(self, number: int) -> None:
        history = self.history
        simulation, storage = history.simulation, history.storage
        owner = Owner(self.name, f"uid of {self.name}", "train", number, process=None)
        lease = OutputLease(storage, owner, now=simulation.now, sleep=simulation.pause, tell=lambda _: None)
        lease._lock = VirtualLock(simulation)  # type: ignore[assignment]
        name = simulation.current.name
        try:
            lease.acquire()
            history.storage.epochs[name] = lease.epoch
            before = storage.newest_step
            ended: list[bool] = []
            history.hearts[name] = simulation.start(f"heart of {name}", lambda: _beat(simulation, lease, ended))
            with raising_lease_loss(lease):
                self._train(lease, before, name)
                self._merge(lease, name)
            ended.append(True)
            self.done = True
        except LeaseLost:
            history.lost += 1
        except UserError as error:
            if error.reason != "OutputInUse":
                raise
            history.refused += 1

    def _train(self, lease: OutputLease, before: int, name: str) -> None:
        history = self.history
        fenced = FencedStorage(history.storage, lease)
        checkpoints = Checkpoints(fenced, Alone(), fingerprint="f", keep=KEEP, epoch=lease.epoch, start=at_once)
        folder = history.folder / name
        folder.mkdir()
        step = checkpoints.restore(None, folder)
        lease.confirm()  # one that was replaced meanwhile may find less: the next attempt prunes
        assert step >= before, f"{name} went on from step {step}, though step {before} was committed"
        while step < STEPS:
            history.simulation.pause(history.simulation.random.uniform(1, 6))
            if history.simulation.random.random() < 0.05:
                history.simulation.pause(45)  # the process sleeps for longer than its lease
            step += EVERY
            (folder / "metrics.jsonl").write_text(f"{name} {step}", encoding="utf-8")
            checkpoints.save(None, step, {"metrics.jsonl": folder / "metrics.jsonl"})
            checkpoints.finish()

    def _merge(self, lease: OutputLease, name: str) -> None:
        """Store a stage's files, whose content tells the writer, and then their manifest, as the stages do."""
        fenced = FencedStorage(self.history.storage, lease)
        if manifests.read_manifest(fenced, STAGE) is not None:
            return
        manifests.discard(fenced, STAGE)
        files = []
        for number in range(4):
            self.history.simulation.pause(self.history.simulation.random.uniform(1, 6))
            path = self.history.folder / name / f"part-{number}"
            path.write_text(f"{name} {number}", encoding="utf-8")
            files.append(manifests.describe(path.name, path))
            fenced.upload(path, f"{STAGE}/{path.name}")
        manifests.commit(fenced, STAGE, files, "f")


def _beat(simulation: Simulation, lease: OutputLease, ended: list[bool]) -> None:
    try:
        while not ended:
            simulation.pause(lease.timing.beat)
            lease.renew()
        lease.release()
    except LeaseLost:
        pass


class History:
    """Two runs with one output, from a seed."""

    def __init__(self, seed: int, slowest: float, folder: Path, *, conditional: bool = True) -> None:
        self.simulation = Simulation(seed)
        self.storage = Spied(self.simulation, slowest, conditional=conditional)
        self.folder = folder / str(seed)
        self.folder.mkdir()
        self.hearts: dict[str, Actor] = {}
        self.actors: dict[str, Actor] = {}
        self.lost = self.refused = self.killed = 0
        for name in ("team-a/pets", "team-b/cats"):
            run = Run(name.replace("/", "."), self)
            self.simulation.start(f"operator of {name}", run.supervise)

    def kill(self, name: str) -> None:
        """End an attempt's process with its heartbeat, at once."""
        self.killed += 1
        self.simulation.kill(name)
        if name in self.hearts:
            self.simulation.kill(f"heart of {name}")


@pytest.fixture(autouse=True)
def without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of the metrics log only."""
    monkeypatch.setattr(checkpoint_module, "local_fragments", lambda *_: [])
    monkeypatch.setattr(checkpoint_module, "trainable_shapes", lambda _: {})
    monkeypatch.setattr(checkpoint_module, "set_optimizer_step", lambda *_: None)
    monkeypatch.setattr(checkpoint_module, "use_restored_weights", lambda _: None)


@pytest.mark.parametrize("slowest", [pytest.param(PROMPT, id="prompt requests"), pytest.param(SLOW, id="slow ones")])
@pytest.mark.parametrize(
    "seeds", [pytest.param(range(3), id="few"), pytest.param(range(3, 25), id="many", marks=pytest.mark.slow)]
)
def test_never_two_writers_and_never_a_lost_checkpoint(seeds: range, slowest: float, tmp_path: Path) -> None:
    killed = lost = refused = 0
    for seed in seeds:
        history = History(seed, slowest, tmp_path)
        history.simulation.run(LIMIT)
        storage = history.storage
        assert max(storage.complete().values()) == STEPS, seed
        if slowest == PROMPT:
            assert storage.mixed() == [], f"{seed}: files of two writers in one stage"
            assert storage.late <= 4 * PROMPT, f"{seed}: a writer went on {storage.late:.1f} s after it was replaced"
        killed, lost, refused = killed + history.killed, lost + history.lost, refused + history.refused
    assert min(killed, lost, refused) >= len(seeds) / 2, "the histories have what they are about"


def test_without_conditional_writes_there_is_one_writer_while_requests_are_prompt(tmp_path: Path) -> None:
    for seed in range(5):
        history = History(seed, PROMPT, tmp_path, conditional=False)
        history.simulation.run(LIMIT)
        assert history.storage.late <= 4 * PROMPT, seed
        assert max(history.storage.complete().values()) == STEPS
