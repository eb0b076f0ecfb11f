"""Cut windows of cubes for training: one place over the years, without writing patches.

The dataset has a length and numbered items, as torch's map-style datasets, but needs no torch:
`torch.utils.data.DataLoader(CubeDataset(store), batch_size=8, num_workers=2)`. An item depends only
on its number and the seed, not on the worker.

A window touches four to nine chunks of each year. `pixels` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from xarray.core import indexing

from minecube.cube.commits import Commits, Labels
from minecube.cube.pixels import LazyPixels, Pixels
from minecube.cube.store import Store, sites
from minecube.errors import CubeError

VIEWS = ("year", "pair", "series")
"""One year, two years in order, or all years."""


@dataclass(frozen=True, kw_only=True)
class Window:
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
    """A folder, a packed store, or an object-store URL."""
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
    _tiles: list[Window] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.view not in VIEWS or self.size < 1 or (self.step is not None and self.step < 1):
            raise CubeError(
                f"windows: expected a view of {', '.join(VIEWS)}, sizes and steps of 1 or more, found {self}"
            )
        self._sites = {
            name: _Site.of(self.store, name, self.years)
            for name in self.site_ids or sites(self.store)
        }
        for what in ("bands", "years"):
            each = {getattr(site, what) for site in self._sites.values()}
            if len(each) > 1 and (what == "bands" or self.view == "series"):
                raise CubeError(
                    f"{self.store}: the sites differ in {what} ({' and '.join(map(str, sorted(each)[:2]))}), so their windows "
                    f"do not fit into one batch; name sites that agree{' or years=' if what == 'years' else ''}"
                )
        for name, site in self._sites.items():
            if self.view == "pair" and len(site.years) < 2:
                raise CubeError(
                    f"{self.store}: {name} has one year only, {site.years[0]}, so there is no pair of years"
                )
        if self.step:
            self._tiles = [
                Window(site=name, years=years, y=y, x=x)
                for name, site in self._sites.items()
                for y in _corners(site.shape[0], self.size, self.step)
                for x in _corners(site.shape[1], self.size, self.step)
                for years in self._views(site)
            ]

    def _views(self, site: _Site) -> list[tuple[int, ...]]:
        if self.view == "series":
            return [site.years]
        return list(combinations(site.years, 1 if self.view == "year" else 2))

    def __len__(self) -> int:
        if self.step:
            return len(self._tiles)
        if self.length is not None:
            return self.length
        tiling = (
            len(_corners(h, self.size, self.size)) * len(_corners(w, self.size, self.size))
            for h, w in self._shapes()
        )
        return sum(tiling)

    def _shapes(self) -> list[tuple[int, int]]:
        return [site.shape for site in self._sites.values()]

    def window(self, index: int) -> Window:
        """Return the place of item `index`; raises IndexError after the last one."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.step:
            return self._tiles[index]
        rng = np.random.default_rng([self.seed, index])
        area = np.array([h * w for h, w in self._shapes()], dtype=np.float64)
        name = list(self._sites)[int(rng.choice(len(area), p=area / area.sum()))]
        site = self._sites[name]
        y, x = (int(rng.integers(max(n - self.size, 0) + 1)) for n in site.shape)
        views = self._views(site)
        return Window(site=name, years=views[int(rng.integers(len(views)))], y=y, x=x)

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
        of, at = self._sites[site], [self._sites[site].index[year] for year in years]
        return of.reflectance.cut(at, y, x, size), of.footprint.cut(at, y, x, size)

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

    Raises:
        CubeError: the site is missing or has no committed year.
    """
    site, group = _Site.of(store, site_id, None), store.open_site(site_id, "r")
    pixels = site.reflectance
    coords = {name: group[name][:] for name in ("year", "band", "y", "x")}
    coords["band"] = np.array([str(b) for b in coords["band"]], dtype=object)
    lazy = indexing.LazilyIndexedArray(LazyPixels(pixels))
    found = xr.DataArray(lazy, dims=("year", "band", "y", "x"), coords=coords, name="reflectance")
    found.encoding["chunks"] = (1, pixels.shape[1], *pixels.chunk)
    return found.sel(year=list(site.years))


def _corners(length: int, size: int, step: int) -> list[int]:
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
    def of(cls, store: Store, name: str, years: Sequence[int] | None) -> _Site:
        group = store.open_site(name, "r")
        commits = Commits.of(store, name)
        committed = sorted(commits.committed)
        lacking = sorted(set(years or ()) - set(committed))
        if lacking or not committed:
            there = ", ".join(map(str, committed)) or "none"
            raise CubeError(
                f"{store}: {name} has no committed year {lacking[0] if lacking else ''}; committed are {there}"
            )
        at = {int(year): i for i, year in enumerate(group["year"][:])}
        return cls(
            years=tuple(sorted(years or committed)),
            index=at,
            bands=tuple(map(str, group["band"][:])),
            reflectance=Pixels.of(store, f"{name}/reflectance", commits),
            footprint=Pixels.of(store, f"{name}/footprint", Labels.of(store, name, "footprint")),
        )
