"""Run whole jobs: compositions of the stages, as the commands of `minecube` run them.

Only this package combines stages. Jobs print nothing, and need no command line. Errors are
MinecubeError. Long jobs take a `progress` callback.

    job = BuildJob(store=..., sources=choose_sources("earth-search", None), recipe=..., snapshots=...)
    plan_build(job, sites, years)              -> BuildPlan         requests, bytes, time and cost
    audit_scenes(sites, years, sources, ...)   -> Audit             listed and expected scenes
    build_cubes(job, sites, years)             -> [Outcome]         cubes in job.store
    draw_labels(polygons, site, grid, ...)     -> SiteLabels        .write(store)
    train_network(store, sites, ...)           -> train.TrainingResult
    map_site(store, site, mapper)              -> Mapped            maps in the store
    smooth_sites(store, maps, folder)          -> summaries         smoothed maps, layers, tables
    score_site(store, site, model)             -> metrics.Counts    additive counts
    count_sites(store, sites, models)          -> Counts            model -> site -> metrics.Counts
    ScoreTables.from_counts(counts)            -> ScoreTables       write_tables(tables, folder)
    export_sites(store, sites, folder)         -> paths             COG, NetCDF, Zarr, STAC
    run_benchmark(Benchmark(...))              -> paths             several networks, two tables
    run(load_dataset("dataset.yaml"))          -> Summary           all steps of a whole dataset
    run_demo(folder, epochs)                   -> summary           everything, simulated

    selection.py    choose sites              scene_lists.py  search or load lists of scenes
    catalogs.py     entries of catalogues     copies.py       replace scenes with missing files
    workers.py      tasks on a Dask cluster   processes.py    tasks in processes of this machine
    memory.py       keep freed memory
    failures.py     explain errors            repair.py       commands that mend a store
    tables.py       text tables and files     score_tables.py tables and pictures of scores

Every other module is one job. Names are loaded at their first use. Importing the package loads
neither torch nor dask.
"""

from __future__ import annotations

from minecube.lazy import load_lazily

_NAMES = {
    "audit": ("Audit", "audit_scenes"),
    "bench": ("Benchmark", "run_benchmark"),
    "build": ("BuildJob", "Outcome", "build_cubes", "build_year"),
    "catalogs": ("choose_sources",),
    "demo": ("run_demo",),
    "export": ("ExportOptions", "export_sites"),
    "label": ("SiteLabels", "draw_labels"),
    "plan": ("BuildPlan", "plan_build"),
    "polygons": ("compare_mappers", "survey_files"),
    "predict": ("MapOptions", "Mapped", "map_on_workers", "map_site"),
    "publish": ("publish_sites",),
    "release": ("export_release",),
    "repair": ("repair_commands",),
    "runs": ("RunOptions", "Summary", "run"),
    "score": ("count_sites", "score_site"),
    "score_tables": ("ScoreTables", "write_tables"),
    "selection": ("SiteChoice", "choose_sites", "stored_sites"),
    "tracks": ("SmoothedSites", "Track", "choose_rates", "smooth_sites", "track_site"),
    "train": ("train_network",),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)
__getattr__ = load_lazily(__name__, _HOME)
