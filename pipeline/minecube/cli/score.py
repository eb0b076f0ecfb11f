"""Subcommand score: compare models with labels, in tables and pictures."""

from __future__ import annotations

from collections.abc import Sequence

import click

from minecube import metrics
from minecube.cli.bars import progress_bar
from minecube.cli.options import StoreSites, collect_options, sites_option, store_option
from minecube.cli.parameters import InFile, OutFile, OutFolder
from minecube.errors import CatalogError
from minecube.jobs.score import Counts, count_sites, join_counts, read_counts
from minecube.jobs.score_tables import NOUN, ScoreTables, replace_nan, write_tables
from minecube.jobs.tables import write_json
from minecube.places import Place, outgoing


@click.command()
@store_option
@sites_option
@click.option(
    "--model",
    "models",
    default="unet-small",
    show_default=True,
    help="Names of predictions, comma-separated. A model's id selects its only prediction. "
    "=NAME: exactly that name.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Also score trivial baselines: a map that never changes, a map with mine everywhere, and "
    "last year's labels.",
)
@click.option(
    "--join",
    "joined",
    multiple=True,
    type=InFile(),
    help="Counts of other sites (counts.json, which --out writes), to score together. May be "
    "repeated.",
)
@click.option("--json", "json_file", type=OutFile(), help="File for all scores.")
@click.option(
    "--out",
    type=OutFolder(),
    help="Folder for tables (Markdown, CSV, LaTeX), pictures, and counts for --join.",
)
@collect_options
def score(
    sites: StoreSites,
    models: str,
    baselines: bool,
    joined: Sequence[Place],
    json_file: Place | None,
    out: Place | None,
) -> None:
    """Compare predictions with the labels, per site, year, gap and pair of years, and pooled.

    A pooled score is a ratio of sums, not a mean of ratios. With several sites it has a 95 %
    interval, by bootstrap over sites. Every model after the first is also compared with the
    first, over the same sites. Models of footprints and of change share one table.

    \b
    Examples:
      minecube score --store cubes.zarr --sites Germany_2 --model unet-small
      minecube score --store cubes.zarr --model unet-small,tinycd --baselines --out scores
      minecube score --store here.zarr --join there/counts.json --out both
    """
    names = sites.names()
    requested = _split_models(models)
    earlier = [(path, read_counts(path)) for path in joined]  # before the slow counting
    predictions = [sites.prediction(names, model) for model in requested]
    if len(set(predictions)) < len(predictions):
        raise CatalogError(
            f"--model {models}: two of the names stand for one prediction; expected each model once"
        )
    counts: Counts = {prediction: {} for prediction in predictions}
    for path, scores in earlier:
        join_counts(counts, path, scores, names)
    with progress_bar("scoring", len(names) * len(predictions), "maps") as bar:
        added = count_sites(
            sites.store, names, predictions, baselines=baselines, progress=bar.advance
        )
    for model, by_site in added.items():
        counts.setdefault(model, {}).update(by_site)
    tables = ScoreTables.from_counts(counts)
    click.echo(tables.text())
    if json_file:
        content = {"ca_tiou_version": metrics.CA_TIOU_VERSION, **tables.content()}
        write_json(json_file, replace_nan(content), NOUN)
    if out:
        with outgoing(out) as folder:
            paths = write_tables(tables, folder)
        for path in paths:
            click.echo(out / path.relative_to(folder))


def _split_models(models: str) -> list[str]:
    names = [name.strip() for name in models.split(",")]
    if not all(names):
        raise CatalogError(
            f"--model {models}: expected names with a comma between them, found an empty name"
        )
    if len(set(names)) < len(names):
        raise CatalogError(f"--model {models}: expected each model once")
    return names
