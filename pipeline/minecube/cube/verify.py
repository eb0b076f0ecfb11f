"""Check a store: objects against their checksums, and pixels against each other.

Zarr reads a missing object as fill value, without an error: a false zero. The markers therefore
list the expected objects. A shard of another place decodes without an error, so decoding proves
nothing.

    markers, labels, predictions   SHA-256 of their own attributes, with the objects' checksums
    the site's group               SHA-256 of recipe and location, and of each array's metadata
    coordinates                    computed again from the grid
    pixels                         decoded from the checksummed bytes; reflectance, quality and
                                   counts must agree

Remains of a killed run are `unfinished`, not damaged. The same command completes them.

Each thread reads one block of one year at a time: one shard per variable, and its pixels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import obstore.exceptions
import pandas as pd
import zarr
from odc.geo.geobox import GeoBox
from zarr.core.buffer import default_buffer_prototype

from minecube.catalog import FALLBACKS, Recipe, recipe_of
from minecube.cube.builds import (
    PLACING,
    WITHDRAWN,
    build_id,
    is_staged,
    pixels_of,
    staged_year,
    used_scenes,
)
from minecube.cube.checksums import sealed, sum_of
from minecube.cube.predictions import place_of, places, unmapped
from minecube.cube.store import BEING_MADE, FORMAT, NAMED, Store
from minecube.cube.template import (
    FRACTION,
    LABELLING,
    WRITTEN_LATER,
    encoding_of,
    geozarr,
    grid_in,
    group_digest,
    identity,
    template,
)
from minecube.errors import CubeError, MinecubeError

_SETTLED = (
    "zarr_format",
    "node_type",
    "data_type",
    "dimension_names",
    "fill_value",
    "chunk_key_encoding",
)
_CLEAR_KINDS = (1, FALLBACKS["wider-season"], FALLBACKS["neighbour-year"])
"""Values of `quality` with observations counted in `clear_count`."""
UNFINISHED = "unfinished"
"""Kind of a finding about a killed or running command."""
CURES = ("build", "site", "label", "predict", "remove", "group")
"""Ways to repair a finding: build the year or the whole site again, write labels or a prediction
again, remove the object, or write an empty group again."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A difference between an object or variable and its written state."""

    site: str
    year: int | None
    """None for all years, or for an object without a year."""
    kind: str
    """missing, damaged, foreign (of another place), unexpected, contradictory, stale, unverifiable
    (no checksum), or unfinished."""
    what: str
    """The object, relative to the site's group, or the variable."""
    found: str
    cure: str
    """One of `CURES`."""

    def __str__(self) -> str:
        year = "" if self.year is None else f" {self.year}"
        return f"{self.site}{year}: {self.kind}: {_named(self.what)}: {self.found}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """Extent and findings of a check."""

    sites: tuple[str, ...]
    committed: Mapping[str, Mapping[int, Mapping[str, Any]]]
    """Site -> committed year -> its provenance, if readable."""
    objects: int
    bytes: int
    findings: tuple[Finding, ...]

    @property
    def whole(self) -> bool:
        """Whether all findings, if any, are `unfinished`."""
        return all(f.kind == UNFINISHED for f in self.findings)

    @property
    def rebuild(self) -> dict[str, list[int]]:
        """Site -> years to build again."""
        years: dict[str, set[int]] = {}
        for f in self.findings:
            if f.kind in ("unverifiable", UNFINISHED) or f.cure not in ("build", "site"):
                continue
            years.setdefault(f.site, set()).update(
                self.committed[f.site] if f.cure == "site" or f.year is None else [f.year]
            )
        return {site: sorted(of) for site, of in sorted(years.items())}


def named_sites(store: Store) -> list[str]:
    """List the sites in a store, also those unreadable for Zarr.

    Raises:
        CubeError: there is no store, it cannot be listed, or it contains nothing of minecube.
    """
    return sorted(_listed(store))


def verify(
    store: Store,
    names: Sequence[str] | None = None,
    *,
    workers: int = 4,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Report:
    """Check every object of these sites (default: all). Reads each object once and changes nothing.

    Unfinished builds are reported, but their objects are not read. Memory holds `workers` blocks.

    Raises:
        CubeError: as `named_sites`, or the store lacks one of the names.
    """
    files = _listed(store)
    unknown = sorted(set(names or ()) - set(files))
    if unknown:
        raise CubeError(f"{store}: no site {unknown[0]!r}; it has {', '.join(sorted(files))}")
    raw = store.open_objects()
    sites = [_Site(raw, name, files[name]) for name in sorted(set(names or files))]
    findings = list(_empty_group("", "zarr.json", _content(raw, "zarr.json")))
    for site in sites:
        findings += site.survey()
    known = {value[1]: f"{s.name} {_named(key)}" for s in sites for key, value in s.sums.items()}
    tasks = [(s.name, task) for s in sites for task in s.tasks(known)]
    with ThreadPoolExecutor(workers) as pool:
        for done, ((name, _), found) in enumerate(
            zip(tasks, pool.map(lambda t: t[1](), tasks), strict=True), start=1
        ):
            findings += found
            progress(done, len(tasks), name)
    for site in sites:
        findings = site.without_changed(findings)
    return Report(
        sites=tuple(s.name for s in sites),
        committed={s.name: s.committed for s in sites},
        objects=sum(len(s.files) for s in sites),
        bytes=sum(sum(s.files.values()) for s in sites),
        findings=tuple(sorted(findings, key=lambda f: (f.site, f.year or 0, f.what))),
    )


def _listed(store: Store) -> dict[str, dict[str, int]]:
    """Map each site to its objects (key relative to its group -> bytes)."""
    if store.path is not None and not (store.path.is_dir() or store.packed):
        found = "is a file" if store.path.exists() else "there is no store"
        raise CubeError(
            f"{store}: {found}; name the folder, or the URL, that `minecube build` was given as --store"
        )
    groups: dict[str, dict[str, int]] = {}
    try:
        raw = store.open_objects()
        for batch in raw.list():
            for entry in batch:
                name, _, path = entry["path"].partition("/")
                groups.setdefault(name, {})[path] = entry["size"]
    except (obstore.exceptions.BaseError, OSError, ValueError) as error:
        raise CubeError(
            f"{store}: cannot be listed ({error}); check its name, and the keys it needs"
        ) from error
    ours = {name: files for name, files in groups.items() if _is_ours(raw, name, files)}
    if not ours:
        raise CubeError(
            f"{store}: no site of minecube is in it, so there is nothing to verify; name another --store"
        )
    return ours


def _is_ours(raw: Any, name: str, files: Mapping[str, int]) -> bool:
    if any(path.startswith("builds/") for path in files):
        return True  # also without its own metadata
    return NAMED in (_attributes(_content(raw, f"{name}/zarr.json")) or {})


def _content(raw: Any, path: str) -> Any:
    """Return an object's bytes; None if it is missing, the error if it cannot be read."""
    try:
        return bytes(raw.get(path).bytes())
    except FileNotFoundError:
        return None
    except (obstore.exceptions.BaseError, OSError) as error:  # a bad sector, for example
        return error


