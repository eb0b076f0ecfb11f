"""Write a Croissant 1.0 description (JSON-LD) of exported files, for machine learning.

Every file is listed with its size and SHA-256. Tables become record sets with their columns as
fields. Terms: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.0.html.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minecube.errors import CubeError
from minecube.export.credits import Credit
from minecube.export.files import href, sha256_of, whole

MEDIA = {
    ".parquet": "application/x-parquet",
    ".gpkg": "application/geopackage+sqlite3",
    ".nc": "application/netcdf",
    ".tif": "image/tiff",
}
# Terms of the specification, appendix 1.
_CR = """
    citeAs column conformsTo containedIn equivalentProperty extract field fileProperty fileObject fileSet format includes
    isLiveDataset jsonPath key md5 parentField path recordSet references regex repeated replace samplingRate separator source
    subField transform
"""
CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{term: f"cr:{term}" for term in _CR.split()},
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}


def write_croissant(
    out: Path,
    files: Iterable[Path],
    credited: Iterable[Credit],
    *,
    title: str,
    about: str,
    published: date,
) -> Path:
    """Write `croissant.json` for these files into `out` and return its path.

    Hrefs are relative to `out`.

    Args:
        out: The folder above all files.
        files: Images, tables, NetCDF files. Leave out Zarrs: Croissant has no checksum for folders.
        credited: The inputs to credit with licence and citation.
        title: The data set's title.
        about: Description for people.
        published: Publication date of the data set.

    Raises:
        CubeError: there is no file, one lies outside `out` or cannot be read, or writing fails.
    """
    files = sorted(files)
    if not files:
        raise CubeError(
            f"{out}: there is no file for a Croissant description to name; export images or NetCDF, too"
        )
    credited = list(credited)
    terms = [c.url or f"{c.name}: {c.licence}" for c in credited]
    content = {
        "@context": dict(CONTEXT),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": title,
        "description": about,
        "license": terms,
        "citeAs": "; ".join(c.citation for c in credited if c.citation),
        "creator": [
            {"@type": "sc:Organization", "name": c.name} for c in credited if c.kind != "model"
        ],
        "isBasedOn": [f"https://doi.org/{d}" for c in credited for d in c.dois],
        "datePublished": published.isoformat(),
        "version": metadata.version("minecube"),
        "keywords": ["Sentinel-2", "mining", "annual composites", "segmentation"],
        "distribution": [_file_object(f, out) for f in files],
        "recordSet": [_record_set(f, out) for f in files if f.suffix == ".parquet"],
    }
    with whole(out / "croissant.json") as part:
        part.write_text(
            json.dumps({k: v for k, v in content.items() if v}, indent=2) + "\n", encoding="utf-8"
        )
    return out / "croissant.json"


def _file_object(path: Path, out: Path) -> dict[str, Any]:
    if not path.resolve().is_relative_to(out.resolve()):
        raise CubeError(
            f"{path}: lies outside {out}, so the description could not be moved with it; export it there"
        )
    size, digest = sha256_of(path)
    name = href(path, out).removeprefix("./")
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{size} B",
        "encodingFormat": MEDIA[path.suffix],
        "sha256": digest,
    }


def _record_set(path: Path, out: Path) -> dict[str, Any]:
    """List a table's columns of plain types; geometries and nested columns are left out."""
    table = path.stem
    kinds = {f.name: _kind(f.type) for f in pq.read_schema(path)}
    return {
        "@type": "cr:RecordSet",
        "@id": table,
        "name": table,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{table}/{column}",
                "name": column,
                "dataType": kind,
                "source": {
                    "fileObject": {"@id": href(path, out).removeprefix("./")},
                    "extract": {"column": column},
                },
            }
            for column, kind in kinds.items()
            if kind
        ],
    }


def _kind(of: pa.DataType) -> str | None:
    tests = {
        "sc:Text": lambda t: (
            pa.types.is_string(t) or pa.types.is_large_string(t) or pa.types.is_string_view(t)
        ),
        "sc:Integer": pa.types.is_integer,
        "sc:Float": pa.types.is_floating,
        "sc:Boolean": pa.types.is_boolean,
        "sc:Date": pa.types.is_timestamp,
    }
    return next((kind for kind, fits in tests.items() if fits(of)), None)
