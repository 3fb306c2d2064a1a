"""The program kubectl-ivft, which kubectl runs for `kubectl ivft …`."""

import argparse
import io
import re
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, get_args

from internvl_api.status import StageName
from rich.console import Console

from internvl_operator.core.run import read_status
from internvl_operator.kubectl_ivft import logs, render, report, wait
from internvl_operator.kubectl_ivft.client import Place, Runs, UserError
from internvl_operator.kubectl_ivft.explain import explain, is_queued, where_it_continues
from internvl_operator.kubectl_ivft.terminal import plain, plain_line

_ABOUT = "List, explain, suspend and resume InternVLFineTunes."
_EXAMPLES = """\
examples:
  kubectl ivft list -A                  every run you may see, with what blocks it
  kubectl ivft status coco-lora         stages, progress, figures, artifacts, conditions
  kubectl ivft why coco-lora            the reason it does not run, and the next step
  kubectl ivft logs coco-lora -f        the log of rank 0, through all stages, until the run ends
  kubectl ivft logs coco-lora --rank 3 --stage train --tail 100
  kubectl ivft wait coco-lora --timeout 24h && echo published
  kubectl ivft suspend coco-lora        save a checkpoint and free every GPU
  kubectl ivft report coco-lora --out report.html

It uses your own rights: get and list on internvlfinetunes, list on pods, get on pods/log, and get on workloads for
Kueue's reason; suspend and resume need patch on internvlfinetunes. The exit code is 1 after an error; `wait` ends with
0 for a succeeded run, 3 for a failed one, 4 for a suspended one, and 5 when the time is over.
"""
_PIPED = 120  # columns of `status` in a file or another program
_WIDE = 10_000  # of all other output there: programs read its lines, so no line is folded

