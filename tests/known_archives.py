"""A small archive in the layout of the published one, and ways to change and import it."""

from __future__ import annotations

import zipfile

import numpy as np
import rasterio
from affine import Affine
from rasterio import features

from minecube import release
from minecube.catalog import Release, Site
from minecube.grid import PIXEL_DEG
from minecube.simulate.release import encode_tiff, write_release

YEARS = (2015, 2016, 2017)
SITES = {"Germany_1": (12.0, 51.0), "Germany_10": (12.3, 51.2), "Portuga_2": (-8.0, 38.0)}
SHAPE = (90, 70)
KNOWN = Release(
    id="small",
    name="Small",
    title="small",
    citation="none",
    licence="CC-BY-4.0",
    doi="10.1/x",
    sites=3,
    years=YEARS,
)
SPLIT = [Site(id=name, country="Somewhere", split="train", labels="Small (free)") for name in SITES]
NAMES = {"train": list(SITES)}
UPRIGHT = Affine(PIXEL_DEG, 0, 12.0, 0, -PIXEL_DEG, 51.0)


def make_archive(folder):
    """An archive without fault, and its masks."""
    path = folder / "EuroMineNet.zip"
    return path, write_release(path, SITES, YEARS, shape=SHAPE)


def changed(whole, path, change):
    """The archive with its members changed: a function of name -> content."""
    with zipfile.ZipFile(whole) as old:
        members = {name: old.read(name) for name in old.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for name, content in members.items():
            new.writestr(name, content)
    return path


def imported(path, out, known=KNOWN, split=SPLIT):
    return release.import_release(release.Archive(str(path)), out, known, split)


def label(site, year):
    return f"EuroMineNet/{site}/label/Year{year}.tif"


def image(site, year):
    return f"EuroMineNet/{site}/image/Year{year}.tif"


def drawn(made, site, year):
    """The polygons of a site-year as pixels on its image's grid, by GDAL."""
    row = made.years.set_index(["site", "year"]).loc[(site, year)]
    own = made.labels[
        (made.labels["site"] == site) & (made.labels["year"] == year) & ~made.labels["mapped"]
    ]
    shape, place = (int(row["height"]), int(row["width"])), Affine(*row["transform"])
    return (
        features.rasterize(own.geometry, out_shape=shape, transform=place, default_value=255)
        if len(own)
        else np.zeros(shape)
    )


def spoil(members):
    """Every fault that an audit is to find, each once."""
    masks = {}
    for name in [n for n in members if "/label/" in n]:
        with rasterio.MemoryFile(members[name]) as memory, memory.open() as src:
            masks[name] = src.read()
    members[label("Germany_1", 2015)] = encode_tiff(masks[label("Germany_1", 2015)][:, :-1])
    members[label("Germany_1", 2016)] = encode_tiff(masks[label("Germany_1", 2016)] // 255)
    members[label("Germany_1", 2017)] = encode_tiff(np.zeros_like(masks[label("Germany_1", 2017)]))
    del members[label("Germany_10", 2016)]
    with rasterio.MemoryFile(members[image("Germany_10", 2017)]) as memory, memory.open() as src:
        pixels, place = src.read(), src.transform
    moved = {"crs": "EPSG:4326", "transform": place @ Affine.translation(2, -1)}
    members[image("Germany_10", 2017)] = encode_tiff((pixels + 1000).astype(np.int16), **moved)
    jump = np.roll(masks[label("Portuga_2", 2017)], 30, axis=1)
    jump[:, :20] = 255
    members[label("Portuga_2", 2017)] = encode_tiff(jump)
    members["EuroMineNet/Spain_4/image/Year2015.tif"] = members[image("Portuga_2", 2015)]
    members["EuroMineNet/Spain_4/label/Label2015.tif"] = members[label("Portuga_2", 2015)]


def flipped(whole, path, name):
    """The archive with one bit of a member turned over."""
    with zipfile.ZipFile(whole) as archive:
        member = archive.getinfo(name)
    content = bytearray(whole.read_bytes())
    content[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 0x10
    path.write_bytes(content)
    return path
