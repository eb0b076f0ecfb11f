"""Write a Croissant 1.0 description (JSON-LD) of exported files, for machine learning.

Every file is listed with its size and SHA-256. Tables become record sets with their columns as
fields. Terms: https://docs.mlcommons.org/croissant/docs/croissant-spec-1.0.html.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from minecube.errors import CubeError
from minecube.export.credits import Credit
from minecube.export.files import make_href, measure_file, open_draft

MEDIA = {
    ".parquet": "application/x-parquet",
    ".gpkg": "application/geopackage+sqlite3",
    ".nc": "application/netcdf",
    ".tif": "image/tiff",
}
# Terms of the specification, appendix 1.
_TERMS = """
    citeAs column conformsTo containedIn equivalentProperty extract field fileProperty fileObject
    fileSet format includes isLiveDataset jsonPath key md5 parentField path recordSet references
    regex repeated replace samplingRate separator source subField transform
"""
CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{term: f"cr:{term}" for term in _TERMS.split()},
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
    description: str,
    published: date,
) -> Path:
    """Write `croissant.json` for these files into `out` and return its path.

    Hrefs are relative to `out`, the folder above all files. Leave out Zarrs: Croissant has no
    checksum for folders.

    Raises:
        CubeError: there is no file, one lies outside `out` or cannot be read, or writing fails.
    """
    files = sorted(files)
    if not files:
        raise CubeError(
            f"{out}: there is no file for the Croissant description; export images or NetCDF, too"
        )
    inputs = list(credited)
    makers = [credit.name for credit in inputs if credit.kind != "model"]
    content = {
        "@context": dict(CONTEXT),
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": title,
        "description": description,
        "license": [credit.url or f"{credit.name}: {credit.licence}" for credit in inputs],
        "citeAs": "; ".join(credit.citation for credit in inputs if credit.citation),
        "creator": [{"@type": "sc:Organization", "name": name} for name in makers],
        "isBasedOn": [f"https://doi.org/{doi}" for credit in inputs for doi in credit.dois],
        "datePublished": published.isoformat(),
        "version": metadata.version("minecube"),
        "keywords": ["Sentinel-2", "mining", "annual composites", "segmentation"],
        "distribution": [_describe_file(file, out) for file in files],
        "recordSet": [_describe_table(file, out) for file in files if file.suffix == ".parquet"],
    }
    filled = {key: value for key, value in content.items() if value}
    path = out / "croissant.json"
    with open_draft(path) as draft:
        draft.write_text(json.dumps(filled, indent=2) + "\n", encoding="utf-8")
    return path


def _describe_file(path: Path, out: Path) -> dict[str, Any]:
    if not path.resolve().is_relative_to(out.resolve()):
        raise CubeError(
            f"{path}: lies outside {out}, where the description lists files; export it there"
        )
    size, digest = measure_file(path)
    name = _name_file(path, out)
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": name,
        "contentSize": f"{size} B",
        "encodingFormat": MEDIA[path.suffix],
        "sha256": digest,
    }


def _name_file(path: Path, out: Path) -> str:
    return make_href(path, out).removeprefix("./")


def _describe_table(path: Path, out: Path) -> dict[str, Any]:
    """List a table's columns of plain types; geometries and nested columns are left out."""
    table = path.stem
    types = {column.name: _find_type(column.type) for column in pq.read_schema(path)}
    return {
        "@type": "cr:RecordSet",
        "@id": table,
        "name": table,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{table}/{column}",
                "name": column,
                "dataType": data_type,
                "source": {
                    "fileObject": {"@id": _name_file(path, out)},
                    "extract": {"column": column},
                },
            }
            for column, data_type in types.items()
            if data_type
        ],
    }


def _find_type(column_type: pa.DataType) -> str | None:
    for croissant_type, fits in _TYPES.items():
        if fits(column_type):
            return croissant_type
    return None


def _is_text(column_type: pa.DataType) -> bool:
    types = pa.types
    return bool(
        types.is_string(column_type)
        or types.is_large_string(column_type)
        or types.is_string_view(column_type)
    )


_TYPES: Mapping[str, Callable[[pa.DataType], bool]] = {
    "sc:Text": _is_text,
    "sc:Integer": pa.types.is_integer,
    "sc:Float": pa.types.is_floating,
    "sc:Boolean": pa.types.is_boolean,
    "sc:Date": pa.types.is_timestamp,
}
"""Croissant type -> test of a column's Arrow type."""
