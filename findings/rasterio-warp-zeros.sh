#!/usr/bin/env bash
# rasterio 1.5.2 (GDAL 3.12.2), odc-stac 0.5.3: a warp with destination nodata 0 changes valid zeros to ones, or to -1 for signed integers.
# It happens if the source declares no nodata, or another number than 0. rasterio 1.4.4 (GDAL 3.10.3) keeps the zeros. GDAL changed this on
# purpose in 3.11 (its issue 11711), and reports it only in its log. Pixels of class 0, "no data", of a Sentinel-2 scene classification come
# as class 1, "saturated or defective", from `odc.stac.load(..., nodata=0)`, if the scene is of another UTM zone than the grid. The scene's
# own zone is not warped, so its zeros stay. Zeros are safe if the source nodata is 0, too. rasterio 1.5 needs Python 3.12 or newer; name
# one, if python3 is older: PYTHON=python3.13 findings/rasterio-warp-zeros.sh
# Seen: "1.4.4: uint8 710 zeros, int16 710, source nodata 0 710, odc-stac 0 ones in place of zeros"
#       "1.5.2: uint8 0 zeros, int16 0, source nodata 0 710, odc-stac 308 ones in place of zeros"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat > "$work/warp.py" <<'PY'
import datetime
import sys
from pathlib import Path

import numpy as np
import odc.stac
import pystac
import rasterio
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_geom

SIDE = 60
left, top = 360000, 5600040
corner = from_origin(left, top, 10, 10)
pixels = np.random.default_rng(0).integers(0, 5, (SIDE, SIDE))
profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 1, "crs": "EPSG:32633", "transform": corner}


def count_zeros(dtype, **options):
    """Count the zeros of a file without nodata that is warped onto its own grid, where each pixel stays in its place."""
    with rasterio.open("band.tif", "w", dtype=dtype, **profile) as file:
        file.write(pixels.astype(dtype), 1)
    with rasterio.open("band.tif") as file, WarpedVRT(file, nodata=0, **options) as warped:
        got = warped.read(1)
    assert (got[pixels > 0] == pixels[pixels > 0]).all()
    assert set(np.unique(got[pixels == 0])) in ({0}, {-1 if dtype == "int16" else 1})
    return int((got == 0).sum())


def load_classes(crs, **options):
    ring = [[left, top - 600], [left + 600, top - 600], [left + 600, top], [left, top], [left, top - 600]]
    outline = transform_geom("EPSG:32633", "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
    lon, lat = zip(*outline["coordinates"][0])
    place = {"proj:code": "EPSG:32633", "proj:transform": list(corner)[:6], "proj:shape": [SIDE, SIDE]}
    item = pystac.Item("mine", outline, [min(lon), min(lat), max(lon), max(lat)], datetime.datetime(2022, 7, 1), place)
    item.stac_extensions = ["https://stac-extensions.github.io/projection/v2.0.0/schema.json"]
    item.add_asset("SCL", pystac.Asset(str(Path("SCL.tif").absolute()), media_type=pystac.MediaType.COG, roles=["data"]))
    loaded = odc.stac.load([item], bands=["SCL"], crs=crs, resolution=10, resampling="nearest", dtype="uint8", **options)
    return loaded["SCL"].values


assert int((pixels == 0).sum()) == 710
kept = [count_zeros("uint8"), count_zeros("int16"), count_zeros("uint8", src_nodata=0)]

classes = np.random.default_rng(0).integers(0, 12, (SIDE, SIDE)).astype(np.uint8)
with rasterio.open("SCL.tif", "w", dtype="uint8", **profile) as file:
    file.write(classes, 1)
assert (load_classes("EPSG:32633", nodata=0) == classes).all()
saturated = [int((load_classes("EPSG:32632", **options) == 1).sum()) for options in ({"nodata": 0}, {})]
changed = saturated[0] - saturated[1]
print(
    f"{rasterio.__version__}: uint8 {kept[0]} zeros, int16 {kept[1]}, source nodata 0 {kept[2]}, "
    f"odc-stac {changed} ones in place of zeros"
)
expected = {"1.4.4": ([710, 710, 710], 0), "1.5.2": ([0, 0, 710], 308)}
assert (kept, changed) == expected[sys.argv[1]]
PY
cd "$work"
for version in 1.4.4 1.5.2; do
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/pip" install --quiet "rasterio==$version" "odc-stac==0.5.3" "odc-geo==0.5.3" "pystac==1.15.2" "numpy==2.4.6"
  "$work/$version/bin/python" warp.py "$version"
done
