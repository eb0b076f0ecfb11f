"""Subcommand simulate: make a Sentinel-2 archive with known truth."""

from __future__ import annotations

from pathlib import Path

import click

from minecube.cli.bars import progress_bar
from minecube.cli.options import SiteOptions, catalog_sites_options, collect_options
from minecube.cli.parameters import SEED, LocalFolder, Years
from minecube.simulate import World
from minecube.simulate import simulate_archive as make_world


@click.command()
@catalog_sites_options
@click.option(
    "--years", type=Years(), default="2015,2020,2022", show_default=True, help="Years to simulate."
)
@click.option(
    "--out",
    type=LocalFolder(),
    required=True,
    help="Folder for the archive. Pass it to other commands as --catalog.",
)
@click.option(
    "--dates",
    "dates_per_year",
    default=22,
    show_default=True,
    help="Acquisition dates per growing season.",
)
@click.option(
    "--seed", type=SEED, default=0, show_default=True, help="The same seed gives the same pixels."
)
@collect_options
def simulate(sites: SiteOptions, out: Path, world: World) -> None:
    """Simulate a Sentinel-2 archive over sites, with the truth.

    The archive is listed in the style of three providers: sources sim-earth-search,
    sim-planetary-computer and sim-cdse.

    \b
    Example:
      minecube simulate --sites demo_1 --years 2020-2022 --out world
      minecube build --catalog world --sites demo_1 --years 2020-2022 --source sim-cdse --store cubes.zarr
    """
    loaded = sites.load()
    with progress_bar("simulating", len(loaded) * len(world.years), "site-years") as bar:
        make_world(loaded, out, world, progress=bar.advance)
    click.echo(
        f"{out}: {len(loaded)} sites, {len(world.years)} years; "
        f"use it with --catalog {out} --source sim-earth-search"
    )
