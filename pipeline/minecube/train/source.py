"""Cut windows from sites, list the views of a card's task, and compute targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from minecube.catalog import ModelCard
from minecube.errors import ModelError

UNKNOWN = 255
"""Unknown pixels in labels and targets; training ignores them."""


class Source(Protocol):
    """Sites to cut windows from.

    `cube.CubeDataset` reads them from a store. `Cubes` holds them in memory.
    """

    @property
    def sites(self) -> Sequence[str]:
        """Site ids."""

    @property
    def bands(self) -> Sequence[str]:
        """Bands of every site, in order."""

    @property
    def forkable(self) -> bool:
        """Whether forked processes may cut windows, too; otherwise they are started afresh."""

    def years_of(self, site: str) -> tuple[int, ...]:
        """Return the site's years, ascending."""

    def shape_of(self, site: str) -> tuple[int, int]:
        """Return the site's rows and columns."""

    def cut(
        self, site: str, years: Sequence[int], y: int, x: int, size: int
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """Cut reflectance [year, band, size, size] and footprint [year, size, size].

        Unobserved reflectance is 0. Beyond the site, values are 0 and 255.
        """


@dataclass(frozen=True)
class Cubes:
    """Source in memory.

    Raises:
        ModelError: There is no cube. A cube lacks `reflectance` uint16 (year, band, y, x) or
            `footprint` uint8 (year, y, x). A cube has other bands than the first.
    """

    cubes: Mapping[str, xr.Dataset]
    """Site id -> cube."""
    _arrays: dict[str, tuple[NDArray[np.uint16], NDArray[np.uint8]]] = field(
        init=False, repr=False, default_factory=dict
    )

    def __post_init__(self) -> None:
        if not self.cubes:
            raise ModelError(
                "expected cubes of one site or more, found none; a model learns from labelled cubes"
            )
        for site, cube in self.cubes.items():
            if "footprint" not in cube or "reflectance" not in cube:
                raise ModelError(
                    f"site {site}: expected a cube with reflectance and footprint, found "
                    f"{', '.join(map(str, cube)) or 'nothing'}; a model learns from labels: run `minecube label` first"
                )
            image, label = cube["reflectance"], cube["footprint"]
            laid = set(image.dims) == {"year", "band", "y", "x"} and set(label.dims) == {
                "year",
                "y",
                "x",
            }
            if not laid or image.dtype != np.uint16 or label.dtype != np.uint8:
                raise ModelError(
                    f"site {site}: expected reflectance (year, band, y, x) as uint16 and footprint (year, y, x) as uint8, "
                    f"found {image.dims} as {image.dtype} and {label.dims} as {label.dtype}; hand in the cube as it was opened"
                )
            if _bands(cube) != self.bands:
                raise ModelError(
                    f"site {site}: expected the bands {', '.join(self.bands)}, as of the other sites, found "
                    f"{', '.join(_bands(cube)) or 'no names'}; one band would be taken for another"
                )
            self._arrays[site] = (
                image.sortby("year").transpose("year", "band", "y", "x").to_numpy(),
                label.sortby("year").transpose("year", "y", "x").to_numpy(),
            )

    @property
    def sites(self) -> tuple[str, ...]:
        """Site ids."""
        return tuple(self.cubes)

    @property
    def bands(self) -> tuple[str, ...]:
        """Bands of every site."""
        return _bands(next(iter(self.cubes.values())))

    @property
    def forkable(self) -> bool:
        """True: forked processes share the memory."""
        return True

    def years_of(self, site: str) -> tuple[int, ...]:
        """Return the site's years, ascending."""
        return tuple(sorted(int(year) for year in self.cubes[site]["year"]))

    def shape_of(self, site: str) -> tuple[int, int]:
        """Return the site's rows and columns."""
        height, width = self._arrays[site][1].shape[1:]
        return height, width

    def cut(
        self, site: str, years: Sequence[int], y: int, x: int, size: int
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        """Cut a window as described in `Source.cut`."""
        (image, label), known = self._arrays[site], self.years_of(site)
        at = [known.index(year) for year in years]
        inside = image[at, :, y : y + size, x : x + size]
        beyond = [(0, size - inside.shape[-2]), (0, size - inside.shape[-1])]
        return (
            np.pad(inside, [(0, 0), (0, 0), *beyond]),
            np.pad(
                label[at, y : y + size, x : x + size], [(0, 0), *beyond], constant_values=UNKNOWN
            ),
        )


def _bands(cube: xr.Dataset) -> tuple[str, ...]:
    return tuple(map(str, cube["band"].to_numpy())) if "band" in cube.coords else ()


def bands_at(source: Source, card: ModelCard) -> list[int]:
    """Return the positions of the card's bands in the source's windows.

    Raises:
        ModelError: Bands are missing or in another order.
    """
    found = list(source.bands)
    if [b for b in found if b in card.bands] != list(card.bands):
        raise ModelError(
            f"model {card.id}: expected the bands {', '.join(card.bands)} in this order, found "
            f"{', '.join(found) or 'no names'}; it would take one band for another: build the cubes with these bands"
        )
    return [found.index(b) for b in card.bands]


View = tuple[str, tuple[int, ...]]
"""A site, and the years seen together by a network."""


def views(source: Source, card: ModelCard, gaps: Sequence[int] = ()) -> list[View]:
    """List the card's views of each site: each year, each pair of years, or all years.

    `gaps` restricts the pairs to these numbers of years apart.

    Raises:
        ModelError: A site has no view, or sites of a series differ in years.
    """
    found: list[View] = []
    for site in source.sites:
        years = source.years_of(site)
        if card.task == "series":
            first = source.years_of(source.sites[0])
            if years != first:
                raise ModelError(
                    f"model {card.id} sees all years at once, so expected every site to have those of {source.sites[0]} "
                    f"({', '.join(map(str, first))}), found {', '.join(map(str, years))} at {site}; "
                    "name sites or years that agree"
                )
            found.append((site, years))
            continue
        sets = combinations(years, 2 if card.task == "change" else 1)
        own = [
            (site, each)
            for each in sets
            if not gaps or card.task == "mapping" or each[1] - each[0] in gaps
        ]
        if not own:
            apart = f" {' or '.join(map(str, gaps))} years apart" if gaps else ""
            raise ModelError(
                f"model {card.id} sees two years{apart}, found {', '.join(map(str, years)) or 'none'} at {site}; "
                "build more of its years, or leave the site out"
            )
        found += own
    return found


def target(label: NDArray[np.uint8], classes: Sequence[str]) -> NDArray[np.uint8]:
    """Compute the targets of a view from its footprints [year, y, x].

    Footprints are 1 mine, 0 not, above: unknown.

    Returns:
        uint8 [time, class, y, x]: 1 yes, 0 no, UNKNOWN. For the class mine, the footprint of each
            year. For other classes, the change from the first to the second year, unknown if either
            is unknown.
    """
    known = label <= 1
    if tuple(classes) == ("mine",):
        return np.where(known, label, UNKNOWN).astype(np.uint8)[:, None]
    first, second = label
    kinds = {"changed": first != second, "removed": first > second, "new": first < second}
    changes = np.stack([kinds[name] for name in classes])
    return np.where(known.all(axis=0), changes, np.uint8(UNKNOWN)).astype(np.uint8)[None]
