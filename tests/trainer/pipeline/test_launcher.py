"""Several local processes: their ranks, the exit code that decides, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from internvl_api.constants import ExitCode
from internvl_api.status import StageResult
from internvl_trainer.cli.launcher import launch
from internvl_trainer.distributed import Rendezvous, free_port, prepare_environment, wait_for_master
from internvl_trainer.errors import Unavailable
from trainer.runs import environment, make_config, pod_environment, started, write_config

pytestmark = pytest.mark.slow


def two() -> Rendezvous:
    return Rendezvous("127.0.0.1", 29999, world_size=4, rank=2, local_rank=0, processes=2)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, sys, time, signal\nrank = os.environ['LOCAL_RANK']\n{code}"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param("", 0, id="all end well"),
        pytest.param("sys.exit(75)", 75, id="all stopped with state"),
        pytest.param("sys.exit(75 if rank == '1' else 0)", 75, id="one stopped"),
        pytest.param("sys.exit(65 if rank == '1' else 75)", 65, id="an error beats a stop"),
        pytest.param(
            "rank == '1' and os.kill(os.getpid(), signal.SIGKILL) or time.sleep(600)", 137, id="one is killed"
        ),
        pytest.param(
            "signal.signal(signal.SIGTERM, lambda *_: 0)\nif rank == '0': sys.exit(1)\ntime.sleep(1)\nsys.exit(65)",
            65,
            id="who knows why comes later",
        ),
        pytest.param("rank == '0' and sys.exit(69) or time.sleep(600)", 69, id="one fails, the other waits"),
    ],
)
def test_the_exit_code_that_decides(code: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_trainer.cli.launcher._PATIENCE_SECONDS", 3 if "sleep(1)" in code else 0.2)
    assert launch(python(code), two(), None) == expected


def test_abort_is_told_from_a_segmentation_fault_where_the_trainer_is_process_one(tmp_path: Path) -> None:
    """As in a container: the kernel keeps SIGABRT from process 1, and NCCL's watchdog ends a process by it."""
    config = write_config(make_config(str(tmp_path / "out")), tmp_path)
    code = f"""
import os, sys, internvl_trainer.cli.launcher as launcher
from internvl_trainer.__main__ import main
launcher.own_command = lambda *_: [sys.executable, "-c", "import os; os.abort()"]
assert os.getpid() == 1
sys.exit(main(["train", "--config", {str(config)!r}]))
"""
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", sys.executable, "-c", code]
    assert subprocess.run(alone, env=environment(tmp_path), timeout=120).returncode == 128 + signal.SIGABRT


def test_ranks_and_the_decisive_last_word(tmp_path: Path) -> None:
    result = tmp_path / "result"
    code = """
open(os.environ["INTERNVL_TERMINATION_LOG"], "w").write(f"{os.environ['RANK']} of {os.environ['WORLD_SIZE']}")
sys.exit(65 if rank == "1" else 0)
"""
    assert launch(python(code), two(), result) == ExitCode.USER_ERROR
    assert result.read_text() == "3 of 4"


ECC = "CUDA error: uncorrectable ECC error encountered"
LOST = '{"stage":"train","outcome":"failed","reason":"PeerLost","message":"gone","artifacts":{}}'


def test_why_a_process_was_aborted_comes_before_who_only_heard_of_it(tmp_path: Path) -> None:
    result = tmp_path / "result"
    code = f"""
if rank == "0":
    open(os.environ["INTERNVL_TERMINATION_LOG"], "w").write({LOST!r})
    sys.exit(1)
sys.stderr.write("[rank3]: watchdog thread terminated with exception: {ECC}\\n")
os.abort()
"""
    assert launch(python(code), two(), result, stage="evaluate") == 128 + signal.SIGABRT
    said = StageResult.model_validate_json(result.read_text())
    assert (said.stage, said.outcome, said.reason) == ("evaluate", "failed", "GpuHardwareError")
    assert said.message.startswith(f"rank 3: {ECC}; the GPU")


def test_a_process_that_is_aborted_without_a_known_word_has_none(tmp_path: Path) -> None:
    result = tmp_path / "result"
    assert launch(python("sys.stderr.write('no idea\\n'); os.abort()"), two(), result) == 128 + signal.SIGABRT
    assert not result.exists()


