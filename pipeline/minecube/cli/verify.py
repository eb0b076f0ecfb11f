"""Subcommand verify: check a store against its checksums."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import click

from minecube import cube
from minecube.cli.bars import progress_bar
from minecube.cli.options import StoreSites, collect_options, sites_option, store_option
from minecube.cli.parameters import OutFile
from minecube.jobs.repair import repair_commands
from minecube.jobs.tables import write_json
from minecube.places import Place

_SHOWN = 50
"""Most findings printed. The JSON has all."""


@click.command()
@store_option
@sites_option
@click.option("--json", "out", type=OutFile(), help="File for all findings.")
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Number of blocks checked at the same time.",
)
@click.option(
    "--uncommit",
    is_flag=True,
    help="Delete the pixels of damaged site-years and their commits. Labels and maps stay. The "
    "next `minecube build` rebuilds the site-years.",
)
@collect_options
def verify(sites: StoreSites, out: Place | None, workers: int, uncommit: bool) -> None:
    """Check a store against its checksums, and list what to rebuild.

    Reads every object once. Detects flipped bits and missing or unlisted chunks, and compares
    metadata, coordinates, provenance, read counts and pixels with each other. Exits with 1 if
    anything is wrong. Remains of killed runs are listed as unfinished and do not count as wrong.

    \b
    Example:
      minecube verify --store cubes.zarr --json verified.json
    """
    store = sites.store
    if uncommit:
        store.need_writable()
    names = sites.names(cube.named_sites(store))
    with progress_bar("verifying") as bar:
        report = cube.verify(
            store,
            names,
            workers=workers,
            progress=bar.reach,
        )
    _print_findings(report)
    commands = repair_commands(store, report)
    if out:
        write_json(out, _content(store, report, commands), "the findings")
    extent = (
        f"{len(names)} sites, {_count_years(report)} site-years, {report.objects} objects, "
        f"{report.bytes / 1e6:,.1f} MB"
    )
    if report.whole:
        unfinished = ""
        if report.findings:
            unfinished = f", {len(report.findings)} unfinished"
        click.echo(f"{store}: {extent}: all as it was written{unfinished}")
        return
    click.echo(f"{store}: {extent}: {len(report.findings)} findings")
    if uncommit:
        _uncommit(store, report)
        commands = [command for command in commands if not command.endswith(" --uncommit")]
    if commands:
        click.echo("to mend it:\n" + "\n".join(f"  {command}" for command in commands))
    click.get_current_context().exit(1)


def _print_findings(report: cube.Report) -> None:
    for finding in report.findings[:_SHOWN]:
        click.echo(str(finding))
    if len(report.findings) > _SHOWN:
        click.echo(f"... and {len(report.findings) - _SHOWN} more, which --json FILE has")


def _count_years(report: cube.Report) -> int:
    return sum(map(len, report.committed.values()))


def _content(store: cube.Store, report: cube.Report, commands: Sequence[str]) -> dict[str, object]:
    """Return the findings as nested dictionaries for JSON."""
    return {
        "store": str(store),
        "sites": report.sites,
        "site_years": _count_years(report),
        "objects": report.objects,
        "bytes": report.bytes,
        "ok": report.whole,
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "rebuild": report.rebuild,
        "commands": commands,
    }


def _uncommit(store: cube.Store, report: cube.Report) -> None:
    """Withdraw the damaged site-years, and print them."""
    for site, years in report.rebuild.items():
        cube.withdraw_years(store, site, years, report.committed[site])
    withdrawn = [f"{site} {year}" for site, years in report.rebuild.items() for year in years]
    click.echo(f"took the commit off {', '.join(withdrawn) or 'nothing'}")
