"""Types of options: files to write, numbers, years, pairs of years and rates."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import click

from minecube.catalog import parse_years

Pair = tuple[int, int]

SEED = click.IntRange(min=0, max=2**32 - 1)
"""Range of seeds accepted by both NumPy and PyTorch."""


class FiniteRange(click.FloatRange):
    """A finite number within a range.

    Rejects infinity and NaN (click accepts NaN in every range).
    """

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert text to a number, or fail."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r}: expected a finite number", param, ctx)
        return number


class _OutPath(click.Path):
    """A path to write to."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Convert text to a path, or fail before hours of work are lost.

        Tries to write a temporary file, since permissions do not show what an administrator may
        write.
        """
        path = Path(str(super().convert(value, param, ctx)))
        file = path
        if self.dir_okay:
            file = path / "new"
        folder = next(folder for folder in file.absolute().parents if folder.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            self.fail(
                f"{str(path)!r}: {folder} cannot be written to ({error.strerror}); "
                "name another place",
                param,
                ctx,
            )
        return path


class OutFile(_OutPath):
    """A file to write. Its nearest existing parent folder must be writable."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)


class OutFolder(_OutPath):
    """A folder to write to. The folder, or its nearest existing parent, must be writable."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)


class Years(click.ParamType[tuple[int, ...]]):
    """Years such as 2019-2023, or 2019,2021, or both."""

    name = "years"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Convert text to ascending years, each once."""
        if isinstance(value, tuple):
            return value
        try:
            return parse_years(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Pairs(click.ParamType[tuple[int | Pair, ...]]):
    """Gaps in years (1,2), pairs of years (2019-2021,2020-2021), or both."""

    name = "pairs"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | Pair, ...]:
        """Convert text to gaps and pairs, in the given order."""
        if isinstance(value, tuple):
            return value
        pairs: list[int | Pair] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{4})\s*-\s*(\d{4})\s*|\s*(\d{1,2})\s*", part)
            if not match:
                self.fail(
                    f"{value!r}: expected gaps such as 1,2 or pairs of years such as 2019-2021",
                    param,
                    ctx,
                )
            if match[3]:
                pairs.append(int(match[3]))
            else:
                pairs.append((int(match[1]), int(match[2])))
        return tuple(pairs)


class RatesMethod(click.ParamType[str | tuple[float, float]]):
    """The option --rates: learned, labels, labels:SITES, or two numbers."""

    name = "rates"

    def convert(
        self,
        value: str | tuple[float, float],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> str | tuple[float, float]:
        """Convert text to opening and closing per year, or return the word unchanged."""
        if isinstance(value, tuple):
            return value
        if value in ("learned", "labels") or value.startswith("labels:"):
            return value
        try:
            opening, closing = (float(part) for part in value.split(","))
        except ValueError:
            self.fail(
                f"{value!r}: expected learned, labels, labels:SITES, "
                "or two chances per year such as 0.01,0.005",
                param,
                ctx,
            )
        return opening, closing
