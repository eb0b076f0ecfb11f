"""Show progress on standard error: a bar in a terminal, lines with the time elsewhere.

Without a terminal every finished site or site-year prints one line, so the log of a killed run says
how far it came:

    2026-11-30 16:47:25Z building 37 of 1330: Germany_1 2019, 3 h 12 min left
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from minecube.jobs.failures import one_line

_INTERVAL_S = 10
"""Least seconds between two lines of small parts, such as steps of a training."""
_RECENT = 50
"""Latest lines that give the rate. A repeated run skips its finished parts much faster."""


class Bar(Protocol):
    """Progress of one command: title, finished parts, all parts and a note."""

    def advance(self, note: str, total: int | None = None) -> None:
        """Add one finished part: a site, a site-year or another part that takes seconds.

        `total` changes the number of all parts.
        """

    def reach(self, parts: int, total: int, note: str = "") -> None:
        """Set the number of finished small parts, and of all parts. 0: their number is unknown."""

    def reach_step(self, title: str, parts: int, total: int, note: str) -> None:
        """Set title, finished small parts, all parts and note. A new title restarts the time."""

    def show(self, note: str) -> None:
        """Change the note within a part."""

    def prepare(self, note: str) -> None:
        """Change the note before the parts begin. This time says nothing about the time left."""


class _TerminalBar:
    """A bar of one line."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._title = ""

    def advance(self, note: str, total: int | None = None) -> None:
        self._progress.update(self._task, advance=1, note=note, total=total)

    def reach(self, parts: int, total: int, note: str = "") -> None:
        self._progress.update(self._task, completed=parts, total=total, note=note)

    def reach_step(self, title: str, parts: int, total: int, note: str) -> None:
        if title != self._title:
            self._progress.reset(self._task, description=title)
            self._title = title
        self.reach(parts, total, note)

    def show(self, note: str) -> None:
        self._progress.update(self._task, note=note)

    def prepare(self, note: str) -> None:
        self.show(note)


class Lines:
    """Lines with the time: one per part of `advance`, and one in ten seconds for smaller parts.

    The time left follows from the mean rate of the last 50 lines. `clock` returns seconds.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        parts: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._done = 0
        self._total = total or 0
        self._clock = clock
        self._printed = clock()
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RECENT)
        if total is None:
            print_line(title)
        else:
            self._marks.append((self._printed, 0))
            print_line(f"{title} {total} {parts}")

    def advance(self, note: str, total: int | None = None) -> None:
        """Print a line for one more finished part."""
        self._done += 1
        self._total = self._total if total is None else total
        self._print(self._clock(), note)
        self._marks.append((self._printed, self._done))

    def reach(self, parts: int, total: int, note: str = "") -> None:
        """Print a line for the first parts, for the last one, and after ten seconds."""
        self._done = parts
        self._total = total
        now = self._clock()
        # The first part may not be part 1: an interrupted training resumes.
        is_first = not self._marks
        if is_first or parts == total or now - self._printed >= _INTERVAL_S:
            self._print(now, note)
            self._marks.append((now, parts))

    def reach_step(self, title: str, parts: int, total: int, note: str) -> None:
        """Print lines as `reach` does. A new title restarts the rate."""
        if title != self._title:
            self._title = title
            self._marks.clear()
        self.reach(parts, total, note)

    def show(self, note: str) -> None:
        """Print a line if the last one is ten seconds old."""
        now = self._clock()
        if now - self._printed >= _INTERVAL_S:
            self._print(now, note)

    def prepare(self, note: str) -> None:
        """Print a line as `show` does, and restart the rate."""
        self._marks.clear()
        self.show(note)
        self._marks.append((self._clock(), self._done))

    def _print(self, now: float, note: str) -> None:
        text = f"{self._title} {self._done}"
        if self._total:
            text += f" of {self._total}"
        if note:
            text += f": {note}"
        left = self._seconds_left(now)
        if left is not None:
            text += f", {format_duration(left)} left"
        print_line(text)
        self._printed = now

    def _seconds_left(self, now: float) -> float | None:
        """Return the seconds left; None at the end, and before the first part has ended."""
        if not self._marks:
            return None
        start, earlier = self._marks[0]
        if not earlier < self._done < self._total:
            return None
        return (now - start) / (self._done - earlier) * (self._total - self._done)


def format_duration(seconds: float) -> str:
    """Format a duration: 40 s, 12 min, or 3 h 12 min."""
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes} min"


def print_line(text: str) -> None:
    """Print one line on standard error at once. Without a terminal it begins with the time (UTC)."""
    if not Console(stderr=True).is_terminal:
        text = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%SZ} {one_line(text)}"
    click.echo(text, err=True)


@contextmanager
def progress_bar(
    title: str, total: int | None = None, parts: str = "parts", *, shown: bool = True
) -> Iterator[Bar]:
    """Show the progress of a block.

    In a terminal: a bar, removed at the end. Elsewhere: see `Lines`. `total` is for `advance`, and
    `parts` is the plural of what is counted. With `shown` false, nothing is printed.
    """
    console = Console(stderr=True)
    if shown and not console.is_terminal:
        yield Lines(title, total, parts)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(
        *columns,
        console=console,
        disable=not shown,
        transient=True,
        # Rich moves what is printed to standard error. Keep results in a file or pipe.
        redirect_stdout=sys.stdout.isatty(),
    ) as progress:
        yield _TerminalBar(progress, progress.add_task(title, total=total, note=""))
