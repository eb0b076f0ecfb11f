"""Write a small archive in EuroMineNet's layout with known labels, to test reading."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from scipy import ndimage

from minecube.arrays import Int16, UInt8
from minecube.grid import PIXEL_DEG

MEAN = (1089, 1004, 913, 1158, 1957, 2315, 2250, 2553, 1922, 1187)
SPREAD = (311, 366, 545, 499, 613, 786, 787, 872, 871, 752)

Masks = dict[tuple[str, int], UInt8]


def write_release(
    path: Path,
    sites: Mapping[str, tuple[float, float]],
    years: Sequence[int],
    *,
    shape: tuple[int, int] = (320, 280),
    packed: bool = True,
) -> Masks:
    """Write a zip of images and labels; return the labels: (site, year) -> uint8 [y, x], 0 or 255.

    `sites` gives the longitude and latitude of each site's upper left corner. `packed` deflates the
    members instead of storing them.
    """
    masks: Masks = {}
    compression = zipfile.ZIP_STORED
    if packed:
        compression = zipfile.ZIP_DEFLATED
    mean = np.array(MEAN)[:, None, None]
    spread = np.array(SPREAD)[:, None, None]
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        for number, (site, (west, north)) in enumerate(sites.items()):
            rng = np.random.default_rng(number)
            place = {
                "crs": "EPSG:4326",
                "transform": Affine(PIXEL_DEG, 0, west, 0, -PIXEL_DEG, north),
            }
            ground = ndimage.gaussian_filter(rng.standard_normal(shape), 12)
            ground = (ground - ground.mean()) / ground.std()
            noise = rng.standard_normal((len(MEAN), *shape), dtype=np.float32)
            for step, year in enumerate(years):
                # A pit, larger every year.
                pit = ground > np.quantile(ground, 0.95 - 0.003 * step)
                mask = np.where(pit, np.uint8(255), np.uint8(0))
                image = mean + spread * (0.8 * ground + 0.6 * np.roll(noise, step * 31, axis=-1))
                image = np.maximum(image, 1).astype(np.int16)
                folder = f"EuroMineNet/{site}"
                archive.writestr(f"{folder}/image/Year{year}.tif", encode_tiff(image, **place))
                archive.writestr(f"{folder}/label/Year{year}.tif", encode_tiff(mask[None]))
                masks[site, year] = mask
    return masks


def encode_tiff(pixels: Int16 | UInt8, **place: object) -> bytes:
    """Write a GeoTIFF of [band, y, x].

    Without `place` it is a label as in the release: compressed, not georeferenced. Images have
    GDAL's default format.
    """
    profile = {"driver": "GTiff", "count": len(pixels), "dtype": pixels.dtype, **place}
    if not place:
        profile["compress"] = "lzw"
    with MemoryFile() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with memory.open(height=pixels.shape[1], width=pixels.shape[2], **profile) as image:
            image.write(pixels)
        return bytes(memory.getbuffer())