Options = argparse.Namespace
Act = Callable[[Runs, argparse.Namespace, Console], int | None]
_Parser = argparse.ArgumentParser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 with a message on stderr, or that of `wait`."""
    options = _parser().parse_args(argv)
    try:
        runs = Runs.connect(Place(options.kubeconfig, options.context, options.namespace))
        return run_command(runs, options) or 0
    except UserError as error:
        print(f"kubectl ivft: {plain(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0


def _console(file: IO[str] | None = None, width: int | None = None) -> Console:
    """A console that prints the text of others as it is: no markup, no emoji codes."""
    return Console(file=file, highlight=False, markup=False, emoji=False, width=width)


def run_command(runs: Runs, options: Options) -> int | None:
    """Run the command that the options name, and print what it shows; its exit code."""
    act: Act = options.act
    if sys.stdout.isatty():
        return act(runs, options, _console())
    text = io.StringIO()
    code = act(runs, options, _console(text, _PIPED if options.command == "status" else _WIDE))
    for line in text.getvalue().splitlines():
        print(line.rstrip())
    return code


def _list(runs: Runs, options: Options, console: Console) -> None:
    found = runs.all(everywhere=options.all_namespaces)
    if not found:
        where = "any namespace" if options.all_namespaces else f"namespace {runs.namespace!r}"
        print(f"no runs in {where}", file=sys.stderr)
        return
    console.print(render.run_list(found, _now(), namespaces=options.all_namespaces))


def _status(runs: Runs, options: Options, console: Console) -> None:
    console.print(render.run_status(runs.get(options.name), _now()))


def _why(runs: Runs, options: Options, console: Console) -> None:
    raw = runs.get(options.name)
    status = read_status(raw.get("status") or {})
    queue = runs.queue_reason(options.name, status.stage, status.attempt) if status.stage and is_queued(status) else ""
    console.print(render.explanation(options.name, explain(raw, status, _now(), queue=queue)))


def _logs(runs: Runs, options: Options, _: Console) -> None:
    read = logs.follow if options.follow else logs.read
    lines = read(runs, options.name, stage=options.stage, rank=options.rank, tail=options.tail, tell=_tell)
    for line in lines:
        sys.stdout.buffer.write(plain_line(line) + b"\n")
        sys.stdout.buffer.flush()


def _wait(runs: Runs, options: Options, _: Console) -> int:
    def tell(line: str) -> None:
        print(plain(f"{options.name}: {line}"), flush=True)

    code = wait.wait(runs, options.name, timeout=options.timeout, tell=tell)
    if code == wait.TIMED_OUT:
        print(f"kubectl ivft: {options.name} has not ended after {options.timeout:.0f} s", file=sys.stderr)
    return code


def _suspend(runs: Runs, options: Options, _: Console) -> None:
    run, wanted = runs.get(options.name), options.command == "suspend"
    status = read_status(run.get("status") or {})
    if status.phase == "Succeeded":
        raise UserError(f"cannot {options.command} the run {options.name!r}: it has succeeded")
    policy = (run.get("spec") or {}).get("runPolicy") or {}
    if bool(policy.get("suspend")) == wanted:
        print(f"{options.name}: spec.runPolicy.suspend is already {str(wanted).lower()}")
        return
    runs.set_suspended(options.name, wanted)
    if not wanted:
        print(f"{options.name}: resumes {where_it_continues(status)}")
    elif status.workers.active:
        print(f"{options.name}: {_SUSPENDED}")
    else:
        print(f"{options.name}: suspended; it has no running workers")


_SUSPENDED = "suspended; its workers save a checkpoint and terminate (kubectl ivft status shows when)"


def _report(runs: Runs, options: Options, _: Console) -> None:
    raw = runs.get(options.name)
    uri = report.location(options.name, read_status(raw.get("status") or {}))
    if options.out is None:
        print(uri)
    else:
        report.download(uri, options.out)
        print(f"{options.out}: {uri}")


def _tell(text: str) -> None:
    """Print to stderr, so that the log on stdout stays unchanged."""
    print(f"--- {plain(text)}", file=sys.stderr)


def _duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `24h`, `2d` or a plain number."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a time such as 90s, 30m or 24h")
    return float(int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]])


def _now() -> datetime:
    return datetime.now(UTC)


def _place(default: Any) -> _Parser:
    """Flags allowed before and after the command; `default` keeps one position from overriding the other."""
    place = _Parser(add_help=False)
    group = place.add_argument_group("cluster, as for kubectl")
    group.add_argument("-n", "--namespace", default=default, help="default: the context's")
    group.add_argument("--context", default=default, help="context of the kubeconfig; default: the current one")
    text = "default: KUBECONFIG, else ~/.kube/config"
    group.add_argument("--kubeconfig", metavar="FILE", default=default, help=text)
    return place


def _parser() -> _Parser:
    parser = _Parser(
        prog="kubectl ivft",
        parents=[_place(None)],
        description=_ABOUT,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    def command(name: str, text: str, act: Act, *, named: bool = True) -> _Parser:
        made = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", parents=[_place(argparse.SUPPRESS)]
        )
        made.set_defaults(act=act)
        if named:
            made.add_argument("name", metavar="NAME", help="name of the InternVLFineTune")
        return made

    listing = command("list", "every run, with what blocks it", _list, named=False)
    listing.add_argument("-A", "--all-namespaces", action="store_true", help="list the runs of all namespaces")
    command("status", "stages, progress, figures, artifacts and conditions of a run", _status)
    command("why", "the reason a run does not run or has failed, and the next step", _why)
    reading = command("logs", "the log of one worker", _logs)
    reading.add_argument("--rank", type=int, default=0, help="rank of the worker (pod) in its group; default: 0")
    reading.add_argument("--stage", choices=get_args(StageName), help="default: the current stage, or the last one")
    reading.add_argument(
        "-f", "--follow", action="store_true", help="continue over stages and attempts until the run ends"
    )
    reading.add_argument("--tail", type=int, metavar="LINES", help="only the last lines of the log")
    waiting = command("wait", "wait until a run has succeeded, failed or is suspended", _wait)
    waiting.add_argument("--timeout", type=_duration, metavar="TIME", help="such as 90s, 30m or 24h; default: no limit")
    command("suspend", "save a checkpoint and delete every pod", _suspend)
    command("resume", "continue a suspended run", _suspend)
    fetching = command("report", "the location of a finished run's report", _report)
    fetching.add_argument(
        "--out", type=Path, metavar="FILE", help="download it from S3, with AWS_* of your environment"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
