"""Cut windows of cubes for training: one place over the years, without writing patches.

The dataset has a length and numbered items, as torch's map-style datasets, but needs no torch:
`torch.utils.data.DataLoader(CubeDataset(store), batch_size=8, num_workers=2)`. An item depends only
on its number and the seed, not on the worker.

A window touches four to nine chunks of each year. `pixels` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from xarray.core import indexing

from minecube.cube.read.commits import Commits, Labels
from minecube.cube.read.pixels import LazyPixels, Pixels
from minecube.cube.store import Store, list_sites
from minecube.errors import CubeError

VIEWS = ("year", "pair", "series")
"""One year, two years in order, or all years."""


@dataclass(frozen=True, kw_only=True)
class WindowPlace:
    """Place of an item. It reaches beyond a smaller site."""

    site: str
    years: tuple[int, ...]
    y: int
    x: int
    """First row and column (`y`, `x`)."""


@dataclass
class CubeDataset:
    """Windows of committed years as dictionaries of numpy arrays, by number.

    `reflectance` is uint16 [year, band, y, x], x 10000, 0 = no observation. `footprint` is uint8
    [year, y, x]: 1 mine, 0 not mine, 255 unknown (left as is). `years` is int64 [year]. `site`, `y`
    and `x` give the place of the window.

    Outside a small site, reflectance is 0 and the footprint 255. For an object store, give the
    DataLoader `multiprocessing_context="spawn"`: the store's client does not survive a fork.

    Raises:
        CubeError: a site is missing, has no committed year or lacks a requested year; or sites with
            different years or bands cannot share a batch.
    """

    store: Store
    site_ids: Sequence[str] | None = None
    """Sites; default: all."""
    size: int = 160
    """Side of a window in pixels. EuroMineNet's loaders use 160."""
    view: str = "series"
    """One of `VIEWS`."""
    years: Sequence[int] | None = None
    """Years; default: all committed ones. A series holds all of them."""
    step: int | None = None
    """Distance of windows in pixels; the last row and column touch the far border. None: random
    places."""
    length: int | None = None
    """Number of random windows; default: as many as tile the sites once."""
    seed: int = 0
    """Seed of random windows. Use another one per epoch."""
    _sites: dict[str, _Site] = field(init=False, repr=False, default_factory=dict)
    _tiles: list[WindowPlace] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.view not in VIEWS or self.size < 1 or (self.step is not None and self.step < 1):
            raise CubeError(
                f"windows: expected a view of {', '.join(VIEWS)}, sizes and steps of 1 or more, "
                f"found {self}"
            )
        self._sites = {
            name: _Site.open(self.store, name, self.years)
            for name in self.site_ids or list_sites(self.store)
        }
        self._need_common("bands", "name sites that agree")
        if self.view == "series":
            self._need_common("years", "name sites that agree or years=")
        for name, site in self._sites.items():
            if self.view == "pair" and len(site.years) < 2:
                raise CubeError(
                    f"{self.store}: {name} has one year only, {site.years[0]}, so there is no pair "
                    "of years"
                )
        if self.step:
            self._tiles = list(self._tile(self.step))

    def _need_common(self, name: str, advice: str) -> None:
        """Raise CubeError if the sites differ in their bands or years."""
        values = sorted({getattr(site, name) for site in self._sites.values()})
        if len(values) > 1:
            raise CubeError(
                f"{self.store}: the sites differ in {name} ({values[0]} and {values[1]}), so their "
                f"windows do not fit into one batch; {advice}"
            )

    def _tile(self, step: int) -> Iterator[WindowPlace]:
        for name, site in self._sites.items():
            height, width = site.shape
            for y in window_starts(height, self.size, step):
                for x in window_starts(width, self.size, step):
                    for years in self._views(site):
                        yield WindowPlace(site=name, years=years, y=y, x=x)

    def _views(self, site: _Site) -> list[tuple[int, ...]]:
        """List the years of the items at one place of a site."""
        if self.view == "series":
            return [site.years]
        return list(combinations(site.years, 1 if self.view == "year" else 2))

    def __len__(self) -> int:
        if self.step:
            return len(self._tiles)
        if self.length is not None:
            return self.length
        return sum(
            len(window_starts(height, self.size, self.size))
            * len(window_starts(width, self.size, self.size))
            for height, width in (site.shape for site in self._sites.values())
        )

    def window(self, index: int) -> WindowPlace:
        """Return the place of item `index`; raises IndexError after the last one."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.step:
            return self._tiles[index]
        rng = np.random.default_rng([self.seed, index])
        areas = np.array([math.prod(site.shape) for site in self._sites.values()], np.float64)
        name = list(self._sites)[int(rng.choice(len(areas), p=areas / areas.sum()))]
        site = self._sites[name]
        y, x = (int(rng.integers(max(length - self.size, 0) + 1)) for length in site.shape)
        views = self._views(site)
        return WindowPlace(site=name, years=views[int(rng.integers(len(views)))], y=y, x=x)

    @property
    def sites(self) -> tuple[str, ...]:
        """Ids of the sites."""
        return tuple(self._sites)

    @property
    def bands(self) -> tuple[str, ...]:
        """Bands of every site, in the order of `reflectance`."""
        return next(iter(self._sites.values())).bands

    @property
    def forkable(self) -> bool:
        """Whether forked processes may cut windows, too."""
        return self.store.path is not None

    def years_of(self, site: str) -> tuple[int, ...]:
        """Return the years of a site's windows, ascending."""
        return self._sites[site].years

    def shape_of(self, site: str) -> tuple[int, int]:
        """Return rows and columns of a site."""
        return self._sites[site].shape

    def cut(
        self, site: str, years: Sequence[int], y: int, x: int, size: int
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
        """Cut `reflectance` and `footprint` of any window, with values as in an item.

        Their shapes are [year, band, size, size] and [year, size, size].
        """
        stored = self._sites[site]
        indices = [stored.index[year] for year in years]
        return (
            stored.reflectance.cut(indices, y, x, size),
            stored.footprint.cut(indices, y, x, size),
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        window = self.window(index)
        reflectance, footprint = self.cut(window.site, window.years, window.y, window.x, self.size)
        return {
            "reflectance": reflectance,
            "footprint": footprint,
            "years": np.array(window.years),
            "site": window.site,
            "y": window.y,
            "x": window.x,
        }


def open_reflectance(store: Store, site_id: str) -> xr.DataArray:
    """Open reflectance of a site's committed years: lazy, without Dask, and fast to read in rows.

    Years are ascending.

    Raises:
        CubeError: the site is missing or has no committed year.
    """
    site = _Site.open(store, site_id, None)
    group = store.open_site(site_id)
    coords = {name: group[name][:] for name in ("band", "y", "x")}
    coords["band"] = np.array([str(band) for band in coords["band"]], dtype=object)
    pixels = site.reflectance
    reflectance = xr.DataArray(
        indexing.LazilyIndexedArray(LazyPixels(pixels)),
        dims=("year", "band", "y", "x"),
        coords=coords,
        name="reflectance",
    )
    reflectance.encoding["chunks"] = (1, pixels.shape[1], *pixels.chunk)
    indices = [site.index[year] for year in site.years]
    return reflectance.isel(year=indices).assign_coords(year=list(site.years))


def window_starts(length: int, size: int, step: int) -> list[int]:
    """Return the starts of windows along one side."""
    last = max(length - size, 0)
    return [*range(0, last, step), last]


@dataclass(frozen=True)
class _Site:
    years: tuple[int, ...]
    index: dict[int, int]
    """Year -> its index in the arrays."""
    bands: tuple[str, ...]
    reflectance: Pixels
    footprint: Pixels

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.reflectance.shape[-2:]
        return height, width

    @classmethod
    def open(cls, store: Store, name: str, years: Sequence[int] | None) -> _Site:
        group = store.open_site(name)
        commits = Commits.read(store, name)
        committed = sorted(commits.committed)
        missing = sorted(set(years or ()) - set(committed))
        if missing or not committed:
            raise CubeError(
                f"{store}: {name} has no committed year {missing[0] if missing else ''}; committed "
                f"are {', '.join(map(str, committed)) or 'none'}"
            )
        labels = Labels.read(store, name, "footprint")
        return cls(
            years=tuple(sorted(years or committed)),
            index={int(year): index for index, year in enumerate(group["year"][:])},
            bands=tuple(map(str, group["band"][:])),
            reflectance=Pixels.open(store, f"{name}/reflectance", commits),
            footprint=Pixels.open(store, f"{name}/footprint", labels),
        )
