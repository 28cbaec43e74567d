"""What is done beside: in order, within its memory, and never longer waited for than agreed."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from triage.sinks.aside import Aside


@pytest.fixture
def aside() -> Iterator[Aside]:
    one = Aside("beside", most_bytes=100)
    yield one
    one.close(30)


class Disk:
    """Holds whoever writes until it is let go."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()

    def write(self) -> str:
        self.entered.set()
        self.let_go.wait(30)
        return "late"


def test_tasks_are_done_in_order_and_the_end_waits_for_them(aside: Aside) -> None:
    """Ten tasks, each of a tenth of the memory, while the first one is held."""
    disk, done = Disk(), []
    assert aside.post(disk.write, 0)
    assert disk.entered.wait(30)
    assert all(aside.post(lambda i=i: done.append(i), 10) for i in range(10))  # type: ignore[misc]
    disk.let_go.set()
    assert aside.close(30)
    assert done == list(range(10))
    assert not aside.post(disk.write, 0)


def test_what_does_not_fit_is_refused(aside: Aside) -> None:
    """While one is held, 100 bytes may wait; a task larger than that may wait alone."""
    disk = Disk()
    aside.post(disk.write, 1000)
    assert disk.entered.wait(30)
    assert [aside.post(lambda: None, size) for size in (60, 40, 1)] == [True, True, False]
    disk.let_go.set()


def test_an_answer_in_time_is_given(aside: Aside) -> None:
    """And nothing is regretted; a task that fails gives none."""
    regretted: list[str] = []
    assert aside.ask(lambda: "written", 30, regretted.append) == (True, "written")
    assert aside.ask(lambda: 1 / 0, 30, regretted.append) == (False, None)
    assert aside.ask(lambda: "again", 30, regretted.append) == (True, "again")
    assert regretted == []


def test_a_late_answer_is_regretted_before_anything_else_is_done(aside: Aside) -> None:
    """Until then every question is answered at once: no."""
    disk = Disk()
    regretted: list[str] = []
    assert aside.ask(disk.write, 0.0, regretted.append) == (False, None)
    assert aside.ask(lambda: "no", 1000, regretted.append) == (False, None)
    order: list[str] = []
    aside.post(lambda: order.extend(regretted), 0)
    disk.let_go.set()
    assert aside.close(30)
    assert order == regretted == ["late"]


def test_the_end_does_not_wait_for_a_disk_that_hangs(aside: Aside) -> None:
    """Closing says that it is not done, and may be tried again."""
    disk = Disk()
    aside.post(disk.write, 0)
    assert not aside.close(0.01)
    disk.let_go.set()
    assert aside.close(30)
