"""The program kubectl-ivft, which kubectl runs for `kubectl ivft …`."""

import argparse
import io
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, get_args

from internvl_api.status import StageName
from rich.console import Console

from internvl_operator.clock import utc_now
from internvl_operator.core.run import read_status
from internvl_operator.core.telemetry import printable
from internvl_operator.kubectl_ivft import completion, cost, diff, events, logs, mirror, render, report, wait
from internvl_operator.kubectl_ivft.client import Place, Runs, UserError
from internvl_operator.kubectl_ivft.explain import explain, is_queued, where_it_continues
from internvl_operator.kubectl_ivft.terminal import plain_line

_ABOUT = "List, explain, compare, suspend and resume InternVLFineTunes."
_EXAMPLES = """\
examples:
  kubectl ivft list -A                  every run you may see, with what blocks it
  kubectl ivft status coco-lora         stages, progress, figures, artifacts, conditions
  kubectl ivft why coco-lora            the reason it does not run, and the next step
  kubectl ivft events coco-lora         what happened to it and its pods, one line for each cause
  kubectl ivft logs coco-lora -f        the log of rank 0, through all stages, until the run ends
  kubectl ivft logs coco-lora --rank 3 --stage train --tail 100
  kubectl ivft wait coco-lora --timeout 24h && echo published
  kubectl ivft cost coco-lora --price 2.5
  kubectl ivft diff coco-lora coco-full where their configurations differ, recipes and defaults included
  kubectl ivft suspend coco-lora        save a checkpoint and free every GPU
  kubectl ivft report coco-lora --out report.html
  kubectl ivft mirror --recipe internvl3-8b-lora    what to bring into a cluster without the Internet

It uses your own rights: get and list on internvlfinetunes, list on pods and events, get on pods/log, and get on
workloads for Kueue's reason; suspend and resume need patch on internvlfinetunes. The exit code is 1 after an error;
`wait` ends with 0 for a succeeded run, 3 for a failed one, 4 for a suspended one, and 5 when the time is over.
"""
_PIPED = 120  # columns of `status` in a file or another program
_WIDE = 10_000  # of all other output there: programs read its lines, so no line is folded

_DETAILS = {  # more than a line of help, by command
    "wait": "Prints each change. Exit codes: 0 succeeded, 3 failed, 4 suspended, 5 time over, 1 error.",
    "events": "Equal events are one line with a count, also when several workers had them; the newest are last, and "
    "warnings are marked with !. A cluster keeps events for an hour by default.",
    "cost": "Reads the times in the run's status: an attempt counts from its first pod on a node to its end. The "
    "seconds in which its pods then terminate are not counted. GPUs are those that the pods request.",
    "diff": "Compares what the trainer gets: the specs with the settings of their recipes and all defaults. A dash "
    "stands for a field without a value. Addresses are compared without their queries.",
    "mirror": "Lists images, release files, lock files, models and published data, and asks no server. An address is "
    "never broken, at any width.",
    "completion": "Load it with `source <(kubectl-ivft completion bash)`, or zsh, or with `kubectl-ivft completion "
    "fish | source`. kubectl completes `kubectl ivft` by itself when kubectl_complete-ivft is on the PATH.",
}

