"""Recognise images and labels among the members of an archive."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from minecube.errors import ReleaseError

# `EuroMineNet/Portuga_1/label/Year2015.tif`; some files are Label2015.tif or year2015.tif instead.
_NAME = re.compile(
    r"(?:^|/)(?P<site>[^/]+)/(?P<kind>image|label)s?/"
    r"(?P<word>[A-Za-z]+)_?(?P<year>(?:19|20)\d\d)\.tiff?$",
    re.IGNORECASE,
)
_NO_DATA = re.compile(r"(?:^|/)(?:__MACOSX/|\.[^/]+$|Thumbs\.db$)")
_SITE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # site ids are group names, too
_REGULAR_END = re.compile(r"/Year\d{4}\.tif$")


@dataclass(frozen=True)
class Members:
    """The members of an archive by type."""

    images: Mapping[tuple[str, int], str]
    """Site and year -> name."""
    labels: Mapping[tuple[str, int], str]
    renamed: tuple[str, ...]
    """Recognised members with a name other than Year2015.tif."""
    duplicates: tuple[str, ...]
    """Ignored members: another member has the same site-year."""
    unrecognised: tuple[str, ...]

    def sites(self) -> list[str]:
        """List site names, with their numbers in numeric order."""
        return sorted({site for site, _ in (*self.images, *self.labels)}, key=split_number)


def split_number(name: str) -> tuple[str, int, str]:
    """Return a sort key for names: Germany_2 before Germany_10."""
    word = name.rstrip("0123456789")
    return word, int(name[len(word) :] or -1), name


def find_members(names: Iterable[str]) -> Members:
    """Find images and labels in an archive; raise ReleaseError if both are missing."""
    members: dict[str, dict[tuple[str, int], str]] = {"image": {}, "label": {}}
    renamed = []
    duplicates = []
    unrecognised = []
    candidates = [name for name in names if not _NO_DATA.search(name)]
    # Regular names come first and therefore win over duplicates.
    for name in sorted(candidates, key=lambda name: (not _REGULAR_END.search(name), name)):
        match = _NAME.search(name.replace("\\", "/"))
        if not match or _leads_outside(name) or not _SITE_ID.fullmatch(match["site"]):
            unrecognised.append(name)
            continue
        of_kind = members[match["kind"].lower()]
        site_year = (match["site"], int(match["year"]))
        if site_year in of_kind:
            duplicates.append(name)
            continue
        of_kind[site_year] = name
        if match["word"] != "Year":
            renamed.append(name)
    if not members["image"] and not members["label"]:
        examples = ", ".join(candidates[:3]) or "nothing"
        raise ReleaseError(
            "expected members such as EuroMineNet/Germany_1/label/Year2015.tif, "
            f"found {examples}: not the EuroMineNet release"
        )
    return Members(
        images=members["image"],
        labels=members["label"],
        renamed=tuple(renamed),
        duplicates=tuple(duplicates),
        unrecognised=tuple(unrecognised),
    )


def _leads_outside(name: str) -> bool:
    """Return whether a name leads out of the folder that it is unpacked to."""
    return name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name)
