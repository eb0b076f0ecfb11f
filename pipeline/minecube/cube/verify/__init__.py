"""Check a store: objects against their checksums, and pixels against each other.

Zarr reads a missing object as fill value, without an error: a false zero. The markers therefore
list the expected objects. A shard of another place decodes without an error, so decoding proves
nothing.

    markers, labels, predictions   SHA-256 of their own attributes, with the objects' checksums
    the site's group               SHA-256 of recipe and location, and of each array's metadata
    coordinates                    computed again from the grid
    pixels                         decoded from the checksummed bytes; reflectance, quality and
                                   counts must agree

Remains of a killed run are `unfinished`, not damaged. The same command completes them.

Each thread reads one block of one year at a time: one shard per variable, and its pixels.

    group.py      description, arrays, coordinates   inventory.py  missing and unexpected objects
    markers.py    markers of committed years         content.py    bytes and pixels
    records.py    labels and predictions             findings.py   findings and report
    state.py      what the checks of a site know
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from minecube.cube.listing import choose_sites, list_files, read_object
from minecube.cube.store import Store
from minecube.cube.verify.content import content_tasks, places_by_sha256
from minecube.cube.verify.findings import CURES, UNFINISHED, Finding, Report
from minecube.cube.verify.group import check_group
from minecube.cube.verify.inventory import find_missing, find_unexpected
from minecube.cube.verify.markers import check_markers
from minecube.cube.verify.records import check_labels, check_predictions
from minecube.cube.verify.state import SiteState, check_empty_group

__all__ = ["CURES", "UNFINISHED", "Finding", "Report", "named_sites", "verify"]

_SURVEY = (
    check_group,
    check_markers,
    check_labels,
    check_predictions,
    find_missing,
    find_unexpected,
)
"""Checks of metadata, in this order: later checks use what earlier ones found."""


def named_sites(store: Store) -> list[str]:
    """List the sites in a store, also those unreadable for Zarr.

    Raises:
        CubeError: there is no store, it cannot be listed, or it contains nothing of minecube.
    """
    return sorted(list_files(store))


def verify(
    store: Store,
    names: Sequence[str] | None = None,
    *,
    workers: int = 4,
    progress: Callable[[int, int, str], None] = lambda *_: None,
) -> Report:
    """Check every object of these sites (default: all). Reads each object once and changes nothing.

    Unfinished builds are reported, but their objects are not read. Memory holds `workers` blocks.

    Raises:
        CubeError: as `named_sites`, or the store lacks one of the names.
    """
    files = list_files(store)
    raw = store.open_objects()
    sites = [SiteState(raw, name, files[name]) for name in choose_sites(store, files, names)]
    findings = list(check_empty_group("", "zarr.json", read_object(raw, "zarr.json")))
    for site in sites:
        for check in _SURVEY:
            findings += check(site)
    places = places_by_sha256(sites)
    tasks = [(site.name, task) for site in sites for task in content_tasks(site, places)]
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda named: named[1](), tasks)
        for number, ((name, _), result) in enumerate(zip(tasks, results, strict=True), start=1):
            findings += result
            progress(number, len(tasks), name)
    for site in sites:
        findings = _without_changed(site, findings)
    return Report(
        sites=tuple(site.name for site in sites),
        committed={site.name: site.committed for site in sites},
        objects=sum(len(site.files) for site in sites),
        bytes=sum(sum(site.files.values()) for site in sites),
        findings=tuple(sorted(findings, key=_order)),
    )


def _order(finding: Finding) -> tuple[str, int, str]:
    return finding.site, finding.year or 0, finding.what


def _differ(content: Any, later: Any) -> bool:
    """Whether two reads of an object differ. The errors of an unreadable object are equal."""
    if isinstance(content, Exception) and isinstance(later, Exception):
        return str(content) != str(later)
    return bool(content != later)


def _without_changed(site: SiteState, findings: list[Finding]) -> list[Finding]:
    """Replace the findings about metadata written during the check by one `unfinished` each."""
    changed = {key for key, content in site.judged.items() if _differ(content, site.read(key))}
    valid = []
    outdated = {}
    for finding in findings:
        if finding.site == site.name and finding.metadata_key in changed:
            outdated[finding.metadata_key] = finding
        else:
            valid.append(finding)
    for key, finding in sorted(outdated.items()):
        text = "it was written while it was verified"
        valid.append(site.find_unfinished(key, text, finding.cure, finding.year, "verify"))
    return valid
