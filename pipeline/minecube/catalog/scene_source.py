"""A source of scenes: where they are listed, how they are read, and which offset they carry."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from minecube.catalog.fields import check_field, need
from minecube.catalog.mission import BANDS, NATIVE_M, SCL

_COMMON_NAMES = (
    "blue",
    "green",
    "red",
    "rededge1",
    "rededge2",
    "rededge3",
    "nir",
    "nir08",
    "swir16",
    "swir22",
    "scl",
)
ASSET_KEYS = {
    band: (common, band, f"{band}_{NATIVE_M[band]}m")
    for band, common in zip((*BANDS, SCL), _COMMON_NAMES, strict=True)
}
"""Band -> asset keys in common use, at the band's own pixel size.

They are Element 84's, Microsoft's and CDSE's.
"""


@dataclass(frozen=True, kw_only=True)
class Offset:
    """Rule for BOA_ADD_OFFSET in a scene's pixels, independent of the acquisition date."""

    value: int = -1000
    """Number to add to digital numbers with the offset (Sentinel-2 PSD, BOA_ADD_OFFSET)."""
    from_baseline: str = "04.00"
    """First processing baseline with the offset."""
    applied_flag: str | None = None
    """Item property: true if the provider has already removed the offset."""
    own: int | str | None = None
    """The offset of baseline 99.xx, the mark of products from one's own Sen2Cor.

    A number, or `declared` for the raster offset in each item's bands. None refuses these products,
    since no rule gives their offset.
    """

    def __post_init__(self) -> None:
        fits = self.own is None or self.own == "declared" or isinstance(self.own, int)
        check_field(fits, self, "own", "a number or declared")
        is_baseline = re.fullmatch(r"\d\d\.\d\d", self.from_baseline)
        check_field(is_baseline, self, "from_baseline", "NN.NN")


@dataclass(frozen=True, kw_only=True)
class Access:
    """How to turn an asset's href into an authorised request. Contains no secrets."""

    kind: str = "plain"
    """plain: without credentials.

    planetary-computer: a token per container.

    s3: signed with keys from the environment.
    """
    href: str | None = None
    """planetary-computer: the token service, called with /<account>/<container>.

    s3: the endpoint, by default AWS's.
    """
    region: str | None = None
    """s3 only; by default the environment's."""
    anonymous: bool = False
    """s3 only: public objects, with unsigned requests."""
    credentials_for: tuple[str, ...] = ()
    """planetary-computer: more hosts allowed to see a token; s3: buckets with signed requests."""
    connections: int = 64
    """Most simultaneous requests for pixels per process."""

    def __post_init__(self) -> None:
        kinds = ("plain", "planetary-computer", "s3")
        check_field(self.kind in kinds, self, "kind", f"one of {', '.join(kinds)}")
        has_service = self.kind != "planetary-computer" or self.href
        need(has_service, "href", "the URL of the token service, found none")
        fits = self.kind == "s3" or not (self.region or self.anonymous)
        need(fits, "region", f"kind s3 for this field, found {self.kind!r}")
        check_field(not self.href or re.match("https?://", self.href), self, "href", "a URL")
        fits = (self.kind != "plain" and not self.anonymous) or not self.credentials_for
        names = ", ".join(self.credentials_for)
        need(fits, "credentials_for", f"no names where nothing is signed, found {names}")
        bare = all(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) for name in self.credentials_for
        )
        need(bare, "credentials_for", f"bare names such as files.example.org, found {names}")
        check_field(1 <= self.connections <= 256, self, "connections", "1..256")

    def hosts(self) -> frozenset[str]:
        """Return the host of the service or endpoint, and the hosts allowed to see a token."""
        hosts = {urlsplit(self.href or "").hostname or ""}
        if self.kind == "planetary-computer":
            hosts.update(self.credentials_for)
        return frozenset(hosts - {""})


@dataclass(frozen=True, kw_only=True)
class Source:
    """A STAC API or a stac-geoparquet file, and how to read its scenes."""

    id: str
    title: str
    kind: str
    """stac-api or stac-geoparquet."""
    href: str
    """URL of the API's landing page; or path or URL of the file, relative to the YAML file."""
    collection: str
    assets: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Band name (and SCL) -> asset key.

    If empty, the keys in common use are tried (`ASSET_KEYS`).
    """
    resolution_m: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Band name -> pixel size. Replaces a wrong size in the item's assets or from the mission."""
    offset: Offset = Offset()
    access: Access = Access()
    tile_px: int = 512
    """Side of the tiles in its files, for the estimates of `plan`."""
    searches_per_s: float = 10.0
    """Most requests to the API per second."""
    since: str | None = None
    """YYYY-MM: the first listed month. Earlier months are not searched."""
    licence: str = ""

    def __post_init__(self) -> None:
        kinds = ("stac-api", "stac-geoparquet")
        check_field(self.kind in kinds, self, "kind", f"one of {', '.join(kinds)}")
        names = (*BANDS, SCL)
        found = ", ".join(self.assets)
        fits = set(self.assets) <= set(names)
        need(fits, "assets", f"bands of {', '.join(names)}, found {found}")
        has_mask = not self.assets or SCL in self.assets
        need(has_mask, "assets", f"an entry for {SCL} (the mask), found {found}")
        sizes = set(self.resolution_m) <= set(names) and set(self.resolution_m.values()) <= {10, 20}
        need(sizes, "resolution_m", f"10 or 20 metres by band, found {dict(self.resolution_m)}")
        check_field(self.tile_px > 0, self, "tile_px", "pixels above 0")
        check_field(0 < self.searches_per_s <= 100, self, "searches_per_s", "above 0 and up to 100")
        is_month = self.since is None or re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", self.since)
        check_field(is_month, self, "since", "a month YYYY-MM in quotes")

    def bands(self) -> tuple[str, ...]:
        """Return the bands named in `assets`; all bands if `assets` is empty."""
        return tuple(self.assets) or (*BANDS, SCL)
