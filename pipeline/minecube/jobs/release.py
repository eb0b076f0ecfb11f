"""Write cubes in the layout of the published EuroMineNet release."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import odc.geo.xr  # noqa: F401  registers the .odc accessor
import xarray as xr
from odc.geo.geobox import GeoBox

from minecube import cube, release
from minecube.catalog import BANDS
from minecube.codes import UNKNOWN
from minecube.errors import CatalogError
from minecube.places import Place
from minecube.release import layout


@dataclass(frozen=True)
class ExportedSite:
    """Files of one site in the layout of the release."""

    site: str
    years: int
    """Number of images."""
    unlabelled: tuple[int, ...]
    """Years without label."""
    agreement: dict[int, float]
    """Year -> IoU of the label with the label of the release."""

    @property
    def labels(self) -> int:
        """Number of labels."""
        return self.years - len(self.unlabelled)


def export_release(
    store: cube.Store,
    sites: Sequence[str],
    folder: Path,
    import_folder: Place | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[ExportedSite]:
    """Write sites as int16 images and 0/255 labels in EPSG:4326.

    The folder gets EuroMineNet/. With an import of the release, files lie on the release's grids,
    and labels are compared. `progress` is called with the name of each finished site.

    Raises:
        CatalogError: a site has other bands than the release, or is not in the import.
        ReleaseError: the folder holds no import.
    """
    imported = None
    if import_folder is not None:
        imported = release.open_import(import_folder)
        unplaced = [site for site in sites if site not in set(imported.sites["id"])]
        if unplaced:
            raise CatalogError(
                f"{store}: {', '.join(unplaced)} not in {import_folder}, "
                "so no grid of theirs is known; name others by --sites"
            )
    rows = []
    for site in sites:
        rows.append(_export_site(store, site, folder, imported))
        progress(site)
    return rows


def _export_site(
    store: cube.Store, site: str, folder: Path, imported: release.Imported | None
) -> ExportedSite:
    dataset = cube.open_committed(store, site)
    bands = tuple(dataset.band.values)
    if bands != BANDS:
        raise CatalogError(
            f"{store}: {site} has the bands {', '.join(bands)}; the release has {', '.join(BANDS)}"
        )
    placed: dict[int, dict[str, Any]] = {}
    if imported is not None:
        placed = release.map_placed_years(imported, site)
    unlabelled: list[int] = []
    agreement: dict[int, float] = {}
    for year in map(int, dataset.year.values):
        annual = dataset.sel(year=year).load()
        grid = _grid_of_year(placed, year, dataset.odc.geobox)
        label = layout.resample_label(annual["footprint"], _known_fraction(annual), grid)
        image = layout.resample_image(annual["reflectance"], grid)
        layout.write_site_year(folder, site, year, image, label, grid)
        if label is None:
            unlabelled.append(year)
        elif imported is not None and _has_label(placed.get(year)):
            agreement[year] = layout.compute_iou(label, release.draw_label(imported, site, year))
    return ExportedSite(site, dataset.sizes["year"], tuple(unlabelled), agreement)


def _grid_of_year(placed: dict[int, dict[str, Any]], year: int, grid: GeoBox) -> GeoBox:
    """Return the release's grid of a year, or a grid like it around the cube.

    A year missing in the release gets the nearest year's grid: a site's images have one size.
    """
    if not placed:
        return layout.make_release_grid(grid)
    nearest = min(placed, key=lambda other: (abs(other - year), other))
    return layout.read_release_grid(placed[nearest])


def _known_fraction(annual: xr.Dataset) -> xr.DataArray | None:
    """Return the mine's share of each pixel; None without a known pixel."""
    fraction = annual.get("footprint_fraction")
    if fraction is None or bool((fraction == UNKNOWN).all()):
        return None
    return fraction


def _has_label(row: dict[str, Any] | None) -> bool:
    """Return whether a year of the release has a label without problem."""
    return row is not None and row["problem"] is None and bool(row["label"])
