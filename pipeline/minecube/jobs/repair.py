"""Name the commands that repair a damaged store, after `cube.verify`."""

from __future__ import annotations

from collections.abc import Sequence

from minecube import cube


def repair_commands(store: cube.Store, report: cube.Report) -> list[str]:
    """List the commands to mend a store, one per line.

    A packed store is unpacked, mended and packed again.
    """
    if store.packed:
        return _repack(store, report)
    return [
        *_rebuild_sites(store, report),
        *_label_again(store, report),
        *_map_again(store, report),
        *_remove_objects(store, report),
    ]


def _repack(store: cube.Store, report: cube.Report) -> list[str]:
    folder = store.suggest_folder()
    commands = repair_commands(cube.Store(folder), report)
    if not commands:
        return []
    unpack = f"unzip -d {folder} {store}   # or do the following to the store that was packed"
    return [unpack, *commands, f"minecube pack --store {folder} --out {store}"]


def _rebuild_sites(store: cube.Store, report: cube.Report) -> list[str]:
    """List commands to remove damaged sites and years, and to build them again."""
    damaged = {finding.site for finding in report.findings if finding.cure == "site"}
    commands = [
        f"remove {_path_in(store, site)}   # what all its years share is damaged"
        for site in sorted(damaged)
    ]
    partly = [site for site in report.rebuild if site not in damaged]
    if partly:
        commands.append(f"minecube verify --store {store} --sites {','.join(partly)} --uncommit")
    return commands + [
        _build_again(store, report, site, years) for site, years in report.rebuild.items()
    ]


def _build_again(store: cube.Store, report: cube.Report, site: str, years: Sequence[int]) -> str:
    """Name the build of a site's years, with its earlier sources and recipe."""
    committed = report.committed[site]
    markers = [committed.get(year, {}) for year in [*years, *committed]]
    scenes = [scene for marker in markers for scene in marker.get("scenes", ())]
    sources = dict.fromkeys(scene["source"] for scene in scenes if "source" in scene)
    recipes = [marker["recipe"]["id"] for marker in markers if "id" in marker.get("recipe", {})]
    return (
        f"minecube build --store {store} --sites {site} --years {','.join(map(str, years))} "
        f"--source {','.join(sources) or 'SOURCE'} --recipe {[*recipes, 'RECIPE'][0]}"
        "   # and the --catalog, or the file of --sites, it had"
    )


def _harmful_findings(report: cube.Report) -> list[cube.Finding]:
    """List the findings, except remains of killed runs and objects without checksum."""
    return [f for f in report.findings if f.kind not in ("unverifiable", cube.UNFINISHED)]


def _label_again(store: cube.Store, report: cube.Report) -> list[str]:
    sites = sorted({f.site for f in _harmful_findings(report) if f.cure == "label"})
    if not sites:
        return []
    return [f"minecube label --store {store} --sites {','.join(sites)} --polygons FILE"]


def _map_again(store: cube.Store, report: cube.Report) -> list[str]:
    """List commands to repeat damaged predictions."""
    sites: dict[str, set[str]] = {}
    for finding in _harmful_findings(report):
        if finding.cure == "predict":
            prediction = finding.what.split("/")[1]
            sites.setdefault(prediction, set()).add(finding.site)
    commands = []
    for prediction in sorted(sites):
        place = f"--store {store} --sites {','.join(sorted(sites[prediction]))}"
        command = f"predict {place} --model FILE --name {prediction} --overwrite"
        model, plus, _ = prediction.partition("+")
        if plus:
            command = f"tracks {place} --model {model} --out FOLDER"
        commands.append(f"minecube {command}")
    return commands


def _remove_objects(store: cube.Store, report: cube.Report) -> list[str]:
    """List commands to remove foreign objects, and damaged groups without content."""
    commands = []
    for finding in report.findings:
        path = _path_in(store, finding.site, finding.what)
        if finding.cure == "remove":
            commands.append(f"remove {path}")
        elif finding.cure == "group":
            group = path.removesuffix("/zarr.json")
            program = f'import zarr; zarr.open_group("{group}", mode="a")'
            commands.append(f"remove {path}, then python -c '{program}'")
    return commands


def _path_in(store: cube.Store, *parts: str) -> str:
    """Join the store and the parts that are not empty."""
    return "/".join([store.name.rstrip("/"), *filter(None, parts)])