def _json(content: Any) -> Any:
    """Parse a JSON object; None if it is missing or damaged."""
    try:
        return json.loads(content) if isinstance(content, bytes) else None
    except ValueError:
        return None


def _attributes(content: Any) -> dict[str, Any] | None:
    """Return the attributes in a Zarr group's metadata; None if there is no valid group."""
    group = _json(content)
    if not isinstance(group, dict) or (group.get("zarr_format"), group.get("node_type")) != (
        3,
        "group",
    ):
        return None
    attrs = group.get("attributes")
    return attrs if isinstance(attrs, dict) else None


def _named(path: str) -> str:
    """Return a readable name of a shard, with variable and block; other paths as they are."""
    variable, c, place = path.partition("/c/")
    at = place.split("/")
    return (
        f"{variable.rpartition('/')[2]} block {at[-2]}/{at[-1]} ({path})"
        if c and len(at) > 2
        else path
    )


def _empty_group(site: str, path: str, content: Any) -> Iterator[Finding]:
    found = _json(content)
    if content is None or found != {"attributes": {}, "zarr_format": 3, "node_type": "group"}:
        kind = "missing" if content is None else "damaged"
        yield Finding(
            site=site,
            year=None,
            kind=kind,
            what=path,
            found="expected an empty Zarr group",
            cure="group",
        )


Task = Callable[[], list[Finding]]


