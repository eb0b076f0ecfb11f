"""Windows of cubes for training: one place through the years, cut when it is asked for; no patch is ever written.

A map-style dataset needs a length and items by number, which is all there is here, so that this is torch's and yet needs no
torch: `torch.utils.data.DataLoader(CubeDataset(store), batch_size=8, num_workers=2)`. What an item is follows from its number
and the seed alone, whichever worker cuts it.

A window touches four to nine chunks of each year. Zarr takes 0.6 ms for each, of which a quarter is unpacking, so shards on a
local disk are mapped into memory here, and the chunks that the window touches are asked for before the first is waited for.
A packed store is mapped as a whole, once a process; its directory says where each shard lies. Shards compressed in a way not
known here, and those of object stores, are read by Zarr.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from typing import Any

import dask.array
import numcodecs
import numpy as np
import numpy.typing as npt
import xarray as xr
import zarr

from minecube.cube import packed
from minecube.cube.builds import builds
from minecube.cube.store import site_group, sites, zarr_store
from minecube.errors import CubeError

VIEWS = ("year", "pair", "series")
"""One year, two years in their order, or all."""
_ABSENT = 2**64 - 1  # offset of a chunk that holds nothing but fill value (Zarr v3, sharding-indexed codec)


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where an item is cut; it reaches beyond a site that is smaller than it."""

    site: str
    years: tuple[int, ...]
    y: int
    x: int
    """First row and column."""


