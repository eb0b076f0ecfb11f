"""Subcommand demo: run and measure the whole pipeline on a simulated world with known truth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from minecube.cli.bars import print_line
from minecube.cli.parameters import SEED, LocalFolder
from minecube.jobs.demo import TEST_SITE, run_demo
from minecube.jobs.tables import format_table

_MEANINGS = {
    "composite_rmse": "composites against clean reflectance, all bands, sites and years",
    "composite_rmse_naive": "the same for the median of everything, unmasked",
    "composite_rmse_mine": "the same as the first, mine pixels only",
    "residual_cloud_pct": "pixels whose blue is brighter than the truth by more than 0.03",
    "residual_cloud_pct_naive": "the same for the median of everything",
    "holes_pct": "pixels empty although a clear observation existed",
    "map_iou": "footprints of the unseen site, all years pooled",
    "ca_tiou": "tube IoU, mean of constant and of changing ground",
    "change_f1": "changed pixels over all pairs of years",
    "area_error_pct": "mapped area against the true one, mean over years",
    "seconds": "all of it",
    "peak_rss_mb": "memory at its highest",
}


@click.command()
@click.option(
    "--out",
    type=LocalFolder(),
    default=Path("build/demo"),
    show_default=True,
    help="New or empty folder for all results.",
)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    help="Number of training epochs.",
)
@click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of the simulated world and of the training.",
)
def demo(out: Path, epochs: int, seed: int) -> None:
    """Run the whole pipeline on a simulated world, and score it against the truth.

    Covers three mines and three years; each mine is listed in the style of another provider. A
    small U-Net learns from two mines and maps the third. Writes cubes, exports, pictures and
    summary.json, and prints the scores. Takes three to five minutes and 1.7 GB on two cores.

    \b
    Example:
      minecube demo --out build/demo
    """
    summary = run_demo(out, epochs, seed, _print_stage)
    rows = [(name, value, _MEANINGS.get(name, "")) for name, value in summary.items()]
    click.echo(format_table(("measure", "value", "what it is"), rows))
    for file in (
        f"export/{TEST_SITE}/{TEST_SITE}_strip.png",
        "comparison.png",
        f"export/{TEST_SITE}/{TEST_SITE}_areas.png",
        "export/areas.png",
        "export/collection.json",
    ):
        click.echo(f"see {out}/{file}")


@contextmanager
def _print_stage(title: str) -> Iterator[None]:
    """Print a stage's title, and its seconds at the end."""
    start = time.monotonic()
    print_line(f"{title} ...")
    yield
    print_line(f"{'':4}{time.monotonic() - start:.0f} s")
