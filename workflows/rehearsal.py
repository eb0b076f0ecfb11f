"""Rehearse a run of a whole dataset on simulated mines, two of them broken on purpose.

    python workflows/rehearsal.py --out build/rehearsal
    cd build/rehearsal
    minecube run dataset.yaml; minecube status dataset.yaml

The folder gets a simulated archive of 16 mines and 4 years, polygons of the true footprints, a
small network without training, and a dataset.yaml. One mine lies outside the archive. Of another
mine, the files of one year are cut off. `--mend` repairs the cut files: `minecube retry` then
builds that year.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import geopandas as gpd
import pandas as pd
import shapely
import torch
from simulated import draw_sites

from minecube import models
from minecube.catalog import load_models, load_sites
from minecube.simulate import World, simulate_archive

YEARS = (2019, 2020, 2021, 2022)
SITES = 16
SIDE_M = 480
CUT = "mine_3"
"""Site with cut files, in the year `CUT_YEAR`."""
CUT_YEAR = 2021
OUTSIDE = "mine_16"
"""Site outside the archive."""
DATASET = f"""\
id: rehearsal
sites: sites.geojson
margin: 0
years: {YEARS[0]}-{YEARS[-1]}
sources: [sim-earth-search]
catalog: world
store: cubes.zarr
labels: {{file: world/truth_footprints.parquet}}
models:
  - {{file: model.pt, name: unet}}
tracks: {{rates: "0.01,0.005"}}
score: {{baselines: true}}
export: {{model: unet+hmm}}
"""


def make_rehearsal(folder: Path) -> None:
    """Write archive, sites, network and dataset.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sites.geojson"
    table = draw_sites({"mine": SITES}, SIDE_M)
    table.to_file(path)
    inside = [site for site in load_sites(path, catalogue=True) if site.id != OUTSIDE]
    world = World(
        years=YEARS, dates_per_year=6, sparse_dates=4, winter_dates=0, styles=("earth-search",)
    )
    simulate_archive(inside, folder / "world", world)
    table.loc[table["id"] == OUTSIDE, "geometry"] = shapely.box(0.0, 0.0, 0.004, 0.004)
    table.to_file(path)
    for file in list_cut_files(folder):
        shutil.copy(file, file.with_suffix(".whole"))
        with file.open("r+b") as image:
            image.truncate(file.stat().st_size // 3)
    write_network(folder / "model.pt")
    (folder / "dataset.yaml").write_text(DATASET)


def list_cut_files(folder: Path) -> list[Path]:
    """List the images of the cut site-year: red, of every scene over the site."""
    sites = gpd.read_file(folder / "sites.geojson").set_index("id")
    items = gpd.read_parquet(folder / "world" / "earth-search.parquet")
    year = pd.to_datetime(items["datetime"]).dt.year
    over = items.intersects(sites.geometry[CUT])
    rows = items[over & (year == CUT_YEAR)]
    return [folder / "world" / assets["red"]["href"] for assets in rows["assets"]]


def mend(folder: Path) -> None:
    """Put the whole files back."""
    for file in list_cut_files(folder):
        shutil.copy(file.with_suffix(".whole"), file)


def write_network(path: Path) -> None:
    """Write a network with random weights: it maps nothing useful, but in the usual time."""
    torch.manual_seed(0)
    card = load_models()["unet-small"]
    mean = (1500.0,) * len(card.bands)
    network = models.build(card).eval()
    models.save(
        models.TrainedModel(card=card, network=network, mean=mean, std=mean, sites=()), path
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Make the rehearsal, or mend its cut files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/rehearsal"), help="folder (build/rehearsal)"
    )
    parser.add_argument(
        "--mend", action="store_true", help="put the cut files back, and do nothing else"
    )
    options = parser.parse_args(argv)
    if options.mend:
        mend(options.out)
    else:
        make_rehearsal(options.out)


if __name__ == "__main__":
    main()
