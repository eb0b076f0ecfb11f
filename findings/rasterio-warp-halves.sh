#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): an image of the neighbouring UTM zone, warped whole and in two halves. GDAL computes positions along each
# output row from a few of them, within an eighth of a pixel. Halves side by side have other rows, so their pixels differ; halves one above
# the other have the same rows and are equal. Whoever warps block by block gets pixels that depend on the blocks. `tolerance=0` is accepted
# and changes nothing.
# Seen: "side by side: nearest differs in 392 of 230400 pixels, bilinear in 229552; one above the other: nearest in 0; tolerance=0: in 392"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "rasterio==1.4.4" "numpy==2.3.4"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.warp import Resampling, reproject, transform_bounds

SIDE = 480
HALF = SIDE // 2
pixels = np.random.default_rng(0).integers(1, 10000, (600, 600)).astype(np.uint16)
profile = {"driver": "GTiff", "width": 600, "height": 600, "count": 1, "dtype": "uint16"}
profile |= {"crs": "EPSG:32632", "transform": from_origin(797000, 5605000, 10, 10)}
with rasterio.open("image.tif", "w", **profile) as file:
    file.write(pixels, 1)

with rasterio.open("image.tif") as file:
    west, _, _, north = transform_bounds("EPSG:32632", "EPSG:32633", *file.bounds)
    left = round(west / 10) * 10 + 500
    top = round(north / 10) * 10 - 500

    def warp(column, row, width, height, method, **options):
        """Warp a part of the output grid, given in its pixels."""
        part = np.zeros((height, width), np.uint16)
        corner = from_origin(left + 10 * column, top - 10 * row, 10, 10)
        grid = {"dst_transform": corner, "dst_crs": "EPSG:32633"}
        reproject(rasterio.band(file, 1), part, resampling=method, src_nodata=0, dst_nodata=0, **grid, **options)
        return part

    def count_differences(method, axis, **options):
        """Count the pixels in which the whole and its halves differ."""
        whole = warp(0, 0, SIDE, SIDE, method, **options)
        assert (whole > 0).all()
        if axis == 1:
            halves = [warp(at, 0, HALF, SIDE, method, **options) for at in (0, HALF)]
        else:
            halves = [warp(0, at, SIDE, HALF, method, **options) for at in (0, HALF)]
        return int((whole != np.concatenate(halves, axis=axis)).sum())

    beside = count_differences(Resampling.nearest, 1)
    smooth = count_differences(Resampling.bilinear, 1)
    above = count_differences(Resampling.nearest, 0)
    exact = count_differences(Resampling.nearest, 1, tolerance=0)
print(
    f"side by side: nearest differs in {beside} of {SIDE * SIDE} pixels, bilinear in {smooth}; "
    f"one above the other: nearest in {above}; tolerance=0: in {exact}"
)
assert (beside, above, exact) == (392, 0, 392)
assert smooth > SIDE * SIDE // 2
PY
