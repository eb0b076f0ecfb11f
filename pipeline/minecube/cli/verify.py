"""Subcommands verify (check a store against its checksums) and pack (make one file of a store)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from minecube import cube
from minecube.cli.common import (
    OutFile,
    SiteChoice,
    progress_bar,
    sites_option,
    store_option,
    stored_sites,
)
from minecube.errors import CatalogError
from minecube.files import replacing

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
    help="Withdraw damaged site-years and delete their pixels. The next `minecube build` rebuilds them.",
)
@click.pass_context
def verify(
    ctx: click.Context,
    store: cube.Store,
    wanted: SiteChoice,
    out: Path | None,
    workers: int,
    uncommit: bool,
) -> None:
    """Check a store against its checksums, and list what to rebuild.

    Reads every object once. Detects flipped bits and missing or foreign chunks, and compares metadata,
    coordinates, provenance, read counts and pixels with each other. Exits with 1 if anything is wrong.
    Remains of killed runs are listed as unfinished and do not count as wrong.

    \b
    Example:
      minecube verify --store cubes.zarr --json verified.json
    """
    if uncommit:
        store.need_writable()
    names = stored_sites(store, wanted, cube.named_sites(store))
    with progress_bar("verifying") as advance:
        report = cube.verify(
            store,
            names,
            workers=workers,
            progress=lambda done, total, name: advance(note=f"{name}, {done} of {total}"),
        )
    for finding in report.findings[:_SHOWN]:
        click.echo(str(finding))
    if len(report.findings) > _SHOWN:
        click.echo(f"... and {len(report.findings) - _SHOWN} more, which --json FILE has")
    years = sum(len(of) for of in report.committed.values())
    looked = f"{len(names)} sites, {years} site-years, {report.objects} objects, {report.bytes / 1e6:,.1f} MB"
    commands = _commands(store, report)
    if out:
        content = {
            "store": str(store),
            "sites": report.sites,
            "site_years": years,
            "objects": report.objects,
            "bytes": report.bytes,
            "ok": report.whole,
            "findings": [dataclasses.asdict(f) for f in report.findings],
            "rebuild": report.rebuild,
            "commands": commands,
        }
        try:
            with replacing(out) as draft:
                draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise CatalogError(
                f"{out}: the findings cannot be written ({error.strerror}); name another file"
            ) from error
    if report.whole:
        unfinished = f", {len(report.findings)} unfinished" if report.findings else ""
        click.echo(f"{store}: {looked}: all as it was written{unfinished}")
        return
    click.echo(f"{store}: {looked}: {len(report.findings)} findings")
    if uncommit:
        for site, of in report.rebuild.items():
            cube.uncommit(store, site, of, report.committed[site])
        click.echo(f"took the commit off {', '.join(_site_years(report)) or 'nothing'}")
        commands = [line for line in commands if not line.endswith(" --uncommit")]
    if commands:
        click.echo("to mend it:\n" + "\n".join(f"  {line}" for line in commands))
    ctx.exit(1)


def _site_years(report: cube.Report) -> list[str]:
    return [f"{site} {year}" for site, of in report.rebuild.items() for year in of]


def _commands(store: cube.Store, report: cube.Report) -> list[str]:
    """List the commands to mend the store, one per line."""
    if store.packed:
        folder = store.suggest_folder()
        lines = _commands(cube.Store(folder), report)
        first = f"unzip -d {folder} {store}   # or do the following to the store that was packed"
        return [first, *lines, f"minecube pack --store {folder} --out {store}"] if lines else []
    whole = {f.site for f in report.findings if f.cure == "site"}
    lines = [
        f"remove {store.name.rstrip('/')}/{site}   # what all its years share is damaged"
        for site in sorted(whole)
    ]
    part = [site for site in report.rebuild if site not in whole]
    if part:
        lines.append(f"minecube verify --store {store} --sites {','.join(part)} --uncommit")
    for site, years in report.rebuild.items():
        made = [report.committed[site].get(y, {}) for y in [*years, *report.committed[site]]]
        sources = list(
            dict.fromkeys(
                s["source"] for attrs in made for s in attrs.get("scenes", ()) if "source" in s
            )
        )
        recipe = next(
            (attrs["recipe"]["id"] for attrs in made if "id" in attrs.get("recipe", {})), "RECIPE"
        )
        lines.append(
            f"minecube build --store {store} --sites {site} --years {','.join(map(str, years))} "
            f"--source {','.join(sources) or 'SOURCE'} --recipe {recipe}   # and the --catalog, or the file of --sites, it had"
        )
    wrong = [f for f in report.findings if f.kind not in ("unverifiable", cube.UNFINISHED)]
    labels = sorted({f.site for f in wrong if f.cure == "label"})
    if labels:
        lines.append(f"minecube label --store {store} --sites {','.join(labels)} --polygons FILE")
    maps = {(f.what.split("/")[1], f.site) for f in wrong if f.cure == "predict"}
    for name in sorted({name for name, _ in maps}):
        where = f"--store {store} --sites {','.join(sorted(site for other, site in maps if other == name))}"
        model, smoothed, _ = name.partition("+")
        again = (
            f"tracks {where} --model {model} --out FOLDER"
            if smoothed
            else f"predict {where} --model FILE --name {name} --overwrite"
        )
        lines.append(f"minecube {again}")
    for finding in report.findings:
        path = "/".join(
            part for part in (store.name.rstrip("/"), finding.site, finding.what) if part
        )
        if finding.cure == "remove":
            lines.append(f"remove {path}")
        elif finding.cure == "group":
            group = path.removesuffix("/zarr.json")
            lines.append(
                f'remove {path}, then python -c \'import zarr; zarr.open_group("{group}", mode="a")\''
            )
    return lines


@click.command()
@store_option
@sites_option
@click.option("--out", type=OutFile(), required=True, help="File to write. Its name ends in .zip.")
def pack(store: cube.Store, wanted: SiteChoice, out: Path) -> None:
    """Pack the committed site-years of a store into one zip file.

    Commands that only read open the file like a store. `unzip` restores the store byte for byte. The same
    store gives the same file.

    \b
    Example:
      minecube pack --store cubes.zarr --out cubes.zarr.zip
    """
    names = stored_sites(store, wanted, cube.named_sites(store))
    with progress_bar("packing") as advance:
        made = cube.pack(
            store, out, names, lambda _done, total, name: advance(note=name, total=total)
        )
    if made.left_out:
        click.echo(f"left out, not committed: {', '.join(made.left_out)}", err=True)
    click.echo(
        f"{out}: {made.site_years} site-years, {made.objects} objects, {made.bytes / 1e6:,.1f} MB, sha256 {made.sha256}"
    )
