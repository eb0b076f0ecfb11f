"""Collect licence and citation of every input of a cube, for its exports.

The imagery is always Copernicus Sentinel data. Labels state their source in
`footprint.attrs["origin"]`, such as "EuroMineNet (CC BY 4.0)" or "pits.gpkg (own digitising,
ODbL-1.0)". A model's card states the licence of its weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from minecube.codes import UNKNOWN

SENTINEL_TERMS = (
    "https://sentinels.copernicus.eu/documents/247904/690755/Sentinel_Data_Legal_Notice"
)
NOT_STATED = "not stated"
ORIGIN_SEPARATOR = " | "
"""Separator between the sources of labels in an origin."""


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


def list_credits(cube: xr.Dataset) -> tuple[Credit, ...]:
    """List the inputs behind a cube's variables; an all-unknown footprint has none."""
    inputs = []
    if any(not str(name).startswith("footprint") for name in cube.data_vars):
        inputs.append(_credit_imagery(cube))
    if "footprint" in cube and bool(np.any(cube["footprint"].to_numpy() != UNKNOWN)):
        inputs += parse_origin(str(cube["footprint"].attrs.get("origin", "")))
    if "probability" in cube:
        inputs.append(_credit_model(cube["probability"].attrs.get("model", {})))
    return tuple(inputs)


def _credit_imagery(cube: xr.Dataset) -> Credit:
    return Credit(
        kind="imagery",
        name="Copernicus Sentinel-2, European Space Agency",
        licence="Copernicus Sentinel data terms",
        url=SENTINEL_TERMS,
        # The terms' own wording.
        citation=f"Contains modified Copernicus Sentinel data {format_years(cube)}.",
    )


def _credit_model(card: Mapping[str, Any]) -> Credit:
    name = card.get("id", "a model without a card")
    return Credit(kind="model", name=f"model {name}", licence=card.get("licence", "") or NOT_STATED)


def format_years(cube: xr.Dataset) -> str:
    """Return the cube's years: `2020`, or `2019-2021`."""
    years = [int(year) for year in cube["year"].to_numpy().ravel()]
    if len(years) == 1:
        return f"{years[0]}"
    return f"{min(years)}-{max(years)}"


def parse_origin(origin: str) -> list[Credit]:
    """Parse an origin such as `pits.gpkg (CC BY-SA 4.0) doi:10.1594/PANGAEA.942325`.

    Several sources are separated by ` | `.
    """
    sources = origin.split(ORIGIN_SEPARATOR.strip())
    return list(dict.fromkeys(_parse_source(source.strip()) for source in sources))


def _parse_source(source: str) -> Credit:
    name = source
    licence = ""
    dois: tuple[str, ...] = ()
    # The last brackets are the licence. Names have brackets, too:
    # `Maus et al. (2022) (CC-BY-SA-4.0)`.
    parts = re.fullmatch(
        r"(?P<name>.*?)(?:\s*\((?P<licence>[^()]*)\))?(?P<dois>(?:\s*doi:\S+)*)", source
    )
    if parts:
        name = parts["name"]
        licence = parts["licence"] or ""
        dois = tuple(doi.rstrip(".,;)") for doi in re.findall(r"10\.\d{4,9}/\S+", parts["dois"]))
    name = name.strip() or "mine polygons of unstated origin"
    if name.lower() == EUROMINENET.name.lower():
        return EUROMINENET
    spdx, url = _parse_licence(licence)
    return Credit(
        kind="labels",
        name=name,
        licence=spdx,
        url=url,
        dois=dois,
        citation="".join([name, *(f", doi:{doi}" for doi in dois)]),
    )


def _parse_licence(licence: str) -> tuple[str, str]:
    """Return SPDX identifier and URL of a Creative Commons licence in common spelling.

    Other licences are returned stripped and without a URL, a missing one as "not stated".
    """
    licence = licence.strip()
    parts = re.fullmatch(r"CC[ -](BY(?:-(?:NC|ND|SA))*)[ -](\d\.\d)", licence, re.IGNORECASE)
    if parts:
        kind, version = parts.groups()
        return (
            f"CC-{kind.upper()}-{version}",
            f"https://creativecommons.org/licenses/{kind.lower()}/{version}/",
        )
    if re.fullmatch(r"CC[ -]?0([ -]1\.0)?", licence, re.IGNORECASE):
        return "CC0-1.0", "https://creativecommons.org/publicdomain/zero/1.0/"
    return licence or NOT_STATED, ""


def format_credits(credits_: Iterable[Credit]) -> dict[str, str]:
    """Format credits as text for attributes and tags.

    The keys are `license`, `acknowledgement` and `references`. Empty entries are omitted.
    """
    inputs = list(credits_)
    text = {
        "license": "; ".join(_state_licence(credit) for credit in inputs),
        "acknowledgement": "; ".join(c.citation.rstrip(".") for c in inputs if c.citation),
        "references": " ".join(f"https://doi.org/{doi}" for c in inputs for doi in c.dois),
    }
    return {key: value for key, value in text.items() if value}


def _state_licence(credit: Credit) -> str:
    statement = f"{credit.kind}: {credit.name}, {credit.licence}"
    if credit.url:
        statement += f" ({credit.url})"
    return statement
