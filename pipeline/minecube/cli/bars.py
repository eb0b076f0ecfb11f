"""Show progress bars on standard error, only in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)


class Bar:
    """One line with title, finished parts, all parts, time and a note."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def advance(self, note: str = "", *, parts: int = 1, total: int | None = None) -> None:
        """Add finished parts. `total` changes the number of all parts."""
        self._progress.update(self._task, advance=parts, note=note, total=total)

    def reach(self, parts: int, total: int, note: str = "") -> None:
        """Set the number of finished parts, and of all parts."""
        self._progress.update(self._task, completed=parts, note=note, total=total)

    def show(self, note: str) -> None:
        """Change the note."""
        self._progress.update(self._task, note=note)


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Bar]:
    """Show a bar until the end of the block."""
    with _transient_progress() as progress:
        yield Bar(progress, progress.add_task(title, total=total, note=""))


class TitledBars:
    """Shows one bar at a time, a new one for each title."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._title = ""
        self._task: TaskID | None = None

    def reach(self, title: str, parts: int, total: int, note: str) -> None:
        """Set title, number of finished parts, number of all parts, and note."""
        if title != self._title or self._task is None:
            if self._task is not None:
                self._progress.remove_task(self._task)
            self._task = self._progress.add_task(title, total=total, note="")
            self._title = title
        self._progress.update(self._task, completed=parts, note=note, total=total)


@contextmanager
def titled_bars() -> Iterator[TitledBars]:
    """Show the bars of several steps until the end of the block."""
    with _transient_progress() as progress:
        yield TitledBars(progress)


def _transient_progress() -> Progress:
    """Make bars that disappear at the end."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
