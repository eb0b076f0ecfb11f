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
        self._title = ""

    def advance(self, note: str = "", *, parts: int = 1, total: int | None = None) -> None:
        """Add finished parts. `total` changes the number of all parts."""
        self._progress.update(self._task, advance=parts, note=note, total=total)

    def reach(self, parts: int, total: int, note: str = "") -> None:
        """Set the number of finished parts, and of all parts."""
        self._progress.update(self._task, completed=parts, note=note, total=total)

    def reach_step(self, title: str, parts: int, total: int, note: str) -> None:
        """Set title, finished parts, all parts and note. A new title starts the time again."""
        if title != self._title:
            self._progress.reset(self._task, description=title)
            self._title = title
        self.reach(parts, total, note)

    def show(self, note: str) -> None:
        """Change the note."""
        self._progress.update(self._task, note=note)


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Bar]:
    """Show a bar until the end of the block, then remove it."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as progress:
        yield Bar(progress, progress.add_task(title, total=total, note=""))