@dataclass
class _Site:
    """One stored site. `survey` checks its metadata, `tasks` its other objects."""

    raw: Any
    name: str
    files: Mapping[str, int]
    committed: dict[int, dict[str, Any]] = field(default_factory=dict)
    sums: dict[str, list[Any]] = field(default_factory=dict)
    """Object -> size and SHA-256 as written, from all intact lists."""
    years: list[int] = field(default_factory=list)
    """Values of the coordinate."""
    metadata: dict[str, bytes] = field(default_factory=dict)
    """Array -> its `zarr.json`."""
    built: set[str] = field(default_factory=lambda: {"reflectance", "clear_count", "quality"})
    """Variables written by builds. The others are labels."""
    unsure: set[int] = field(default_factory=set)
    """Committed years without checksums."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """The group's attribute `minecube`."""
    judged: dict[str, Any] = field(default_factory=dict)
    """Metadata of years, labels and maps -> its content when read, to detect later changes."""
    labelling: set[int] = field(default_factory=set)
    """Years with unfinished labels."""
    grid: GeoBox | None = None
    mapped: dict[str, dict[int, bool]] = field(default_factory=dict)
    """Prediction -> index on the first axis -> whether it is complete. Needs checksums."""
    lossy: Mapping[str, float] = field(default_factory=dict)
    """`incomplete_reads` of the group."""
    expected: Mapping[str, Any] = field(default_factory=dict)
    """Array -> its `zarr.json`, made again from the template."""

    def survey(self) -> list[Finding]:
        """Check metadata, markers and coordinates, and report missing and unexpected objects."""
        found = list(self._group())
        found += self._markers()
        found += self._labels()
        found += self._predictions()
        found += self._missing()
        found += self._unexpected()
        return found

    def without_changed(self, findings: list[Finding]) -> list[Finding]:
        """Replace the findings about metadata written during the check by one `unfinished` each."""
        changed = {
            key
            for key, content in self.judged.items()
            if _content(self.raw, f"{self.name}/{key}") != content
        }
        kept = [f for f in findings if f.site != self.name or _metadata_of(f) not in changed]
        about = {
            _metadata_of(f): f
            for f in findings
            if f.site == self.name and _metadata_of(f) in changed
        }
        for key, finding in sorted(about.items()):
            kept.append(
                self._unfinished(
                    key,
                    "it was written while it was verified",
                    finding.cure,
                    finding.year,
                    "verify",
                )
            )
        return kept

    def tasks(self, known: Mapping[str, str]) -> Iterator[Task]:
        """Yield checks of the objects' content. `known` maps each SHA-256 to its place."""
        blocks: dict[tuple[int, int, int], list[str]] = {}
        for key in sorted({*self.sums, *self.files}):
            at = self._place(key)
            if at is None:
                if key in self.sums and key in self.files:
                    yield partial(self._object, key, known)
            elif key in self.sums or self._year(at[0]) in self.unsure:
                blocks.setdefault(at, []).append(key)
        for at, keys in sorted(blocks.items()):
            yield partial(self._block, at, keys, known)
        for year in self.committed:
            yield partial(self._records, year)

    def _unfinished(
        self, what: str, found: str, cure: str, year: int | None = None, command: str = ""
    ) -> Finding:
        """Make a finding about remains of a run. `command` completes them (default: the cure)."""
        said = f"{found}; run `minecube {command or cure}` again, unless it is still running"
        return self._find(UNFINISHED, what, said, cure, year)

    def _find(
        self, kind: str, what: str, found: str, cure: str, year: int | None = None
    ) -> Finding:
        return Finding(site=self.name, year=year, kind=kind, what=what, found=found, cure=cure)

    def _place(self, key: str) -> tuple[int, int, int] | None:
        """Return the year index, row and column of a variable's shard; None for other objects."""
        parts = key.split("/")
        if (
            parts[1:2] != ["c"]
            or len(at := parts[2:]) < 3
            or not all(part.isdigit() for part in at)
        ):
            return None
        return int(at[0]), int(at[-2]), int(at[-1])

    def _year(self, index: int) -> int | None:
        return self.years[index] if index < len(self.years) else None

    def _about(self, key: str) -> tuple[int | None, str]:
        """Return the year and the cure of a faulty object."""
        first, *rest = key.split("/")
        if first == "predictions":
            return None, "predict"
        if first == "builds":
            return int(rest[0]), "build"
        at = self._place(key)
        return (self._year(at[0]) if at else None), ("build" if first in self.built else "label")

    # Metadata

    def _group(self) -> Iterator[Finding]:
        names = {
            path.split("/")[0]
            for path in self.files
            if path.count("/") == 1 and path.endswith("/zarr.json")
        }
        names -= {"builds", "predictions"}
        contents = {
            name: _content(self.raw, f"{self.name}/{name}/zarr.json") for name in sorted(names)
        }
        self.metadata = {
            name: content for name, content in contents.items() if isinstance(content, bytes)
        }
        self.years = [int(y) for y in self._values("year", [])]
        attrs = _attributes(_content(self.raw, f"{self.name}/zarr.json")) or {}
        about = attrs.get(NAMED, {})
        if about == {"format": BEING_MADE}:
            yield self._unfinished("zarr.json", "the site's group was being created", "build")
            return
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            yield self._find(
                "damaged", "zarr.json", "is not the metadata of a site of this version", "site"
            )
            return
        try:
            recipe = recipe_of(about["recipe"])
            grid = grid_in(attrs)
        except (MinecubeError, KeyError, ValueError, TypeError, RuntimeError) as error:
            yield self._find(
                "damaged", "zarr.json", f"recipe or place cannot be understood ({error})", "site"
            )
            return
        if {"sha256", "arrays", "years"} & set(about) and about.get("sha256") != group_digest(
            attrs
        ):
            yield self._find(
                "damaged",
                "zarr.json",
                "recipe or place is not what the group was made with",
                "site",
            )
        elif about.get("site") != self.name:
            yield self._find("foreign", "zarr.json", f"is of site {about.get('site')!r}", "site")
        off = sorted(
            k
            for k, v in geozarr(grid).items()
            if k.startswith(("proj:", "spatial:")) and attrs.get(k) != v
        )
        if off:
            yield self._find(
                "contradictory", "zarr.json", f"{', '.join(off)} are not those of the grid", "site"
            )
        self.built |= {"reflectance", *recipe.layers}
        yield from self._arrays(grid, recipe, about)
        self.about, self.grid, self.lossy = about, grid, attrs.get("incomplete_reads", {})

    def _arrays(self, grid: GeoBox, recipe: Recipe, about: Mapping[str, Any]) -> Iterator[Finding]:
        years, identities = self.years, about.get("arrays", {})
        noted = about.get("years", years)
        # Room for another year is named 0 until the year is written.
        named = years[: years.index(0)] if 0 in years else years
        growing = years != noted and named[: len(noted)] == noted and not any(years[len(named) :])
        if growing:
            yield self._unfinished("year", "room for another year was being made", "build")
        if not named or sorted(set(named)) != named or (years != noted and not growing):
            yield self._find(
                "damaged",
                "year",
                f"expected {about.get('years', 'ascending years')}, found {years}",
                "site",
            )
        empty = template(grid, years or [2000], recipe)
        memory: dict[str, Any] = {}
        encoding = {str(n): encoding_of(v, recipe) for n, v in empty.data_vars.items()}
        store = zarr.storage.MemoryStore(memory)
        empty.to_zarr(
            store, mode="w", compute=False, consolidated=False, zarr_format=3, encoding=encoding
        )
        self.expected = {
            n: json.loads(memory[f"{n}/zarr.json"].to_bytes()) for n in map(str, empty.variables)
        }
        for name in sorted({*self.expected, *identities}):
            held = _json(self.metadata.get(name))
            if name == FRACTION and name not in {*self.metadata, *identities}:
                continue  # a cube of a version without fractions: the next labelling adds one
            if held is None:
                kind = "damaged" if name in self.metadata else "missing"
                yield self._find(
                    kind,
                    f"{name}/zarr.json",
                    "without it no pixel of the variable can be read",
                    "site",
                )
                continue
            asked = self.expected.get(name, held)
            keys = (*_SETTLED, *(("chunk_grid", "shape") if name in empty.data_vars else ()))
            off = [k for k in keys if held.get(k) != asked.get(k)]
            if off == ["shape"] and _has_more_years(held, asked):
                yield self._unfinished(
                    f"{name}/zarr.json", "room for another year was being made", "build"
                )
            elif off:
                said = "; ".join(f"{k} {held.get(k)}, expected {asked.get(k)}" for k in off)
                yield self._find("damaged", f"{name}/zarr.json", said, "site")
            elif name in identities and identities[name] != identity(held):
                yield self._find(
                    "damaged", f"{name}/zarr.json", "is not what the group was made with", "site"
                )
        for name in map(str, empty.coords):
            want = empty[name].to_numpy()
            got = self._values(name, None)
            if name == "year" or (
                got is not None and got.shape == want.shape and (got == want).all()
            ):
                continue
            why = "cannot be read" if got is None else "values are not those of the grid"
            yield self._find("damaged", name, f"coordinate: {why}", "site")

    def _values(self, name: str, default: Any) -> Any:
        """Read a small array as a whole; return the default if it cannot be read."""
        contents = {
            path: _content(self.raw, f"{self.name}/{path}")
            for path in self.files
            if path.startswith(f"{name}/")
        }
        try:
            return _opened({path.removeprefix(f"{name}/"): c for path, c in contents.items()})[...]
        except Exception:  # zarr may raise anything on damaged bytes: the caller reports it
            return default

    def _markers(self) -> Iterator[Finding]:
        seen = {
            int(p.split("/")[1])
            for p in self.files
            if p.startswith("builds/") and p.split("/")[1].isdigit()
        }
        if seen or "builds/zarr.json" in self.files:
            yield from _empty_group(
                self.name, "builds/zarr.json", _content(self.raw, f"{self.name}/builds/zarr.json")
            )
        staged = {p.split("/")[1] for p in self.files if is_staged(p)}
        begun = {year for name in staged if (year := staged_year(name)) is not None}
        for name in sorted(staged):
            # The year may have been committed since the store was listed.
            if any(
                _content(self.raw, f"{self.name}/{p}") is not None
                for p in self.files
                if p.startswith(f"builds/{name}/")
            ):
                yield self._unfinished(
                    f"builds/{name}", "the year was being built", "build", staged_year(name)
                )
        stored = {
            at[0] for p in self.files if (at := self._place(p)) and p.split("/")[0] in self.built
        }
        for year in sorted(seen | begun | {y for i in stored if (y := self._year(i)) is not None}):
            path = f"builds/{year}/zarr.json"
            content = _content(self.raw, f"{self.name}/{path}")
            self.judged[path] = content
            attrs = _attributes(content)
            if content is None and year not in seen and year in begun:
                continue
            if attrs is None:
                kind, said = (
                    ("missing", "pixels are there, but")
                    if content is None
                    else ("damaged", "cannot be understood, so")
                )
                self.committed[year] = {}
                yield self._find(
                    kind, path, f"{said} nothing says what the year is made of", "build", year
                )
                continue
            if not attrs or ("building" in attrs and "build_id" not in attrs):
                continue  # not built, or begun by an older version
            if WITHDRAWN in attrs:
                yield self._unfinished(path, "the year was being withdrawn", "build", year)
                continue
            if PLACING in attrs:
                yield self._unfinished(path, "the year was being put in place", "build", year)
                continue
            self.committed[year] = attrs
            yield from self._marker(year, path, self.committed[year])

    def _marker(self, year: int, path: str, attrs: Mapping[str, Any]) -> Iterator[Finding]:
        damaged = partial(self._find, "damaged", path, cure="build", year=year)
        if "sha256" not in attrs and "checksums" not in attrs and "build_id" in attrs:
            self.unsure.add(year)
            said = "was built before checksums were kept; a flipped bit, or a shard that is gone, may not be seen"
            yield self._find("unverifiable", path, said, "build", year)
        elif attrs != sealed(attrs) or "build_id" not in attrs:
            self.committed[year] = {}
            yield damaged("is not what was committed")
            return
        else:
            self.sums |= attrs["checksums"]
        try:
            made = build_id(attrs)
        except (KeyError, TypeError, AttributeError):
            made = "none"
        if made != attrs["build_id"]:
            yield damaged(
                f"says it is build {attrs['build_id']}, but what it is made of is build {made}"
            )
        if (attrs.get("site"), attrs.get("year")) != (self.name, year):
            yield self._find(
                "foreign",
                path,
                f"is that of {attrs.get('site')} {attrs.get('year')}",
                "build",
                year,
            )
        if year not in self.years:
            yield self._find(
                "contradictory", path, f"the cube's years are {self.years}", "site", year
            )
            return
        at = {a[0] for key in attrs.get("checksums", {}) if (a := self._place(key))}
        if at - {self.years.index(year)}:
            yield self._find(
                "contradictory",
                path,
                f"its pixels are at {sorted(at)} among the years {self.years}",
                "site",
                year,
            )
        yield from self._same_make(year, path, attrs)

    def _same_make(self, year: int, path: str, attrs: Mapping[str, Any]) -> Iterator[Finding]:
        """Compare the recipe, grid and share of reads of a year with the group."""
        if self.grid is None:
            return
        theirs = {k: v for k, v in self.about["recipe"].items() if k != "title"}
        if {k: v for k, v in attrs.get("recipe", {}).items() if k != "title"} != theirs:
            yield self._find(
                "contradictory",
                path,
                "was made by another recipe than the site's group",
                "build",
                year,
            )
        grid = attrs.get("grid", {})
        here = (f"EPSG:{self.grid.crs.epsg}", list(self.grid.transform)[:6], list(self.grid.shape))
        if (grid.get("crs"), grid.get("transform"), grid.get("shape")) != here:
            yield self._find(
                "contradictory",
                path,
                "was made on another grid than the site's group",
                "build",
                year,
            )
        share = attrs.get("reads", {}).get("completeness", 1.0)
        if self.lossy.get(str(year), 1.0) != share:
            said = f"incomplete_reads says {self.lossy.get(str(year), 1.0)}, the marker {share}"
            yield self._find("contradictory", "zarr.json", said, "build", year)

    def _labels(self) -> Iterator[Finding]:
        for name, content in self.metadata.items():
            self.judged[f"{name}/zarr.json"] = content
            meta = _json(content)
            attrs = meta.get("attributes", {}) if isinstance(meta, dict) else {}
            kept = {k: attrs[k] for k in WRITTEN_LATER if k in attrs}
            if not kept or name in self.built:
                continue
            if "checksums" in kept and kept != sealed(kept):
                yield self._find(
                    "damaged",
                    f"{name}/zarr.json",
                    "origin or checksums are not what was written",
                    "label",
                )
                continue
            for year in kept.get(LABELLING, ()):
                self.labelling.add(year)
                yield self._unfinished(name, "labels were being written", "label", year)
            self.sums |= kept.get("checksums", {})

    def _predictions(self) -> Iterator[Finding]:
        models = sorted(
            {
                p.split("/")[1]
                for p in self.files
                if p.startswith("predictions/") and p.count("/") > 1
            }
        )
        if models:
            path = "predictions/zarr.json"
            yield from _empty_group(self.name, path, _content(self.raw, f"{self.name}/{path}"))
        now = {str(year): pixels_of(attrs) for year, attrs in self.committed.items() if attrs}
        for model in models:
            path = f"predictions/{model}/zarr.json"
            self.judged[path] = _content(self.raw, f"{self.name}/{path}")
            attrs = _attributes(self.judged[path])
            if attrs is None or ("checksums" in attrs and attrs != sealed(attrs)):
                yield self._find("damaged", path, "is not what was written", "predict")
            elif "model" not in attrs:
                yield self._unfinished(
                    f"predictions/{model}", "the map was being created", "predict"
                )
            elif "checksums" not in attrs:
                yield self._find(
                    "unverifiable", path, "was made before checksums were kept", "predict"
                )
            else:
                self.sums |= {
                    f"predictions/{model}/{key}": value for key, value in attrs["checksums"].items()
                }
                self.mapped[model] = places(attrs)
                lacking = unmapped(attrs, now)
                if lacking:
                    command = "tracks" if "made_of" in attrs["model"] else "predict"
                    said = f"{', '.join(lacking)} not mapped"
                    yield self._unfinished(f"predictions/{model}", said, "predict", command=command)
                of = {
                    year: build
                    for done in attrs.get("done", {}).values()
                    for year, build in done["builds"].items()
                }
                years = {str(year) for view in attrs.get("views", ()) for year in view}
                later = set(now) - years if attrs.get("variable") == "probability" else set()
                if (later or any(now.get(year) != build for year, build in of.items())) and all(
                    self.committed.values()
                ):
                    yield self._find(
                        "stale",
                        f"predictions/{model}",
                        "was mapped from other builds than there are",
                        "predict",
                    )

    def _missing(self) -> Iterator[Finding]:
        for key in sorted(set(self.sums) - set(self.files)):
            if _content(self.raw, f"{self.name}/{key}") is not None:
                continue  # committed after the store was listed
            year, cure = self._about(key)
            said = "is gone, and reads as if nothing were there" if self._place(key) else "is gone"
            yield self._find("missing", key, said, cure, year)

    def _unexpected(self) -> Iterator[Finding]:
        """Report objects without any record."""
        whole = {y for y, attrs in self.committed.items() if "checksums" in attrs}
        arrays = {*self.expected, *self.about.get("arrays", {})}
        for key in sorted(
            set(self.files)
            - set(self.sums)
            - {"zarr.json", "builds/zarr.json", "predictions/zarr.json"}
        ):
            first, *rest = key.split("/")
            if is_staged(key):
                continue
            if first == "builds" and rest[0].isdigit():
                year = int(rest[0])
                if year not in whole or rest[1:] == ["zarr.json"]:
                    continue
            elif first == "predictions" and len(rest) > 1:
                place = place_of("/".join(rest[1:]))
                being_mapped = place is not None and not self.mapped.get(rest[0], {}).get(
                    place, True
                )
                if rest[0] not in self.mapped or rest[1:] == ["zarr.json"] or being_mapped:
                    continue
            elif first in self.metadata and (first in arrays or not self.about):
                at = self._place(key)
                if rest == ["zarr.json"] or (
                    rest[:1] == ["c"] and _is_coordinate(_json(self.metadata[first]), rest[1:])
                ):
                    continue
                if (
                    at
                    and first in self.built
                    and self._year(at[0]) is not None
                    and self._year(at[0]) not in whole
                ):
                    continue  # of a year being built, or without checksums
                if at and first not in self.built and self._year(at[0]) in self.labelling:
                    continue
                if at and first not in self.built:
                    said = "has no checksum: older than they are, or from elsewhere"
                    yield self._find("unverifiable", key, said, "label", self._year(at[0]))
                    continue
            at = self._place(key)
            yield self._find(
                "unexpected",
                key,
                "nothing that was written here",
                "remove",
                self._year(at[0]) if at else None,
            )

    # Content

    def _summed(self, key: str, content: Any, known: Mapping[str, str]) -> Finding | None:
        """Compare an object's bytes with its checksum; None if they agree."""
        year, cure = self._about(key)
        if not isinstance(content, bytes):
            said = "is gone" if content is None else f"cannot be read ({content})"
            return self._find("missing" if content is None else "damaged", key, said, cure, year)
        (size, sha256), written = sum_of(content), self.sums[key]
        if [size, sha256] == written:
            return None
        if sha256 in known:
            return self._find("foreign", key, f"is that of {known[sha256]}", cure, year)
        said = (
            f"{size} bytes, of which some are not those written"
            if size == written[0]
            else f"{size} of {written[0]} bytes"
        )
        return self._find("damaged", key, said, cure, year)

    def _object(self, key: str, known: Mapping[str, str]) -> list[Finding]:
        found = self._summed(key, _content(self.raw, f"{self.name}/{key}"), known)
        return [found] if found else []

    def _block(
        self, at: tuple[int, int, int], keys: Sequence[str], known: Mapping[str, str]
    ) -> list[Finding]:
        """Check a block of a year: the bytes of its shards, then its pixels against each other."""
        found: list[Finding] = []
        pixels: dict[str, Any] = {}
        lacking = {key.split("/")[0] for key in keys if key not in self.files}
        for key in (k for k in keys if k in self.files):
            content, name = _content(self.raw, f"{self.name}/{key}"), key.split("/")[0]
            unread = not isinstance(content, bytes)
            if (unread or key in self.sums) and (wrong := self._summed(key, content, known)):
                found.append(wrong)
                lacking.add(name)
                continue
            try:
                pixels[name] = _decoded(
                    self.metadata[name], key.removeprefix(f"{name}/"), content, at
                )
            except Exception as error:  # zarr and its codecs may raise anything on damaged bytes
                year, cure = self._about(key)
                found.append(
                    self._find(
                        "damaged",
                        key,
                        f"cannot be decoded ({type(error).__name__}: {error})",
                        cure,
                        year,
                    )
                )
                lacking.add(name)
        contradiction = partial(self._find, "contradictory", year=self._year(at[0]))
        for name, values in pixels.items():
            for said in _impossible(values, _json(self.metadata[name])["attributes"]):
                cure = "build" if name in self.built else "label"
                found.append(contradiction(f"{name} block {at[1]}/{at[2]}", said, cure))
        if not lacking & self.built and self._year(at[0]) in self.committed:
            disagree = _disagreements({n: v for n, v in pixels.items() if n in self.built})
            found += [contradiction(f"block {at[1]}/{at[2]}", said, "build") for said in disagree]
        return found

    def _records(self, year: int) -> list[Finding]:
        """Compare scene list and read counts with the marker."""
        attrs, found = self.committed[year], []
        for name, told in (("scenes", attrs.get("scenes")), ("reads", attrs.get("reads"))):
            path = f"builds/{year}/{name}"
            values = self._values(path, None)
            if told is None or any(
                k.startswith(f"{path}/") and k not in self.files for k in self.sums
            ):
                continue  # nothing to compare, or reported as missing
            try:
                table = pd.read_parquet(
                    io.BytesIO(bytes(values)), columns=["id"] if name == "scenes" else None
                )
            except Exception as error:  # Parquet may raise anything on damaged bytes
                found.append(
                    self._find(
                        "damaged",
                        path,
                        f"cannot be read as Parquet ({type(error).__name__})",
                        "build",
                        year,
                    )
                )
                continue
            if name == "scenes":
                agree = sorted(table["id"]) == sorted(s["id"] for s in used_scenes(attrs))
            else:
                agree = all(
                    int(table[k].sum()) == told[k]
                    for k in ("planned", "lost")
                    if k in told and k in table
                )
            if not agree:
                found.append(
                    self._find(
                        "contradictory",
                        path,
                        f"is not of the {name} that the marker counts",
                        "build",
                        year,
                    )
                )
        return found


