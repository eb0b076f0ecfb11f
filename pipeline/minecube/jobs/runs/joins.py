"""Join the results of all sites: tables, scores, and a catalogue of exports."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import geopandas as gpd
import pandas as pd

from minecube import export
from minecube.digests import sha256_of_json
from minecube.errors import MinecubeError
from minecube.jobs.audit import Audit, save_audit
from minecube.jobs.runs.finished import list_finished, note_finished, read_finished
from minecube.jobs.runs.inputs import Inputs
from minecube.jobs.runs.site_steps import counts_file
from minecube.jobs.score import Counts, join_counts, read_counts
from minecube.jobs.score_tables import ScoreTables, write_tables
from minecube.jobs.tables import write_json

log = logging.getLogger(__name__)


def join_results(inputs: Inputs, steps: Iterable[str]) -> dict[str, str]:
    """Join the results of the given steps, unless they are joined already.

    Sites without a finished step are left out. Returns the reason of each step that could not be
    joined.
    """
    failures = {}
    for step in steps:
        if step not in _JOINS:
            continue
        finished = list_finished(inputs.store, step, inputs.sites)
        described = sha256_of_json(finished)
        if not finished or read_finished(inputs.store, "joined", step).get("inputs") == described:
            continue
        try:
            _JOINS[step](inputs, list(finished))
            note_finished(inputs.store, "joined", step, described, {})
        except MinecubeError as error:
            failures[step] = str(error)
    return failures


def _join_audit(inputs: Inputs, sites: Sequence[str]) -> None:
    folder = inputs.results / "audit"
    tables = {
        name: _concat(
            pd.read_parquet(folder / "sites" / f"{site}_{name}.parquet") for site in sites
        )
        for name in ("months", "years")
    }
    audit = Audit(
        recipe=inputs.job.recipe,
        by_month=tables["months"],
        by_year=tables["years"],
        requested=len(inputs.sites) * len(inputs.dataset.years),
        failed_searches=(),
    )
    save_audit(audit, folder)


def _join_tracks(inputs: Inputs, sites: Sequence[str]) -> None:
    for model in inputs.dataset.models:
        folder = inputs.results / "tracks" / model.name
        for name, joined in (("areas.csv", "areas.csv"), ("summary.csv", "sites.csv")):
            table = _concat(pd.read_csv(folder / "sites" / site / name) for site in sites)
            export.write_table(table, folder / joined)


def _concat(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(list(tables), ignore_index=True)


def _join_scores(inputs: Inputs, sites: Sequence[str]) -> None:
    counts: Counts = {}
    for site in sites:
        path = counts_file(inputs, site)
        join_counts(counts, path, read_counts(path), [])
    write_tables(ScoreTables.from_counts(counts), inputs.results / "scores")


def _join_exports(inputs: Inputs, sites: Sequence[str]) -> None:
    """Write a STAC catalogue of the sites' collections, and the footprints of all sites."""
    folder = inputs.results / "export"
    for kind in ("labels", "mapped"):
        files = [folder / site / f"footprints_{kind}.parquet" for site in sites]
        tables = [gpd.read_parquet(path) for path in files if path.exists()]
        if tables:
            joined = pd.concat(tables, ignore_index=True)
            export.write_footprints(joined, folder / f"footprints_{kind}.parquet")
    children = [
        {"rel": "child", "href": f"./{site}/collection.json", "title": site}
        for site in sites
        if (folder / site / "collection.json").exists()
    ]
    name = inputs.dataset.id
    links = [{"rel": "root", "href": "./catalog.json"}, *children]
    catalog = {
        "type": "Catalog",
        "stac_version": export.STAC_VERSION,
        "id": name,
        "title": name,
        "description": f"Annual Sentinel-2 composites of {len(children)} mines.",
        "links": [{**link, "type": "application/json"} for link in links],
    }
    write_json(folder / "catalog.json", catalog, "the catalogue")


_JOINS: dict[str, Callable[[Inputs, Sequence[str]], None]] = {
    "audit": _join_audit,
    "tracks": _join_tracks,
    "score": _join_scores,
    "export": _join_exports,
}
