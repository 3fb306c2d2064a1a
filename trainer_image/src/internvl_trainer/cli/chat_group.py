"""Processes that hold one model together for `internvl-trainer chat`: the first talks, the others follow it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from internvl_trainer.distributed import Group, Rendezvous, free_port, join_group, prepare_environment
from internvl_trainer.errors import UserError
from internvl_trainer.signals import die_with_parent

if TYPE_CHECKING:
    from internvl_trainer.model.language_shard import LanguageShard


class Talk(Protocol):
    """A conversation, which is the same in every process."""

    def ask(self, question: str) -> str: ...


T = TypeVar("T", bound=Talk)


@dataclass(frozen=True)
class ChatGroup:
    """This process among those that hold the model; `group` is None where it is alone."""

    group: Group | None = None

    def shard(self, text: Any) -> LanguageShard | None:
        """This process's shard of a language model with the config `text`. All processes call it."""
        if self.group is None:
            return None
        from internvl_trainer.model.language_shard import LanguageShard

        size = self.group.world_size
        return LanguageShard(self.group.rank, size, text, self.group.neighbours(size))

    def ask(self, talk: Talk, question: str) -> str:
        """The answer, for which every process computes its part. Only the first process calls it."""
        if self.group is not None:
            self.group.first(question)
        return talk.ask(question)


@contextmanager
def started(processes: int, device: str, begin: Callable[[ChatGroup], T]) -> Iterator[tuple[ChatGroup, T]]:
    """The group of this process, and its conversation. `begin` makes one in every process, so it must be picklable."""
    prepare_environment(device, processes)
    if processes == 1:
        here = ChatGroup()
        yield here, begin(here)
        return
    port = free_port()
    spawning = multiprocessing.get_context("spawn")
    others = [
        spawning.Process(target=_follow, args=(rank, processes, port, device, begin), daemon=True)
        for rank in range(1, processes)
    ]
    for other in others:
        other.start()
    try:
        here = ChatGroup(join_group(_place(0, processes, port), device))
        yield here, begin(here)
    finally:
        for other in others:  # they may be in the middle of an answer that the user has interrupted
            other.kill()
            other.join()


def _follow(rank: int, processes: int, port: int, device: str, begin: Callable[[ChatGroup], Talk]) -> None:
    """Compute this process's part of every answer, until the first process ends this one."""
    die_with_parent()
    prepare_environment(device, processes)
    group = join_group(_place(rank, processes, port), device)
    talk = begin(ChatGroup(group))
    while True:
        question = group.first(None)
        with suppress(UserError):  # the first process reports it
            talk.ask(question)


def _place(rank: int, processes: int, port: int) -> Rendezvous:
    return Rendezvous("127.0.0.1", port, processes, rank, local_rank=rank, processes=processes)