def _metadata_of(finding: Finding) -> str:
    """Return the key of the metadata behind a finding."""
    first, *rest = finding.what.split("/")
    if finding.cure == "build":
        return f"builds/{finding.year}/zarr.json"
    return (
        f"predictions/{rest[0]}/zarr.json"
        if first == "predictions" and rest
        else f"{first.split(' ')[0]}/zarr.json"
    )


def _has_more_years(held: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether an array differs from the expected shape only by more years."""
    first, *rest = held["shape"]
    return bool(first > asked["shape"][0] and rest == list(asked["shape"][1:]))


def _is_coordinate(metadata: Any, at: Sequence[str]) -> bool:
    """Whether `c/<at>` is a chunk of a coordinate."""
    try:
        shape, chunk = metadata["shape"], metadata["chunk_grid"]["configuration"]["chunk_shape"]
        last = [(n - 1) // side for n, side in zip(shape, chunk, strict=True)]
        return len(last) < 3 and all(int(a) <= n for a, n in zip(at, last, strict=True))
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return False


def _opened(contents: Mapping[str, Any]) -> zarr.Array:
    """Open an array with these objects."""
    buffer = default_buffer_prototype().buffer
    memory = {
        path: buffer.from_bytes(content)
        for path, content in contents.items()
        if isinstance(content, bytes)
    }
    return zarr.open_array(zarr.storage.MemoryStore(memory), mode="r")


def _decoded(metadata: bytes, key: str, content: bytes, at: tuple[int, int, int]) -> Any:
    """Decode the pixels of one shard from its bytes."""
    array = _opened({"zarr.json": metadata, key: content})
    rows, columns = (
        slice(n * side, (n + 1) * side) for n, side in zip(at[1:], array.shards[-2:], strict=True)
    )
    return array[(at[0], ..., rows, columns)]


def _impossible(values: Any, attrs: Mapping[str, Any]) -> Iterator[str]:
    """Report invalid values of a variable with flags."""
    if "flag_values" in attrs:
        strange = sorted(
            set(np.unique(values).tolist()) - {*attrs["flag_values"], attrs.get("nodata")}
        )
        if strange:
            yield f"expected {attrs['flag_values']} or {attrs.get('nodata')}, found {strange[:5]}"


def _disagreements(pixels: Mapping[str, Any]) -> Iterator[str]:
    """Report contradictions between a block's variables. A missing variable is all fill value."""
    if not pixels:
        return
    shape = next(iter(pixels.values())).shape[-2:]
    quality = pixels.get("quality", np.zeros(shape, np.uint8))
    seen = quality > 0
    reflectance = pixels.get("reflectance", np.zeros((1, *shape), np.uint16))
    for said, wrong in (
        ("have a quality, but no reflectance in some band", seen & (reflectance == 0).any(axis=0)),
        ("have reflectance, but no quality", ~seen & (reflectance > 0).any(axis=0)),
        (
            "count clear observations where quality has no clear kind, or the other way round",
            (pixels.get("clear_count", np.zeros(shape, np.uint16)) > 0)
            != np.isin(quality, _CLEAR_KINDS),
        ),
        *(
            (
                f"have {name}, but no quality",
                ~seen & (np.isfinite(values) if values.dtype.kind == "f" else values > 0),
            )
            for name, values in pixels.items()
            if name not in ("quality", "reflectance", "clear_count")
        ),
    ):
        if wrong.any():
            yield f"{int(wrong.sum())} pixels {said}"