@dataclass
class CubeDataset:
    """Windows of committed years as dictionaries of numpy arrays, by number.

    `reflectance` uint16 [year, band, y, x] (x 10000, 0 = no observation), `footprint` uint8 [year, y, x] (1 mine, 0 not, 255
    unknown, left as it is), `years` int64 [year], and `site`, `y`, `x`. What lies beyond a site smaller than a window is 0 and
    255. With an object store, give the DataLoader
    `multiprocessing_context="spawn"`: its client does not survive a fork.

    Raises:
        CubeError: no such site, no committed year, years asked for that a site has not, or sites that differ in years or bands
            where their windows have to be alike.
    """

    store: str
    """A folder, a packed store, or an object-store URL."""
    site_ids: Sequence[str] | None = None
    """All sites by default."""
    size: int = 160
    """Side of a window in pixels: 160 are those of EuroMineNet's loaders."""
    view: str = "series"
    """Of `VIEWS`."""
    years: Sequence[int] | None = None
    """All committed years by default; a series is of all of them."""
    step: int | None = None
    """None: windows anywhere. Else all windows so far apart, the last of a row and column flush with the far border."""
    length: int | None = None
    """How many windows anywhere; by default as many as tile the sites once."""
    seed: int = 0
    """Of windows anywhere; another one for each epoch."""
    _sites: dict[str, _Site] = field(init=False, repr=False, default_factory=dict)
    _tiles: list[Window] = field(init=False, repr=False, default_factory=list)

    def __post_init__(self) -> None:
        if self.view not in VIEWS or self.size < 1 or (self.step is not None and self.step < 1):
            raise CubeError(f"windows: expected a view of {', '.join(VIEWS)}, sizes and steps of 1 or more, found {self}")
        self._sites = {name: _Site.of(self.store, name, self.years) for name in self.site_ids or sites(self.store)}
        for what in ("bands", "years"):
            each = {getattr(site, what) for site in self._sites.values()}
            if len(each) > 1 and (what == "bands" or self.view == "series"):
                raise CubeError(
                    f"{self.store}: the sites differ in {what} ({' and '.join(map(str, sorted(each)[:2]))}), so their windows "
                    f"do not fit into one batch; name sites that agree{' or years=' if what == 'years' else ''}"
                )
        for name, site in self._sites.items():
            if self.view == "pair" and len(site.years) < 2:
                raise CubeError(f"{self.store}: {name} has one year only, {site.years[0]}, so there is no pair of years")
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
        tiling = (len(_corners(h, self.size, self.size)) * len(_corners(w, self.size, self.size)) for h, w in self._shapes())
        return sum(tiling)

    def _shapes(self) -> list[tuple[int, int]]:
        return [site.shape for site in self._sites.values()]

    def window(self, index: int) -> Window:
        """Where item `index` is cut; raises IndexError beyond the last."""
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
        """Ids."""
        return tuple(self._sites)

    @property
    def bands(self) -> tuple[str, ...]:
        """Of every site, in the order of `reflectance`."""
        return next(iter(self._sites.values())).bands

    @property
    def forkable(self) -> bool:
        """Whether processes that are forked off may cut, too."""
        return "://" not in self.store

    def years_of(self, site: str) -> tuple[int, ...]:
        """The years of a site that windows are cut from, ascending."""
        return self._sites[site].years

    def shape_of(self, site: str) -> tuple[int, int]:
        """Rows and columns of a site."""
        return self._sites[site].shape

    def cut(
        self, site: str, years: Sequence[int], y: int, x: int, size: int
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
        """`reflectance` and `footprint` of any window: [year, band, size, size] and [year, size, size], as in an item."""
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


def open_reflectance(store: str, site_id: str) -> xr.DataArray:
    """Reflectance of a site's committed years, lazy as in `open_committed`, but quick to read in rows from top to bottom.

    Raises:
        CubeError: no such site, or no committed year.
    """
    site, group = _Site.of(store, site_id, None), site_group(store, site_id, "r")
    pixels = site.reflectance
    # A block is a row of chunks: what a reader of rows asks for, in one piece.
    blocks = (1, pixels.shape[1], pixels.chunk[0], pixels.shape[-1])
    coords = {name: group[name][:] for name in ("year", "band", "y", "x")}
    coords["band"] = np.array([str(b) for b in coords["band"]], dtype=object)
    lazy = dask.array.from_array(pixels, chunks=blocks, meta=np.empty((0,) * 4, pixels.dtype), name=False)
    found = xr.DataArray(lazy, dims=("year", "band", "y", "x"), coords=coords, name="reflectance")
    found.encoding["chunks"] = blocks
    return found.sel(year=list(site.years))


def _corners(length: int, size: int, step: int) -> list[int]:
    """Where windows begin along one side."""
    last = max(length - size, 0)
    return [*range(0, last, step), last]


@dataclass(frozen=True)
class _Site:
    years: tuple[int, ...]
    index: dict[int, int]
    """Year -> its place in the arrays."""
    bands: tuple[str, ...]
    reflectance: _Pixels
    footprint: _Pixels

    @property
    def shape(self) -> tuple[int, int]:
        height, width = self.reflectance.shape[-2:]
        return height, width

    @classmethod
    def of(cls, store: str, name: str, years: Sequence[int] | None) -> _Site:
        group = site_group(store, name, "r")
        committed = list(builds(store, name))
        lacking = sorted(set(years or ()) - set(committed))
        if lacking or not committed:
            there = ", ".join(map(str, committed)) or "none"
            raise CubeError(f"{store}: {name} has no committed year {lacking[0] if lacking else ''}; committed are {there}")
        at = {int(year): i for i, year in enumerate(group["year"][:])}
        return cls(
            years=tuple(sorted(years or committed)),
            index=at,
            bands=tuple(map(str, group["band"][:])),
            reflectance=_Pixels.of(store, f"{name}/reflectance"),
            footprint=_Pixels.of(store, f"{name}/footprint"),
        )


@dataclass(frozen=True)
class _Pixels:
    """An array [year, ..., y, x] of a store, from which windows are cut."""

    store: str
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    chunk: tuple[int, int]
    shard: tuple[int, int]
    codec: Any
    """What unpacks a chunk; None where Zarr has to read it."""
    packed: bool
    """Whether the store is."""

    @classmethod
    def of(cls, store: str, path: str) -> _Pixels:
        array = zarr.open_array(zarr_store(store), path=path, mode="r")
        chunk, shard = array.chunks[-2:], array.shards[-2:]
        codec = None if "://" in store else _codec(array.metadata.to_dict())
        fill, in_zip = array.metadata.fill_value, packed.is_packed(store)
        return cls(store, path, array.shape, array.dtype, fill, chunk, shard, codec, in_zip)

    def cut(self, years: Sequence[int], y: int, x: int, size: int) -> npt.NDArray[Any]:
        """A window of the years at these places: [year, ..., size, size], fill value beyond the site."""
        rows, columns = (slice(at, min(at + size, n)) for at, n in zip((y, x), self.shape[-2:], strict=True))
        out = np.empty((len(years), *self.shape[1:-2], size, size), self.dtype)
        out[..., rows.stop - y :, :] = out[..., columns.stop - x :] = self.fill
        inside = out[..., : rows.stop - y, : columns.stop - x]
        if self.codec is None:
            array = zarr.open_array(zarr_store(self.store), path=self.path, mode="r")
            inside[...] = array.oindex[(list(years), *(slice(None) for _ in self.shape[1:-2]), rows, columns)]
        else:
            self._fill(inside, years, rows, columns)
        return out

    def __getitem__(self, key: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Any part without steps, quickly where `cut` is: what Dask asks of an array.

        Whoever reads a whole site would have all its files in this process's memory by and by: these are let go.
        """
        at = [slice(*part.indices(n)) for part, n in zip(key, self.shape, strict=True)]
        shape = [part.stop - part.start for part in at]
        whole = all(part == slice(0, n, 1) for part, n in zip(at[1:-2], self.shape[1:-2], strict=True))
        if self.codec is None or not whole:
            return zarr.open_array(zarr_store(self.store), path=self.path, mode="r")[tuple(at)]  # type: ignore[no-any-return]
        out = np.empty(shape, self.dtype)
        self._fill(out, range(at[0].start, at[0].stop), at[-2], at[-1], keep=False)
        return out

    @property
    def ndim(self) -> int:
        """Of `shape`."""
        return len(self.shape)

    def _fill(self, out: npt.NDArray[Any], years: Sequence[int], rows: slice, columns: slice, *, keep: bool = True) -> None:
        parts: list[tuple[npt.NDArray[Any], tuple[Any, ...], mmap.mmap, int, int]] = []
        shards: dict[tuple[int, int, int], _Shard | None] = {}
        for n, year in enumerate(years):
            for (down, row), here, there in _cuts(rows, self.chunk[0], self.shard[0]):
                for (across, column), left, right in _cuts(columns, self.chunk[1], self.shard[1]):
                    key = (year, down, across)
                    if key not in shards:
                        shards[key] = self._shard(*key)
                    shard = shards[key]
                    if (
                        shard is None or shard.index[row][column][0] == _ABSENT
                    ):  # nothing but fill value is no file, or no chunk
                        out[n][..., here, left] = self.fill
                        continue
                    file, (offset, length) = shard.file, shard.index[row][column]
                    if offset + length > shard.size:
                        raise CubeError(f"{self.store}: {self.path} ends before its chunks do; run `minecube verify`")
                    offset += shard.start
                    page = offset % mmap.PAGESIZE
                    file.madvise(mmap.MADV_WILLNEED, offset - page, length + page)
                    parts.append((out[n][..., here, left], (..., there, right), file, offset, length))
        chunk = np.empty((*self.shape[1:-2], *self.chunk), self.dtype)
        for target, inside, file, offset, length in parts:
            try:
                self.codec.decode(memoryview(file)[offset : offset + length], out=chunk)
            except (RuntimeError, ValueError) as error:
                raise CubeError(f"{self.store}: {self.path} has a damaged chunk ({error}); run `minecube verify`") from error
            target[...] = chunk[inside]
        for read in shards.values() if not keep else ():
            if read is not None:  # as a whole: what is read brings what lies around it
                page = read.start % mmap.PAGESIZE
                read.file.madvise(mmap.MADV_DONTNEED, read.start - page, read.size + page)

    def _shard(self, year: int, down: int, across: int) -> _Shard | None:
        """A shard in memory; None where it is nothing but fill value."""
        key = "/".join((self.path, "c", str(year), *("0" for _ in self.shape[1:-2]), str(down), str(across)))
        shape = tuple(s // c for s, c in zip(self.shard, self.chunk, strict=True))
        path = self.store.rstrip("/") if self.packed else f"{self.store}/{key}"
        try:
            stamp = packed.stamp_of(os.stat(path))  # noqa: PTH116  a Path for each takes longer than the rest
        except FileNotFoundError as error:
            if self.packed:
                raise CubeError(f"{path}: is gone; put it back, or open another store") from error
            return None
        return _member(path, stamp, key, shape) if self.packed else _mapped(path, stamp, shape)


@dataclass(frozen=True)
class _Shard:
    file: mmap.mmap
    start: int
    """Where in the file it begins."""
    size: int
    index: Any
    """[row][column]: offset from its start, and bytes, of each chunk."""


@lru_cache(maxsize=512)  # each holds one of the files that a process may have open, of which 1024 are usual
def _mapped(path: str, _stamp: packed.Stamp, shape: tuple[int, int]) -> _Shard:
    """A shard's file in memory, as the file of that stamp has it.

    Zarr replaces files as a whole, so what is mapped stays what it was, and a shard that is built anew is another one.
    """
    file = _map(path)
    return _indexed(path, file, 0, len(file), shape)


@lru_cache(maxsize=4096)
def _member(path: str, stamp: packed.Stamp, key: str, shape: tuple[int, int]) -> _Shard | None:
    """A shard of a packed store, whose file is mapped as a whole."""
    member = packed.directory(path, stamp).get(key)
    if member is None:
        return None
    file = _whole(path, stamp)
    try:
        start = packed.start_of(packed.header_of(file, key, member), key, member)
    except OSError as error:
        raise CubeError(f"{path}: {key} is damaged ({error}); run `minecube verify`") from error
    if start + member.size > len(file):
        raise CubeError(f"{path}: ends before {key} does; copy or download it again")
    return _indexed(f"{path}: {key}", file, start, member.size, shape)


@lru_cache(maxsize=8)
def _whole(path: str, _stamp: packed.Stamp) -> mmap.mmap:
    """A packed store in memory, read nowhere but where it is asked to: with what lies around it, half as much again is read."""
    file = _map(path)
    file.madvise(mmap.MADV_RANDOM)
    return file


def _map(path: str) -> mmap.mmap:
    with open(path, "rb") as file:  # noqa: PTH123
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _indexed(where: str, file: mmap.mmap, start: int, size: int, shape: tuple[int, int]) -> _Shard:
    """With its index: the last bytes, before a checksum of theirs."""
    count = shape[0] * shape[1]
    if size < 16 * count + 4:
        raise CubeError(f"{where}: is too short for a shard, so it is damaged; run `minecube verify`")
    index = np.frombuffer(file[start + size - 16 * count - 4 : start + size - 4], "<u8")
    return _Shard(file, start, size, index.reshape(*shape, 2).tolist())


def _cuts(part: slice, chunk: int, shard: int) -> list[tuple[tuple[int, int], slice, slice]]:
    """The chunks that a part of one axis touches: shard and place in it, where in the part, where in the chunk."""
    cuts = []
    for n in range(part.start // chunk, -(-part.stop // chunk)):
        first, last = max(part.start, n * chunk), min(part.stop, (n + 1) * chunk)
        here, there = slice(first - part.start, last - part.start), slice(first - n * chunk, last - n * chunk)
        cuts.append((divmod(n, shard // chunk), here, there))
    return cuts


def _codec(metadata: Any) -> Any:
    """What unpacks a chunk of an array whose shards are packed as the template packs them; None for others."""
    (sharding,) = metadata["codecs"]
    if sharding["name"] != "sharding_indexed" or sharding["configuration"].get("index_location", "end") != "end":
        return None
    inner = [codec["name"] for codec in sharding["configuration"]["codecs"]]
    index = [codec["name"] for codec in sharding["configuration"]["index_codecs"]]
    if index != ["bytes", "crc32c"] or inner[:1] != ["bytes"] or len(inner) != 2:
        return None
    return {"zstd": numcodecs.Zstd(), "blosc": numcodecs.Blosc()}.get(inner[1])
