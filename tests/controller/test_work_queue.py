"""One pass at a time for a run, none forgotten, delays kept."""

import threading

from internvl_operator.work_queue import WorkQueue


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_waits_only_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    for key in ("a", "b", "a"):
        queue.add(key)
    assert [queue.get(), queue.get()] == ["a", "b"]
    assert len(queue) == 0


def test_what_is_added_during_the_work_comes_after_it() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    assert queue.get() == "a"
    queue.add("a")
    assert len(queue) == 0  # nobody else works on it meanwhile
    queue.done("a")
    assert queue.get() == "a"


def test_a_delay_of_centuries_ends_no_thread() -> None:
    waiting, found = threading.Event(), list[str | None]()

    def clock() -> float:
        waiting.set()  # the thread holds the lock until it waits
        return 0.0

    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("late", after=float(2**63))
    waiting.clear()
    thread = threading.Thread(target=lambda: found.append(queue.get()))
    thread.start()
    assert waiting.wait(5)
    queue.add("now")
    thread.join(5)
    assert found == ["now"]


def test_the_earliest_of_several_delays_counts() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("late", after=50)
    queue.add("a", after=30)
    queue.add("a", after=10)
    queue.add("a", after=40)
    clock.now = 10
    assert queue.get() == "a"
    queue.done("a")
    clock.now = 50
    assert queue.get() == "late"  # a's other delays are forgotten
    queue.done("late")
    assert len(queue) == 0


def test_a_delay_is_forgotten_when_the_key_is_worked_on_sooner() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("a", after=10)
    queue.add("a")
    assert queue.get() == "a"
    queue.done("a")
    queue.add("b", after=20)
    clock.now = 20
    assert queue.get() == "b"


def test_a_delay_that_ends_during_the_work_comes_after_it() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("a")
    assert queue.get() == "a"
    queue.add("a", after=5)
    queue.add("b", after=6)
    clock.now = 6
    assert queue.get() == "b"
    queue.done("a")
    assert queue.get() == "a"


def test_closing_sends_every_waiting_worker_home() -> None:
    queue: WorkQueue[str] = WorkQueue()
    answers: list[str | None] = []
    workers = [threading.Thread(target=lambda: answers.append(queue.get())) for _ in range(3)]
    for worker in workers:
        worker.start()
    queue.close()
    for worker in workers:
        worker.join(timeout=5)
    assert answers == [None, None, None]


def test_an_exception_of_one_key_ends_no_thread() -> None:
    queue: WorkQueue[int] = WorkQueue()
    done = []

    def work(key: int) -> None:
        if key == 1:
            raise ValueError("words")
        done.append(key)
        queue.close()

    queue.add(1)
    queue.add(2)
    queue.serve(work)
    assert done == [2]


def test_many_workers_never_share_a_key_and_miss_none() -> None:
    queue: WorkQueue[int] = WorkQueue()
    busy: set[int] = set()
    lock, seen, shared = threading.Lock(), set(), []
    finished = threading.Event()

    def work() -> None:
        while (key := queue.get()) is not None:
            with lock:
                shared.append(key) if key in busy else busy.add(key)
            with lock:
                busy.discard(key)
                seen.add(key)
                if len(seen) == 50:
                    finished.set()
            queue.done(key)

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for round_ in range(20):
        for key in range(50):
            queue.add(key, after=0.001 * (round_ % 2))
    assert finished.wait(timeout=30)
    queue.close()
    for worker in workers:
        worker.join(timeout=5)
    assert shared == []