Options = argparse.Namespace
Act = Callable[[Runs, argparse.Namespace, Console], int | None]
_Parser = argparse.ArgumentParser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 with a message on stderr, or that of `wait`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == [completion.COMMAND]:
        return complete(words[1:])
    options = _parser().parse_args(words)
    try:
        if options.command == "completion":
            print(completion.SCRIPTS[options.shell], end="")
            return 0
        if options.command == "mirror":
            return _mirror(options)
        return run_command(_connect(options), options) or 0
    except UserError as error:
        print(f"kubectl ivft: {printable(str(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return 0


def complete(words: Sequence[str] | None = None) -> int:
    """Print the candidates for the last word; kubectl calls this as `kubectl_complete-ivft`."""
    for line in completion.answer(_parser(), sys.argv[1:] if words is None else words, _names):
        print(printable(line))
    return 0


def _names(before: list[str]) -> list[str]:
    """The names of the runs; none when the cluster does not answer, because a shell shows no errors."""
    place = _Parser(add_help=False, parents=[_place(None)], exit_on_error=False)
    try:
        options, _ = place.parse_known_args(before)
        return [raw["metadata"]["name"] for raw in _connect(options).all()]
    except (UserError, argparse.ArgumentError):
        return []


def _connect(options: Options) -> Runs:
    return Runs.connect(Place(options.kubeconfig, options.context, options.namespace))


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
    console.print(render.run_list(found, utc_now(), namespaces=options.all_namespaces))


def _status(runs: Runs, options: Options, console: Console) -> None:
    console.print(render.run_status(runs.get(options.name), utc_now()))


def _why(runs: Runs, options: Options, console: Console) -> None:
    raw = runs.get(options.name)
    status = read_status(raw.get("status") or {})
    queue = runs.queue_reason(options.name, status.stage, status.attempt) if status.stage and is_queued(status) else ""
    console.print(render.explanation(options.name, explain(raw, status, utc_now(), queue=queue)))


def _events(runs: Runs, options: Options, console: Console) -> None:
    found = events.causes(runs.get(options.name), runs.events())
    if found:
        console.print(render.event_list(found, utc_now()))
    else:
        print(f"no events of the run {options.name!r}; a cluster keeps them for an hour by default", file=sys.stderr)


def _cost(runs: Runs, options: Options, console: Console) -> None:
    status = read_status(runs.get(options.name).get("status") or {})
    lines = cost.lines(status.stages, utc_now())
    if lines:
        console.print(render.cost_table(lines, cost.price(status.usage) if options.price is None else options.price))
    else:
        print(f"the status of the run {options.name!r} lists no attempt: no pod has had a node yet", file=sys.stderr)


def _diff(runs: Runs, options: Options, console: Console) -> None:
    found = diff.differences(runs.get(options.name), runs.get(options.other))
    if found:
        console.print(render.difference_table(found, options.name, options.other))
    else:
        print(f"{options.name} and {options.other} have the same configuration", file=sys.stderr)


def _logs(runs: Runs, options: Options, _: Console) -> None:
    read = logs.follow if options.follow else logs.read
    lines = read(runs, options.name, stage=options.stage, rank=options.rank, tail=options.tail, tell=_tell)
    for line in lines:
        sys.stdout.buffer.write(plain_line(line) + b"\n")
        sys.stdout.buffer.flush()


def _wait(runs: Runs, options: Options, _: Console) -> int:
    def tell(line: str) -> None:
        print(printable(f"{options.name}: {line}"), flush=True)

    code = wait.wait(runs, options.name, timeout=options.timeout, tell=tell)
    if code == wait.TIMED_OUT:
        print(f"kubectl ivft: {options.name} has not ended after {options.timeout:.0f} s", file=sys.stderr)
    return code


def _nothing(_: Runs, __: Options, ___: Console) -> None:
    """`completion` needs no cluster."""


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


def _mirror(options: Options) -> int:
    found = mirror.entries(options.recipe, options.variant, options.registry)
    width = _console().width if sys.stdout.isatty() else _WIDE
    print(mirror.as_json(found) if options.output == "json" else mirror.text(found, width))
    return 0


def _tell(text: str) -> None:
    """Print to stderr, so that the log on stdout stays unchanged."""
    print(f"--- {printable(text)}", file=sys.stderr)


def _duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `24h`, `2d` or a plain number."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a time such as 90s, 30m or 24h")
    return float(int(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]])


def _price(text: str) -> float:
    """A price of one GPU-hour, in any currency."""
    if not re.fullmatch(r"[0-9]{1,9}([.][0-9]{1,6})?", text):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a price of one GPU-hour such as 2.5")
    return float(text)


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
    _add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands"))
    return parser


def _add_commands(commands: "argparse._SubParsersAction[_Parser]") -> None:
    def command(name: str, text: str, act: Act, *, named: bool = True) -> _Parser:
        about = f"{text[0].upper()}{text[1:]}. {_DETAILS.get(name, '')}"
        made = commands.add_parser(name, help=text, description=about, parents=[_place(argparse.SUPPRESS)])
        made.set_defaults(act=act)
        if named:
            made.add_argument("name", metavar="NAME", help="name of the InternVLFineTune")
        return made

    listing = command("list", "every run, with what blocks it", _list, named=False)
    listing.add_argument("-A", "--all-namespaces", action="store_true", help="list the runs of all namespaces")
    command("status", "stages, progress, figures, artifacts and conditions of a run", _status)
    command("why", "the reason a run does not run or has failed, and the next step", _why)
    command("events", "what happened to a run and its pods, one line for each cause", _events)
    pricing = command("cost", "GPU-hours of a run by stage and attempt", _cost)
    pricing.add_argument(
        "--price",
        type=_price,
        metavar="PRICE",
        help="price of a GPU-hour, such as 2.5; default: the operator's, if it has one",
    )
    comparing = command("diff", "the fields in which the configurations of two runs differ", _diff)
    comparing.add_argument("other", metavar="OTHER", help="name of the run to compare with")
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
    listed = command("mirror", "what a cluster without the Internet needs, by address", _nothing, named=False)
    only = "only for this recipe; may be repeated"
    listed.add_argument("--recipe", action="append", default=[], metavar="NAME", help=only)
    listed.add_argument("--variant", choices=mirror.VARIANTS, default="cu13", help="CUDA of the trainer's image")
    listed.add_argument("--registry", default="", metavar="HOST/PATH", help="put before the names of the images")
    listed.add_argument("-o", "--output", choices=("text", "json"), default="text", help="default: text")
    shell = command("completion", "the completion script of a shell", _nothing, named=False)
    shell.add_argument("shell", choices=completion.SHELLS, help="your shell")


if __name__ == "__main__":
    sys.exit(main())
