"""Subcommand pack: make one file of a store."""

from __future__ import annotations

import click

from minecube import cube
from minecube.cli.bars import progress_bar
from minecube.cli.options import StoreSites, collect_options, sites_option, store_option
from minecube.cli.parameters import OutFile
from minecube.places import Place


@click.command()
@store_option
@sites_option
@click.option("--out", type=OutFile(), required=True, help="File to write. Its name ends in .zip.")
@collect_options
def pack(sites: StoreSites, out: Place) -> None:
    """Pack the committed site-years of a store into one zip file.

    Commands that only read open the file like a store. `unzip` restores the store byte for byte.
    The same store gives the same file.

    \b
    Example:
      minecube pack --store cubes.zarr --out cubes.zarr.zip
    """
    names = sites.names(cube.named_sites(sites.store))
    with progress_bar("packing") as bar:
        packed = cube.pack(sites.store, out, names, bar.reach)
    if packed.left_out:
        click.echo(f"left out, not committed: {', '.join(packed.left_out)}", err=True)
    click.echo(
        f"{out}: {packed.site_years} site-years, {packed.objects} objects, "
        f"{packed.bytes / 1e6:,.1f} MB, sha256 {packed.sha256}"
    )
