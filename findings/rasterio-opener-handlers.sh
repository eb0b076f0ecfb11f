#!/usr/bin/env bash
# rasterio 1.4.4 (GDAL 3.10.3): every open with `opener=` adds one more file system to GDAL's own list, and removes it at the end.
# Files of one opener are in one file system each; a second file of an opener that is still open needs no new one, if it is
# opened under the first one's name. GDAL's list has no lock: processes with many threads have crashed in it (not shown here).
# Seen: "3 opens, 3 file systems; 2 names in one file system; after closing: the name is unknown"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "rasterio==1.4.4" "numpy==2.3.4"
cd "$work"
"$work/venv/bin/python" - <<'PY'
import io

import numpy as np
import rasterio
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

assert rasterio.__gdal_version__ == "3.10.3"
pixels = np.arange(64, dtype=np.uint16).reshape(8, 8)
profile = {"driver": "GTiff", "width": 8, "height": 8, "count": 1, "dtype": "uint16", "transform": from_origin(0, 80, 10, 10)}
with MemoryFile() as memory:
    with memory.open(**profile) as image:
        image.write(pixels, 1)
    content = memory.read()


def opener(path, mode="rb", **_):
    return io.BytesIO(content)


def file_system(image):
    return image.name.split("/")[1]


opened = [rasterio.open("bands/B04", opener=opener) for _ in range(3)]
systems = {file_system(image) for image in opened}
first = opened[0].name
with rasterio.open(first.replace("B04", "B08")) as neighbour:
    assert (neighbour.read(1) == pixels).all()
    shared = file_system(neighbour) == file_system(opened[0])
for image in opened:
    image.close()
try:
    rasterio.open(first).close()
    left = "known"
except rasterio.errors.RasterioIOError:
    left = "unknown"
print(f"3 opens, {len(systems)} file systems; 2 names in {2 - shared} file system; after closing: the name is {left}")
assert len(systems) == 3
assert shared
assert left == "unknown"
PY
