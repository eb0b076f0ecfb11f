"""Cut windows from sites, list the views of a card's task, and compute targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Protocol

import numpy as np
import xarray as xr

from minecube.arrays import UInt8, UInt16
from minecube.catalog import ModelCard
from minecube.codes import MINE, UNKNOWN
from minecube.errors import ModelError
from minecube.models.network import band_positions


class WindowSource(Protocol):
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
    ) -> tuple[UInt16, UInt8]:
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
    _arrays: dict[str, tuple[UInt16, UInt8]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        if not self.cubes:
            raise ModelError(
                "expected cubes of one site or more, found none; a model learns from labelled cubes"
            )
        for site, cube in self.cubes.items():
            _check_cube(site, cube)
            if _bands_of(cube) != self.bands:
                raise ModelError(
                    f"site {site}: expected the bands {', '.join(self.bands)}, as of the other "
                    f"sites, found {', '.join(_bands_of(cube)) or 'no names'}; one band would be "
                    "taken for another"
                )
            image = cube["reflectance"].sortby("year").transpose("year", "band", "y", "x")
            label = cube["footprint"].sortby("year").transpose("year", "y", "x")
            self._arrays[site] = (image.to_numpy(), label.to_numpy())

    @property
    def sites(self) -> tuple[str, ...]:
        """Site ids."""
        return tuple(self.cubes)

    @property
    def bands(self) -> tuple[str, ...]:
        """Bands of every site."""
        return _bands_of(next(iter(self.cubes.values())))

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
    ) -> tuple[UInt16, UInt8]:
        """Cut a window as described in `WindowSource.cut`."""
        image, label = self._arrays[site]
        years_of_site = self.years_of(site)
        positions = [years_of_site.index(year) for year in years]
        image = image[positions, :, y : y + size, x : x + size]
        label = label[positions, y : y + size, x : x + size]
        padding = [(0, size - label.shape[-2]), (0, size - label.shape[-1])]
        return (
            np.pad(image, [(0, 0), (0, 0), *padding]),
            np.pad(label, [(0, 0), *padding], constant_values=UNKNOWN),
        )


def _check_cube(site: str, cube: xr.Dataset) -> None:
    """Raise ModelError for a cube without reflectance or footprint, or with other dims or types."""
    if "footprint" not in cube or "reflectance" not in cube:
        raise ModelError(
            f"site {site}: expected a cube with reflectance and footprint, found "
            f"{', '.join(map(str, cube)) or 'nothing'}; a model learns from labels: run "
            "`minecube label` first"
        )
    image = cube["reflectance"]
    label = cube["footprint"]
    dims = (set(image.dims), set(label.dims))
    expected = ({"year", "band", "y", "x"}, {"year", "y", "x"})
    if dims != expected or image.dtype != np.uint16 or label.dtype != np.uint8:
        raise ModelError(
            f"site {site}: expected reflectance (year, band, y, x) as uint16 and footprint (year, "
            f"y, x) as uint8, found {image.dims} as {image.dtype} and {label.dims} as "
            f"{label.dtype}; hand in the cube as it was opened"
        )


def _bands_of(cube: xr.Dataset) -> tuple[str, ...]:
    if "band" not in cube.coords:
        return ()
    return tuple(map(str, cube["band"].to_numpy()))


def bands_at(source: WindowSource, card: ModelCard) -> list[int]:
    """Return the positions of the card's bands in windows; raise ModelError as `band_positions`."""
    return band_positions(list(source.bands), card, "the cubes")


SiteView = tuple[str, tuple[int, ...]]
"""A site, and the years seen together by a network."""


def list_views(source: WindowSource, card: ModelCard, gaps: Sequence[int] = ()) -> list[SiteView]:
    """List the card's views of each site: each year, each pair of years, or all years.

    `gaps` restricts the pairs to these numbers of years apart.

    Raises:
        ModelError: A site has no view, or sites of a series differ in years.
    """
    if card.task == "series":
        return _list_series(source, card)
    site_views: list[SiteView] = []
    for site in source.sites:
        years = source.years_of(site)
        views_of_site: list[SiteView] = [(site, (year,)) for year in years]
        if card.task == "change":
            pairs = combinations(years, 2)
            views_of_site = [(site, (a, b)) for a, b in pairs if not gaps or b - a in gaps]
        if not views_of_site:
            apart = f" {' or '.join(map(str, gaps))} years apart" if gaps else ""
            raise ModelError(
                f"model {card.id} sees two years{apart}, found "
                f"{', '.join(map(str, years)) or 'none'} at {site}; build more of its years, or "
                "leave the site out"
            )
        site_views += views_of_site
    return site_views


def _list_series(source: WindowSource, card: ModelCard) -> list[SiteView]:
    """List all years of each site, and check that they are the same."""
    expected = source.years_of(source.sites[0])
    for site in source.sites:
        years = source.years_of(site)
        if years != expected:
            raise ModelError(
                f"model {card.id} sees all years at once, so expected every site to have those of "
                f"{source.sites[0]} ({', '.join(map(str, expected))}), found "
                f"{', '.join(map(str, years))} at {site}; name sites or years that agree"
            )
    return [(site, expected) for site in source.sites]


def compute_targets(label: UInt8, classes: Sequence[str]) -> UInt8:
    """Compute the targets of a view from its footprints [year, y, x].

    Footprints are 1 mine, 0 not, above: unknown.

    Returns:
        uint8 [time, class, y, x]: 1 yes, 0 no, UNKNOWN. For the class mine, the footprint of each
            year. For other classes, the change from the first to the second year, unknown if either
            is unknown.
    """
    known = label <= MINE
    if tuple(classes) == ("mine",):
        return np.where(known, label, UNKNOWN).astype(np.uint8)[:, None]
    earlier, later = label
    kinds = {"changed": earlier != later, "removed": earlier > later, "new": earlier < later}
    changes = np.stack([kinds[name] for name in classes])
    return np.where(known.all(axis=0), changes, np.uint8(UNKNOWN)).astype(np.uint8)[None]