def test_what_processes_print_goes_on_while_they_run(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(python("sys.stderr.write('x' * 300_000 + '\\n'); print('from', rank)"), two(), None) == 0
    printed = capfd.readouterr()
    assert printed.err.count("x") == 600_000
    assert sorted(printed.out.split()) == ["0", "1", "from", "from"]


def test_a_child_that_keeps_the_pipe_open_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker of a DataLoader, whose process was aborted, does for some seconds."""
    monkeypatch.setattr("internvl_trainer.cli.launcher._DRAIN_SECONDS", 0.1)
    pids = tmp_path / "pids"
    code = f"import subprocess\nopen({str(pids)!r}, 'a').write(f'{{subprocess.Popen([\"sleep\", \"60\"]).pid}}\\n')"
    assert launch(python(code), two(), None) == 0
    for pid in pids.read_text().split():
        os.kill(int(pid), signal.SIGKILL)  # raises where it has ended


def test_output_comes_line_by_line() -> None:
    lines: list[str] = []
    launch(python("print('from', rank)"), two(), None, output=lines.append)
    assert sorted(lines) == ["from 0", "from 1"]


def test_sigterm_reaches_every_process(tmp_path: Path) -> None:
    code = f"""
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open({str(tmp_path)!r} + "/ready" + rank, "w")
time.sleep(600)
"""

    def terminate() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    assert launch(python(code), two(), None) == ExitCode.RESUME


def test_a_stop_while_others_are_waited_for_is_obeyed_at_once(tmp_path: Path) -> None:
    config = write_config(make_config("/unused", workers=2), tmp_path)
    env = environment(tmp_path, **pod_environment(0, 2, free_port()))
    with started(["train", "--config", str(config)], env, tmp_path / "result") as stage:
        stage.wait_for("waiting for the others")
        stage.stop(signal.SIGTERM)
        assert stage.wait(30) == ExitCode.RESUME
        assert stage.result.outcome == "resume"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        pytest.param({}, Rendezvous("127.0.0.1", 0, 1, 0, 0, 1), id="one machine"),
        pytest.param(
            {
                "MASTER_ADDR": "run-0.run",
                "MASTER_PORT": "29500",
                "WORLD_SIZE": "4",
                "RANK": "2",
                "PET_NPROC_PER_NODE": "2",
            },
            Rendezvous("run-0.run", 29500, 4, 2, 0, 2),
            id="the pod of node rank 1, as the operator writes it",
        ),
    ],
)
def test_rendezvous(variables: dict[str, str], expected: Rendezvous) -> None:
    assert Rendezvous.from_environment(variables) == expected
    again = expected.environment(expected.processes - 1)
    assert Rendezvous.from_environment(again).rank == expected.rank + expected.processes - 1


def test_a_master_that_never_comes_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_RENDEZVOUS_SECONDS", "0.3")
    with pytest.raises(Unavailable, match=r"rank 1 could not resolve 'nobody\.invalid'") as caught:
        wait_for_master(Rendezvous("nobody.invalid", 29500, 2, 1, 0, 1))
    assert caught.value.reason == "RendezvousTimeout"


def test_caches_go_to_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("TRITON_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME", "DS_ACCELERATOR", "USER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("os.environ", dict(os.environ))
    prepare_environment("cpu", 1)
    for name in ("TRITON_CACHE_DIR", "MPLCONFIGDIR", "HF_HOME"):
        assert os.environ[name].startswith(str(tmp_path))
    assert os.environ["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        pytest.param("cuda", {}, "expandable_segments:True", id="on a GPU"),
        pytest.param("cpu", {}, None, id="on the processor"),
        pytest.param("cuda", {"PYTORCH_ALLOC_CONF": "x:1"}, "x:1", id="the user's own"),
    ],
)
def test_blocks_of_gpu_memory_grow(
    device: str, given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", dict(given))
    prepare_environment(device, 1)
    assert os.environ.get("PYTORCH_ALLOC_CONF") == expected


@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["preflight", "--help"]])
def test_help_needs_no_torch(command: list[str]) -> None:
    code = "import sys; from internvl_trainer.__main__ import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules or 'boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: internvl-trainer" in done.stdout
