"""Collect licence and citation of every input of a cube, for its exports.

The imagery is always Copernicus Sentinel data. Labels state their source in
`footprint.attrs["origin"]`, such as "EuroMineNet (CC BY 4.0)" or "pits.gpkg (own digitising,
ODbL-1.0)". A model's card states the licence of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr

SENTINEL_TERMS = (
    "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice"
)
NOT_STATED = "not stated"
SEVERAL = " | "
"""Separator between the sources of labels in an origin."""
_UNKNOWN = 255  # unmapped footprint pixel


@dataclass(frozen=True, kw_only=True)
class Credit:
    """One input and the terms of its maker."""

    kind: str
    """imagery, labels or model."""
    name: str
    licence: str
    """SPDX identifier if one exists, or "not stated"."""
    url: str = ""
    """Address of the licence's text."""
    dois: tuple[str, ...] = ()
    citation: str = ""
    """Requested citation."""


EUROMINENET = Credit(
    kind="labels",
    name="EuroMineNet",
    licence="CC-BY-4.0",
    url="https://creativecommons.org/licenses/by/4.0/",
    dois=("10.14278/rodare.4656", "10.48550/arXiv.2510.14661"),
    citation="EuroMineNet, doi:10.14278/rodare.4656, described in arXiv:2510.14661",
)


def credits_of(cube: xr.Dataset) -> tuple[Credit, ...]:
    """List the inputs behind a cube's variables; an all-unknown footprint has none."""
    found = []
    if any(not str(name).startswith("footprint") for name in cube.data_vars):
        notice = (
            f"Contains modified Copernicus Sentinel data {span_of(cube)}."  # the terms' own wording
        )
        found.append(
            Credit(
                kind="imagery",
                name="Copernicus Sentinel-2, European Space Agency",
                licence="Copernicus Sentinel data terms",
                url=SENTINEL_TERMS,
                citation=notice,
            )
        )
    if "footprint" in cube and bool(np.any(cube["footprint"].to_numpy() != _UNKNOWN)):
        found += of_labels(str(cube["footprint"].attrs.get("origin", "")))
    if "probability" in cube:
        card = cube["probability"].attrs.get("model", {})
        name = card.get("id", "a model without a card")
        found.append(
            Credit(
                kind="model", name=f"model {name}", licence=card.get("licence", "") or NOT_STATED
            )
        )
    return tuple(found)


def span_of(cube: xr.Dataset) -> str:
    """Return the cube's years: `2020`, or `2019-2021`."""
    years = [int(y) for y in cube["year"].to_numpy().ravel()]
    return f"{min(years)}-{max(years)}" if len(years) > 1 else f"{years[0]}"


def of_labels(origin: str) -> list[Credit]:
    """Parse an origin such as `pits.gpkg (CC BY-SA 4.0) doi:10.1594/PANGAEA.942325`.

    Several sources are separated by ` | `.
    """
    return list(dict.fromkeys(_of_one(part.strip()) for part in origin.split(SEVERAL.strip())))


def _of_one(origin: str) -> Credit:
    # The last brackets are the licence. Names have brackets, too:
    # `Maus et al. (2022) (CC-BY-SA-4.0)`.
    found = re.fullmatch(
        r"(?P<name>.*?)(?:\s*\((?P<licence>[^()]*)\))?(?P<dois>(?:\s*doi:\S+)*)", origin
    )
    name, licence, said = found.group("name", "licence", "dois") if found else (origin, None, "")
    if name.strip().lower() == EUROMINENET.name.lower():
        return EUROMINENET
    spdx, url = _spdx(licence) if licence and licence != NOT_STATED else ("", "")
    dois = tuple(d.rstrip(".,;)") for d in re.findall(r"10\.\d{4,9}/\S+", said))
    named = name.strip() or "mine polygons of unstated origin"
    citation = named + "".join(f", doi:{d}" for d in dois)
    return Credit(
        kind="labels", name=named, licence=spdx or NOT_STATED, url=url, dois=dois, citation=citation
    )


def _spdx(licence: str) -> tuple[str, str]:
    """Return SPDX identifier and URL of a Creative Commons licence in common spelling.

    Other licences are returned stripped, without a URL.
    """
    found = re.fullmatch(
        r"CC[ -](BY(?:-(?:NC|ND|SA))*)[ -](\d\.\d)", licence.strip(), re.IGNORECASE
    )
    if found:
        kind, version = found.group(1).upper(), found.group(2)
        return (
            f"CC-{kind}-{version}",
            f"https://creativecommons.org/licenses/{kind.lower()}/{version}/",
        )
    if re.fullmatch(r"CC[ -]?0([ -]1\.0)?", licence.strip(), re.IGNORECASE):
        return "CC0-1.0", "https://creativecommons.org/publicdomain/zero/1.0/"
    return licence.strip(), ""


def lines(credits_: Iterable[Credit]) -> dict[str, str]:
    """Format credits as text for attributes and tags.

    The keys are `license`, `acknowledgement` and `references`. Empty entries are omitted.
    """
    credits_ = list(credits_)
    text = {
        "license": "; ".join(
            f"{c.kind}: {c.name}, {c.licence}" + (f" ({c.url})" if c.url else "") for c in credits_
        ),
        "acknowledgement": "; ".join(c.citation.rstrip(".") for c in credits_ if c.citation),
        "references": " ".join(f"https://doi.org/{d}" for c in credits_ for d in c.dois),
    }
    return {k: v for k, v in text.items() if v}
