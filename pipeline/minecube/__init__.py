"""Cloud-free annual Sentinel-2 cubes of mines with footprints, mapped and scored through time.

    load_sites(path)              -> [Site]
    grid_of(site)                 -> GeoBox: 10 m UTM, corners on multiples of 60 m
    search(site, year, *sources)  -> SearchResult: normalised scenes, one per acquisition
    select(found.scenes, recipe)  -> [pystac.Item], the scenes used by the recipe
    composite.composite(scenes, grid, recipe)  -> lazy Dataset[band, y, x]
    create_site, write_year       -> a site's cube in a Zarr store
    open_committed(Store(name), site_id)  -> lazy Dataset[year, band, y, x]; as_float() scales reflectance
    rasterize(polygons, grid, years)  -> DataArray[year, y, x]: 1 mine, 0 not mine, 255 unknown
    predict(trained, reflectance) -> DataArray[year, y, x]: probability x 250
    count(pred, truth, years)     -> Counts, additive; finish() gives the formulas

Names are loaded at their first use. Importing the package loads neither Dask nor torch.
"""

from __future__ import annotations

from minecube.lazy import load_lazily

_HOMES = {
    "as_float": "cube",
    "Recipe": "catalog",
    "Site": "catalog",
    "Source": "catalog",
    "Store": "cube",
    "count": "metrics",
    "create_site": "cube",
    "finish": "metrics",
    "fit": "train",
    "grid_of": "grid",
    "load_recipes": "catalog",
    "load_sites": "catalog",
    "load_sources": "catalog",
    "open_committed": "cube",
    "open_cube": "cube",
    "predict": "models",
    "rasterize": "labels",
    "read_polygons": "labels",
    "search": "scenes",
    "select": "scenes",
    "stack": "reader",
    "vectorize": "labels",
    "write_year": "cube",
}

__all__ = sorted(_HOMES)
__getattr__ = load_lazily(__name__, _HOMES)
