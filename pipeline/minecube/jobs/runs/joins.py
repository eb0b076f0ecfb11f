"""Join the results of all sites: tables, scores, and a catalogue of exports."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence

import geopandas as gpd
import pandas as pd

from minecube import export, report
from minecube.cube.locks import hold
from minecube.digests import sha256_of_json
from minecube.errors import MinecubeError
from minecube.jobs.audit import Audit, save_audit
from minecube.jobs.failures import describe_failure
from minecube.jobs.runs.finished import (
    forget_finished,
    note_finished,
    read_finished,
    read_notes,
)
from minecube.jobs.runs.inputs import Inputs
from minecube.jobs.runs.site_steps import counts_file
from minecube.jobs.score import Counts, join_counts, read_counts
from minecube.jobs.score_tables import ScoreTables, write_tables
from minecube.jobs.tables import write_json
from minecube.places import Place, local_copy, outgoing

_WAIT_S = 600.0
"""Longest time to wait for another run that joins the same results."""


def join_results(inputs: Inputs, steps: Iterable[str]) -> dict[str, str]:
    """Join the results of the given steps, unless they are joined already.

    Sites without a finished step are left out. Returns the reason of each step that could not be
    joined.
    """
    failures = {}
    for step in steps:
        if step not in _JOINS:
            continue
        try:
            with hold(inputs.store, f"run/join/{step}", wait_s=_WAIT_S):
                _join(inputs, step)
        except (MinecubeError, OSError) as error:
            failures[step] = describe_failure(error)
    return failures


def _join(inputs: Inputs, step: str) -> None:
    """Join the results of one step, unless the same are joined, and are still there."""
    notes = read_notes(inputs.store, step, inputs.sites)
    finished = {site: [note["inputs"], note["outputs"]] for site, note in notes.items()}
    described = sha256_of_json(finished)
    joined = read_finished(inputs.store, "joined", step)
    results = inputs.results
    if not finished or (
        joined.get("inputs") == described
        and all((results / name).exists() for name in joined["outputs"])
    ):
        return
    forget_finished(inputs.store, "joined", step)
    names = _JOINS[step](inputs, list(finished))
    note_finished(inputs.store, "joined", step, described, names)


def _join_audit(inputs: Inputs, sites: Sequence[str]) -> list[str]:
    folder = inputs.results / "audit"
    tables = {
        name: _concat(
            pd.read_parquet(_open(folder / "sites" / f"{site}_{name}.parquet")) for site in sites
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
    with outgoing(folder) as local:
        save_audit(audit, local)
    return ["audit/audit.csv", "audit/audit.parquet", "audit/audit.png"]


def _join_tracks(inputs: Inputs, sites: Sequence[str]) -> list[str]:
    names = []
    for model in inputs.dataset.models:
        folder = inputs.results / "tracks" / model.name
        for name, joined in (("areas.csv", "areas.csv"), ("summary.csv", "sites.csv")):
            table = _concat(pd.read_csv(_open(folder / "sites" / site / name)) for site in sites)
            with outgoing(folder / joined) as path:
                export.write_table(table, path)
            if joined == "areas.csv":
                with outgoing(folder / "areas.png") as path:
                    report.draw_area_overview(_split_by_site(table), path)
            names.append(f"tracks/{model.name}/{joined}")
    return names


def _split_by_site(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {str(site): rows for site, rows in table.groupby("site")}


def _concat(tables: Iterable[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat(list(tables), ignore_index=True)


def _open(place: Place) -> io.BytesIO:
    return io.BytesIO(place.read_bytes())


def _join_scores(inputs: Inputs, sites: Sequence[str]) -> list[str]:
    counts: Counts = {}
    for site in sites:
        with local_copy(counts_file(inputs, site)) as path:
            join_counts(counts, path, read_counts(path), [])
    with outgoing(inputs.results / "scores") as folder:
        paths = write_tables(ScoreTables.from_counts(counts), folder)
        return [f"scores/{path.name}" for path in paths]


def _join_exports(inputs: Inputs, sites: Sequence[str]) -> list[str]:
    """Write a STAC catalogue of the sites' collections, and the footprints of all sites."""
    folder = inputs.results / "export"
    for kind in ("labels", "mapped"):
        files = [folder / site / f"footprints_{kind}.parquet" for site in sites]
        tables = [gpd.read_parquet(_open(path)) for path in files if path.exists()]
        if tables:
            joined = pd.concat(tables, ignore_index=True)
            with outgoing(folder / f"footprints_{kind}.parquet") as path:
                export.write_footprints(joined, path)
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
    with outgoing(folder / "catalog.json") as path:
        write_json(path, catalog, "the catalogue")
    return ["export/catalog.json"]


_JOINS: dict[str, Callable[[Inputs, Sequence[str]], list[str]]] = {
    "audit": _join_audit,
    "tracks": _join_tracks,
    "score": _join_scores,
    "export": _join_exports,
}
