#!/usr/bin/env bash
# odc-stac 0.5.3 (rasterio 1.4.4): a GeoTIFF whose internal mask hides a third of it. Loaded on its own grid, the numbers under
# the mask come as data; loaded on a grid of the neighbouring UTM zone, they are left out.
# Seen: "own grid: 33.3 % of the pixels are 64535; neighbouring zone: 0.0 %"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "odc-stac==0.5.3" "rasterio==1.4.4" "pystac==1.14.1" "numpy==2.3.4"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import datetime
from pathlib import Path

import numpy as np
import odc.stac
import pystac
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import transform_geom

HIDDEN = 64535
pixels = np.full((60, 60), 1430, np.uint16)
seen = np.ones((60, 60), bool)
seen[:, :20] = False
pixels[~seen] = HIDDEN
corner = from_origin(360000, 5600040, 10, 10)
profile = {"driver": "GTiff", "width": 60, "height": 60, "count": 1, "dtype": "uint16", "crs": "EPSG:32633", "transform": corner}
with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open("B11.tif", "w", **profile) as file:
    file.write(pixels, 1)
    file.write_mask(seen)
with rasterio.open("B11.tif") as file:
    assert (file.read(1, masked=True).mask == ~seen).all()

left, top = 360000, 5600040
ring = [[left, top - 600], [left + 600, top - 600], [left + 600, top], [left, top], [left, top - 600]]
outline = transform_geom("EPSG:32633", "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
lon, lat = zip(*outline["coordinates"][0])
place = {"proj:code": "EPSG:32633", "proj:transform": list(corner)[:6], "proj:shape": [60, 60]}
item = pystac.Item("mine", outline, [min(lon), min(lat), max(lon), max(lat)], datetime.datetime(2022, 7, 1), place)
item.stac_extensions = ["https://stac-extensions.github.io/projection/v2.0.0/schema.json"]
item.add_asset("B11", pystac.Asset(str(Path("B11.tif").absolute()), media_type=pystac.MediaType.COG, roles=["data"]))

share = {}
for crs in ("EPSG:32633", "EPSG:32632"):
    loaded = odc.stac.load([item], bands=["B11"], crs=crs, resolution=10, resampling="bilinear")["B11"].values
    share[crs] = 100 * float((loaded == HIDDEN).mean())
    assert (loaded == 1430).any()
print(f"own grid: {share['EPSG:32633']:.1f} % of the pixels are {HIDDEN}; neighbouring zone: {share['EPSG:32632']:.1f} %")
assert round(share["EPSG:32633"], 1) == 33.3
assert share["EPSG:32632"] == 0
PY
