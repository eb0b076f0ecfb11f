"""Choose sites of the catalogue, of a file or of a store."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minecube import cube
from minecube.catalog import Site, load_sites, match_ids
from minecube.errors import CatalogError
from minecube.jobs.catalogs import need_new_names
from minecube.places import Place, place_of
from minecube.vectors import SUFFIXES

_LISTED = 8  # most names in an error


@dataclass(frozen=True)
class SiteChoice:
    """Names of sites, or a file of sites and its layer."""

    text: str
    """Names, comma-separated, * allowed; or the path or URL of a file."""
    layer: str | None = None
    """Layer of the file, if several layers have polygons."""

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def is_file(self) -> bool:
        """Return whether the text is a URL, or names a file.

        A name of a file has the suffix of polygons, or a suffix and a folder, or exists.
        """
        if "://" in self.text:
            return True
        path = Path(self.text)
        if path.suffix.lower() in SUFFIXES:
            return True
        return path.suffix != "" and (path.name != self.text or path.is_file())


def choose_sites(choice: SiteChoice, folder: Place | None) -> list[Site]:
    """Choose sites of the catalogue by name, or all sites of a file.

    The file sites.geojson in the user's folder adds sites to the shipped ones.

    Raises:
        CatalogError: a name has no match, or the file is missing.
    """
    if choice.is_file():
        place = place_of(choice.text)
        if not place.exists():
            raise CatalogError(f"{choice}: no such file; expected polygons of sites")
        return load_sites(place, layer=choice.layer)
    _need_no_layer(choice)
    sites = {site.id: site for site in load_sites()}
    if folder and (folder / "sites.geojson").exists():
        users = {s.id: s for s in load_sites(folder / "sites.geojson", catalogue=True)}
        # The user's entry may replace a shipped site without geometry.
        placed = {
            name: site
            for name, site in sites.items()
            if name not in users or site.geometry is not None
        }
        need_new_names(placed, users, folder, "site")
        sites |= users
    return [sites[name] for name in match_names(choice.text, list(sites), "the catalogue")]


def stored_sites(
    store: cube.Store, choice: SiteChoice, names: Sequence[str] | None = None
) -> list[str]:
    """Choose sites of a store by name, or by a file of sites. Returns their names.

    Chooses from `names`, by default all sites in the store.

    Raises:
        CatalogError: a name has no match, or a site of the file is missing in the store.
        CubeError: the store cannot be read.
    """
    if names is None:
        names = cube.list_sites(store)
    if not choice.is_file():
        _need_no_layer(choice)
        return match_names(choice.text, names, str(store))
    sites = [site.id for site in choose_sites(choice, None)]
    missing = [name for name in sites if name not in names]
    if missing:
        raise CatalogError(
            f"{store}: no site {missing[0]!r} of {choice}; "
            f"it has {', '.join(sorted(names))}; build it first"
        )
    return sites


def match_names(patterns: str, names: Sequence[str], place: str) -> list[str]:
    """List the names matching comma-separated patterns, each once.

    A pattern without * also matches a name that differs in case, accents or spaces only. `place` is
    the origin of the names, for errors.

    Raises CatalogError for a pattern without a match.
    """
    matches: list[str] = []
    for text in patterns.split(","):
        matches += _match_pattern(text.strip(), names, place)
    return list(dict.fromkeys(matches))


def _match_pattern(pattern: str, names: Sequence[str], place: str) -> list[str]:
    matches = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
    if not matches and not set(pattern) & set("*?["):
        matches = match_ids(pattern, names)
        if len(matches) > 1:
            raise CatalogError(
                f"site {pattern!r} may be {' or '.join(matches)}; spell it as one of them"
            )
    if matches:
        return matches
    if Path(pattern).is_file():
        raise CatalogError(
            f"{pattern}: expected a site or a file with the suffix of its format; rename the file"
        )
    listed = list(names)[:_LISTED]
    if len(names) > _LISTED:
        listed.append("...")
    raise CatalogError(f"unknown site {pattern!r}; {place} has {', '.join(listed) or 'no site'}")


def _need_no_layer(choice: SiteChoice) -> None:
    if choice.layer is not None:
        raise CatalogError(
            f"expected a file of sites with the layer {choice.layer!r}, "
            f"found --sites {choice}; name the file"
        )
