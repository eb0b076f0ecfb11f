"""Check the metadata of labels and predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from minecube.cube.checksums import seal
from minecube.cube.listing import attributes_in, parse_json
from minecube.cube.markers import name_pixels
from minecube.cube.template import LABELLING, WRITTEN_LATER
from minecube.cube.verify.findings import Finding
from minecube.cube.verify.state import SiteState
from minecube.cube.views import completeness_by_index, list_mapped_pixels, list_unmapped


def check_labels(site: SiteState) -> Iterator[Finding]:
    """Check the notes of the label arrays, and report unfinished labels."""
    for name, content in site.metadata.items():
        key = f"{name}/zarr.json"
        site.judged[key] = content
        metadata = parse_json(content)
        if not isinstance(metadata, dict) or name in site.built:
            continue
        attrs = metadata.get("attributes", {})
        notes = {name: attrs[name] for name in WRITTEN_LATER if name in attrs}
        if "checksums" in notes and notes != seal(notes):
            text = "origin or checksums are not what was written"
            yield site.find("damaged", key, text, "label")
            continue
        for year in notes.get(LABELLING, ()):
            site.labelling.add(year)
            yield site.find_unfinished(name, "labels were being written", "label", year)
        site.checksums |= notes.get("checksums", {})


def check_predictions(site: SiteState) -> Iterator[Finding]:
    """Check the metadata of each prediction, and report incomplete and outdated maps."""
    names = set()
    for key in site.files:
        folder, *parts = key.split("/")
        if folder == "predictions" and len(parts) > 1:
            names.add(parts[0])
    if names:
        yield from site.check_empty_group("predictions/zarr.json")
    pixels = {str(year): name_pixels(attrs) for year, attrs in site.committed.items() if attrs}
    for name in sorted(names):
        yield from _check_prediction(site, name, pixels)


def _check_prediction(site: SiteState, name: str, pixels: Mapping[str, str]) -> Iterator[Finding]:
    """Check the metadata of a prediction. `pixels` names the pixels of each committed year."""
    path = f"predictions/{name}"
    key = f"{path}/zarr.json"
    site.judged[key] = site.read(key)
    attrs = attributes_in(site.judged[key])
    if attrs is None or ("checksums" in attrs and attrs != seal(attrs)):
        yield site.find("damaged", key, "is not what was written", "predict")
    elif "model" not in attrs:
        yield site.find_unfinished(path, "the map was being created", "predict")
    elif "checksums" not in attrs:
        yield site.find("unverifiable", key, "was made before checksums were kept", "predict")
    else:
        for shard, checksum in attrs["checksums"].items():
            site.checksums[f"{path}/{shard}"] = checksum
        site.mapped[name] = completeness_by_index(attrs)
        incomplete = list_unmapped(attrs, pixels)
        if incomplete:
            command = "tracks" if "made_of" in attrs["model"] else "predict"
            text = f"{', '.join(incomplete)} not mapped"
            yield site.find_unfinished(path, text, "predict", command=command)
        if all(site.committed.values()) and _is_outdated(attrs, pixels):
            text = "was mapped from other builds than there are"
            yield site.find("stale", path, text, "predict")


def _is_outdated(attrs: Mapping[str, Any], pixels: Mapping[str, str]) -> bool:
    """Whether a year was built again since it was mapped, or a probability lacks a new year."""
    if any(pixels.get(year) != name for year, name in list_mapped_pixels(attrs)):
        return True
    if attrs.get("variable") != "probability":
        return False
    years: set[str] = set()
    for view in attrs.get("views", ()):
        years.update(map(str, view))
    return bool(set(pixels) - years)
