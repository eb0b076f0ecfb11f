#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): a GeoTIFF with one DEFLATE tile and one flipped bit in it, 1000 times. A zlib stream ends with a checksum
# (Adler-32), and Python's zlib refuses all 1000 tiles. GDAL reads 126 of them without an error or a warning, with other pixels than were
# written. Whoever reads images from a damaged disk or transfer gets pixels that look like data. imagecodecs (libdeflate) refuses all.
# Seen: "of 1000 flipped bits: GDAL reads 126 as other pixels; zlib refuses 1000, imagecodecs 1000"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "rasterio==1.4.4" "numpy==2.3.4" "imagecodecs==2026.3.6"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import zlib
from pathlib import Path

import imagecodecs
import numpy as np
import rasterio
from rasterio.transform import from_origin

FLIPS = 1000
SIDE = 512
rng = np.random.default_rng(0)
slope = 300 * np.sin(np.arange(SIDE) / 40)[:, None]
pixels = (1500 + slope + rng.normal(0, 20, (SIDE, SIDE))).astype(np.uint16)
profile = {"driver": "GTiff", "width": SIDE, "height": SIDE, "count": 1, "dtype": "uint16"}
profile |= {"tiled": True, "blockxsize": SIDE, "blockysize": SIDE, "compress": "deflate", "predictor": 2}
profile |= {"crs": "EPSG:32633", "transform": from_origin(300000, 5000000, 10, 10)}
path = Path("image.tif")
with rasterio.open(path, "w", **profile) as image:
    image.write(pixels, 1)
with rasterio.open(path) as image:
    start, size = (int(image.get_tag_item(f"BLOCK_{name}_0_0", "TIFF", bidx=1)) for name in ("OFFSET", "SIZE"))
whole = path.read_bytes()


def is_refused(decode, tile, error):
    try:
        decode(tile)
    except error:
        return True
    return False


other_pixels = by_zlib = by_imagecodecs = 0
for _ in range(FLIPS):
    content = bytearray(whole)
    content[start + int(rng.integers(size))] ^= 1 << int(rng.integers(8))
    path.write_bytes(content)
    tile = bytes(content[start : start + size])
    by_zlib += is_refused(zlib.decompress, tile, zlib.error)
    by_imagecodecs += is_refused(imagecodecs.deflate_decode, tile, RuntimeError)
    try:
        with rasterio.open(path) as image:
            other_pixels += bool((image.read(1) != pixels).any())
    except rasterio.errors.RasterioIOError:
        pass
print(
    f"of {FLIPS} flipped bits: GDAL reads {other_pixels} as other pixels; "
    f"zlib refuses {by_zlib}, imagecodecs {by_imagecodecs}"
)
assert by_zlib == by_imagecodecs == FLIPS
assert other_pixels == 126
PY
