"""Shell completion: scripts for the shells, and the candidates that they and kubectl ask for."""

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

SHELLS = ("bash", "zsh", "fish")
COMMAND = "__complete"  # `kubectl-ivft __complete WORD…` prints the candidates for the last word
_FILES, _NO_FILES = ":0", ":4"  # the last line, as Cobra's completion ends: 4 is ShellCompDirectiveNoFileComp
_TAKES_A_FILE = ("--kubeconfig", "--out")

_BASH = """\
# bash completion of kubectl-ivft. kubectl itself completes `kubectl ivft`, when kubectl_complete-ivft is on the PATH.
_kubectl_ivft() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        case "$line" in
            :0) compopt -o default ;;
            :*) ;;
            *) COMPREPLY+=("${line%%$'\\t'*}") ;;
        esac
    done < <(kubectl-ivft __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _kubectl_ivft kubectl-ivft
"""
_ZSH = """\
#compdef kubectl-ivft
# zsh completion of kubectl-ivft. kubectl itself completes `kubectl ivft`, when kubectl_complete-ivft is on the PATH.
_kubectl_ivft() {
    local line
    local -a found
    for line in "${(@f)$(kubectl-ivft __complete "${(@)words[2,CURRENT]}" 2>/dev/null)}"; do
        case "$line" in
            :0) _files; return ;;
            :*) ;;
            *) found+=("${line/$'\\t'/:}") ;;
        esac
    done
    _describe 'kubectl ivft' found
}
compdef _kubectl_ivft kubectl-ivft
"""
_FISH = """\
# fish completion of kubectl-ivft. kubectl itself completes `kubectl ivft`, when kubectl_complete-ivft is on the PATH.
function __kubectl_ivft
    set -l words (commandline -opc) (commandline -ct)
    kubectl-ivft __complete $words[2..] 2>/dev/null | string match -v -r '^:'
end
complete -c kubectl-ivft -f -a '(__kubectl_ivft)'
complete -c kubectl-ivft -l out -l kubeconfig -r -F
"""
SCRIPTS = dict(zip(SHELLS, (_BASH, _ZSH, _FISH), strict=True))


class Candidate(NamedTuple):
    """A word that may come next, and its help."""

    word: str
    about: str = ""


def answer(parser: argparse.ArgumentParser, words: Sequence[str], runs: Callable[[list[str]], list[str]]) -> list[str]:
    """The lines that kubectl and the scripts expect: candidates for the last of `words`, then a directive.

    `runs`: the names of the runs, given the words before the last one, which may hold `-n`.
    """
    *before, typed = words or [""]
    option = _open_option(parser, before)
    found = [each for each in _candidates(parser, before, typed, option, runs) if each.word.startswith(typed)]
    directive = _FILES if option and set(option.option_strings) & set(_TAKES_A_FILE) else _NO_FILES
    return ["\t".join(filter(None, each)) for each in found] + [directive]


def _candidates(
    parser: argparse.ArgumentParser,
    before: list[str],
    typed: str,
    option: argparse.Action | None,
    runs: Callable[[list[str]], list[str]],
) -> Iterable[Candidate]:
    current, missing = _parse(parser, before)
    if option is not None:
        return [Candidate(str(choice)) for choice in option.choices or ()]
    if typed.startswith("-"):
        return _options(current)
    if not missing:
        return ()
    if missing[0].choices is not None:
        return _choices(missing[0])
    return [Candidate(name) for name in runs(before)]


def _parse(
    parser: argparse.ArgumentParser, before: Sequence[str]
) -> tuple[argparse.ArgumentParser, list[argparse.Action]]:
    """The parser of the command in these words, and its positional arguments that are still missing."""
    current, missing = parser, _positionals(parser)
    skip = False
    for word in before:
        if skip or word.startswith("-"):
            skip = not skip and _takes_a_value(current, word)
        elif missing and isinstance(missing[0].choices, dict):
            current = missing[0].choices.get(word, current)
            missing = _positionals(current) if current is not parser else []
        else:
            missing = missing[1:]
    return current, missing


def _open_option(parser: argparse.ArgumentParser, before: Sequence[str]) -> argparse.Action | None:
    """The option whose value comes next."""
    current, _ = _parse(parser, before)
    if not before or not _takes_a_value(current, before[-1]):
        return None
    return next(action for action in current._actions if before[-1] in action.option_strings)


def _takes_a_value(parser: argparse.ArgumentParser, word: str) -> bool:
    return any(word in action.option_strings and action.nargs is None for action in parser._actions)


def _positionals(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if not action.option_strings]


def _options(parser: argparse.ArgumentParser) -> Iterator[Candidate]:
    for action in parser._actions:
        for option in action.option_strings:
            if option.startswith("--"):
                yield Candidate(option, action.help or "")


def _choices(positional: argparse.Action) -> list[Candidate]:
    """The choices of a positional argument; argparse keeps the help of commands apart from their parsers."""
    if isinstance(positional.choices, dict):
        abouts = {entry.dest: entry.help or "" for entry in positional._get_subactions()}  # type: ignore[attr-defined]
        return [Candidate(name, abouts.get(name, "")) for name in positional.choices]
    return [Candidate(str(choice)) for choice in positional.choices or ()]
