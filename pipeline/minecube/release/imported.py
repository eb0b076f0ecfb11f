"""Open an import and rebuild its labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas as gpd
import numpy as np
import pandas as pd
from affine import Affine
from rasterio import features

from minecube.arrays import UInt8
from minecube.errors import ReleaseError
from minecube.files import replacing
from minecube.places import Place, local_copy
from minecube.release.archive import Archive
from minecube.release.sites import ARCHIVE_MINE, select_placed
from minecube.vectors import read_vector


@dataclass(frozen=True)
class Imported:
    """An import as tables; the package lists their columns."""

    sites: gpd.GeoDataFrame
    years: pd.DataFrame
    labels: gpd.GeoDataFrame
    changes: pd.DataFrame
    about: Mapping[str, Any]
    """Content of import.json."""


def open_import(folder: Place) -> Imported:
    """Open a finished import; raise ReleaseError if the folder has none."""
    try:
        return Imported(
            about=json.loads((folder / "import.json").read_bytes()),
            years=_read_table(folder / "years.parquet"),
            changes=_read_table(folder / "changes.parquet"),
            labels=read_vector(folder / "labels.parquet"),
            sites=read_vector(folder / "sites.geojson"),
        )
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: pyogrio; others: Arrow
        raise ReleaseError(
            f"{folder}: holds no finished import of a release ({error}); "
            "run `minecube release import` first"
        ) from error


def _read_table(place: Place) -> pd.DataFrame:
    with local_copy(place) as path:
        return pd.read_parquet(path)


def draw_label(imported: Imported, site: str, year: int) -> UInt8:
    """Rebuild a label of an import as published.

    Returns:
        uint8 [y, x] on its image's grid: 255 mine, 0 not. All 0 without a mine region.
    """
    years = imported.years
    row = years[(years["site"] == site) & (years["year"] == year)].iloc[0]
    shape = (int(row["height"]), int(row["width"]))
    labels = imported.labels
    is_region = (labels["site"] == site) & (labels["year"] == year) & ~labels["mapped"]
    if not is_region.any():
        return np.zeros(shape, np.uint8)
    label: UInt8 = features.rasterize(
        labels[is_region].geometry,
        shape,
        transform=Affine(*row["transform"]),
        default_value=ARCHIVE_MINE,
        dtype="uint8",
    )
    return label


def map_placed_years(imported: Imported, site: str) -> dict[int, dict[str, Any]]:
    """Map each year with a georeferenced image to its row of `years`."""
    placed = select_placed(imported.years)
    rows: Any = placed[placed["site"] == site].to_dict("records")
    return {int(row["year"]): row for row in rows}


def check_same_archive(archive: Archive, imported: Imported, folder: Place) -> None:
    """Raise ReleaseError if the import is from another archive."""
    if archive.compute_identity() != imported.about["identity"]:
        raise ReleaseError(
            f"{archive.location}: is not the archive that {folder} was imported from "
            f"({imported.about['archive']})"
        )


def write_json(path: Path, content: Any) -> None:
    """Write a complete JSON file; raise ReleaseError if writing fails."""
    try:
        with replacing(path) as draft:
            draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ReleaseError(
            f"{path}: cannot be written ({error.strerror}); name another file"
        ) from error
