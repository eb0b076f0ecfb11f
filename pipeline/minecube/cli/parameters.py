"""Types of options: files to write, numbers, years, pairs of years and rates."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import Any

import click

from minecube.catalog import parse_years
from minecube.errors import PlaceError
from minecube.places import Place, Url, check_writable, place_of

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


class _PlaceType(click.ParamType[Place]):
    """A path or URL. `local` checks paths."""

    def __init__(self, local: click.Path) -> None:
        self._local = local
        self.name = local.name


class _InPlace(_PlaceType):
    """A path or URL to read."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Place:
        """Convert text to a path or URL, or fail."""
        place = place_of(value)
        if isinstance(place, Path):
            self._local.convert(str(place), param, ctx)
        elif self._local.exists and not (place.exists() or place.has_objects()):
            self.fail(f"{str(place)!r} does not exist", param, ctx)
        return place


class InFile(_InPlace):
    """A file to read. With `exists`, a missing file is an error when options are read."""

    def __init__(self, *, exists: bool = True) -> None:
        super().__init__(click.Path(exists=exists, dir_okay=not exists))


class InFolder(_InPlace):
    """A folder to read, and maybe to write to. `exists` as for `InFile`."""

    def __init__(self, *, exists: bool = True) -> None:
        super().__init__(click.Path(exists=exists, file_okay=not exists))


class _OutPlace(_PlaceType):
    """A path or URL to write to."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Place:
        """Convert text to a path or URL, or fail before hours of work are lost.

        Tries to write a temporary file or object, since permissions do not show what an
        administrator may write.
        """
        place = place_of(value)
        if isinstance(place, Url):
            self._check_url(place)
            return place
        self._local.convert(str(place), param, ctx)
        file = place
        if self._local.dir_okay:
            file = place / "new"
        folder = next(folder for folder in file.absolute().parents if folder.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            self.fail(
                f"{str(place)!r}: {folder} cannot be written to ({error.strerror}); "
                "name another place",
                param,
                ctx,
            )
        return place

    def _check_url(self, url: Url) -> None:
        """Raise PlaceError for a bucket instead of a file, or as `check_writable` does."""
        folder = url
        if not self._local.dir_okay:
            if not url.key:
                raise PlaceError(f"{url}: names a bucket; expected a file in it, {url}/NAME")
            folder = url.parent
        check_writable(folder)


class OutFile(_OutPlace):
    """A file to write. Its nearest existing parent folder, or its bucket, must be writable."""

    def __init__(self) -> None:
        super().__init__(click.Path(dir_okay=False))


class OutFolder(_OutPlace):
    """A folder to write to. It, its nearest existing parent, or its bucket, must be writable."""

    def __init__(self) -> None:
        super().__init__(click.Path(file_okay=False))


class LocalFolder(OutFolder):
    """A folder to write to on this machine."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Place:
        """Convert text to a path, or fail."""
        if "://" in str(value):
            self.fail(
                f"{value!r}: expected a local folder, found a URL; name a folder, and copy it",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


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
