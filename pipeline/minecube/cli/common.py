"""Shared parts of the subcommands: options, choice of sites and years, progress bars, tables."""

from __future__ import annotations

import ctypes
import dataclasses
import fnmatch
import logging
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from minecube import cube
from minecube.catalog import (
    LARGEST_MARGIN_M,
    MARGIN_M,
    ModelCard,
    Recipe,
    Settings,
    Site,
    Source,
    load_models,
    load_presets,
    load_recipes,
    load_sites,
    load_sources,
    pick,
    same_names,
)
from minecube.cli.explain import explain, one_line
from minecube.errors import CatalogError, MinecubeError, WorkerError
from minecube.vectors import NAMED, SUFFIXES

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

_ANSWERS_S = 5
"""Seconds to wait for a Dask scheduler."""
_LISTENS_S = 1.0  # seconds between checks for Ctrl-C
_LAYER = "minecube.layer"  # key in a click context; holds the layer for --sites


@dataclass(frozen=True)
class SiteChoice:
    """Value of --sites: names of sites, or a file of sites and its layer."""

    text: str
    layer: str | None = None

    def __str__(self) -> str:
        """Return the words after --sites."""
        return self.text

    def is_file(self) -> bool:
        """Return whether the text names a file, by its suffix, its folder, or an existing file."""
        path = Path(self.text)
        return path.suffix.lower() in SUFFIXES or (
            path.suffix != "" and (path.name != self.text or path.is_file())
        )


class FiniteRange(click.FloatRange):
    """A finite number within a range.

    Rejects infinity and NaN (click accepts NaN in every range).
    """

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Convert text to a number, or fail."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r}: expected a finite number", param, ctx)
        return number


class OutFile(click.Path):
    """A file to write. Its nearest existing parent folder must be writable."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Convert text to a path, or fail before hours of work are lost."""
        path = Path(str(super().convert(value, param, ctx)))
        _check_place(self, path, param, ctx)
        return path


class OutFolder(click.Path):
    """A folder to write to. The folder, or its nearest existing parent, must be writable."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Convert text to a path, or fail before hours of work are lost."""
        path = Path(str(super().convert(value, param, ctx)))
        _check_place(self, path / "new", param, ctx)
        return path


def _check_place(
    kind: click.ParamType[Any], path: Path, param: click.Parameter | None, ctx: click.Context | None
) -> None:
    """Fail if no file can be written at a path.

    Tries to write a temporary file, since permissions do not show what an administrator may write.
    """
    above = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=above).close()
    except OSError as error:
        kind.fail(
            f"{str(path)!r}: {above} cannot be written to ({error.strerror}); name another place",
            param,
            ctx,
        )


SEED = click.IntRange(min=0, max=2**32 - 1)
"""Range of seeds accepted by both NumPy and PyTorch."""


def _readable(_ctx: click.Context, _param: click.Parameter, name: str) -> cube.Store:
    store = cube.Store(name)
    store.check_answers()
    return store


store_option = click.option(
    "--store",
    required=True,
    callback=_readable,
    help="Store of cubes: a folder, an object-store URL, or a packed store (.zip), which is read-only.",
)


scheduler_option = click.option(
    "--scheduler",
    help="Address of a Dask scheduler (tcp://host:8786). [default: run on this machine]",
)


def _writable(_ctx: click.Context, _param: click.Parameter, name: str) -> cube.Store:
    store = cube.Store(name)
    store.need_writable()
    store.check_answers()
    return store


writable_store_option = click.option(
    "--store",
    required=True,
    callback=_writable,
    help="Store of cubes: a folder or an object-store URL.",
)
margin_option = click.option(
    "--margin",
    type=FiniteRange(min=0, max=LARGEST_MARGIN_M),
    help="Metres of ground around a site's polygon. A store keeps the margin of a site's first "
    f"build. [default: the site's `margin` field; without one, {MARGIN_M} for a file of "
    "polygons and 0 for sites of the catalogue]",
)


def _keep_layer(ctx: click.Context, _param: click.Parameter, layer: str | None) -> None:
    ctx.meta[_LAYER] = layer


def with_layer(ctx: click.Context, _param: click.Parameter, text: str | None) -> SiteChoice | None:
    """Combine the words of --sites with the layer of --sites-layer.

    A callback of options for sites.
    """
    return None if text is None else SiteChoice(text, ctx.meta.get(_LAYER))


def sites_layer_option(*flags: str) -> Callable[[F], F]:
    """Make the option for the layer of a file of sites.

    `SiteChoice` passes the layer to the command.
    """
    return click.option(
        *flags,
        is_eager=True,  # parsed before --sites
        expose_value=False,
        callback=_keep_layer,
        help="Layer of the --sites file, if several layers have polygons. * is allowed.",
    )


def _sites_option(command: F) -> F:
    return click.option(
        "--sites",
        "wanted",
        default="*",
        show_default=True,
        callback=with_layer,
        help=f"Names of sites, comma-separated, * allowed. Or a file with one polygon per site ({NAMED}).",
    )(command)


def sites_option(command: F) -> F:
    """Add --sites, and --layer for a file of sites."""
    return _sites_option(sites_layer_option("--layer", "--sites-layer")(command))


def sites_with_polygons_option(command: F) -> F:
    """Add --sites and --sites-layer. --layer remains for the command's polygons."""
    return _sites_option(sites_layer_option("--sites-layer")(command))


def layer_option(command: F) -> F:
    """Add --layer for a file of polygons."""
    return click.option(
        "--layer", help="Layer of the polygon file, if several layers have polygons. * is allowed."
    )(command)


catalog_option = click.option(
    "--catalog",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Folder with your own sites.geojson, sources.yaml, recipes.yaml, models.yaml or "
    "presets.yaml. Their entries are added to the shipped ones.",
)


source_option = click.option(
    "--source",
    "source_ids",
    required=True,
    help="Sources of scenes, such as earth-search or cdse (catalog/sources.yaml). Several are "
    "comma-separated, in order of preference: later sources fill in acquisitions that "
    "earlier ones lack.",
)
recipe_option = click.option(
    "--recipe",
    "recipe_id",
    default="annual-median",
    show_default=True,
    help="Recipe of the composite (catalog/recipes.yaml).",
)
snapshots_option = click.option(
    "--scenes",
    "snapshots",
    type=click.Path(path_type=Path),
    help="Folder of scene lists. Existing lists are reused; missing ones are searched and saved. [default: <store>-scenes]",
)


class Years(click.ParamType[tuple[int, ...]]):
    """Years such as 2019-2023, or 2019,2021, or both."""

    name = "years"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Convert text to ascending years, each once."""
        if isinstance(value, tuple):
            return value
        years: set[int] = set()
        for part in str(value).split(","):
            match = re.fullmatch(r"\s*(\d{4})(?:\s*-\s*(\d{4}))?\s*", part)
            if not match or int(match.group(2) or match.group(1)) < int(match.group(1)):
                self.fail(f"{value!r}: expected years such as 2019-2023 or 2019,2021", param, ctx)
            years |= set(range(int(match.group(1)), int(match.group(2) or match.group(1)) + 1))
        return tuple(sorted(years))


years_option = click.option(
    "--years", type=Years(), required=True, help="Years: 2019-2023, or 2019,2021."
)


def choose_sites(wanted: SiteChoice, catalog: Path | None) -> list[Site]:
    """Choose sites by name, or all sites of a file.

    Raises CatalogError for names without a match.
    """
    if wanted.is_file():
        if not Path(wanted.text).exists():
            raise CatalogError(f"{wanted}: no such file; expected polygons of sites")
        return load_sites(wanted.text, layer=wanted.layer)
    _need_file(wanted)
    known = {s.id: s for s in load_sites()}
    if catalog and (catalog / "sites.geojson").exists():
        own = {s.id: s for s in load_sites(catalog / "sites.geojson", catalogue=True)}
        # The user's entry may replace a shipped site without geometry.
        unplaced = {n for n in own if n in known and known[n].geometry is None}
        _merge({n: s for n, s in known.items() if n not in unplaced}, own, catalog, "site")
        known |= own
    return [known[name] for name in matching(wanted.text, list(known), "the catalogue")]


def sites_with_margin(
    wanted: SiteChoice, catalog: Path | None, margin: float | None, store: cube.Store | None = None
) -> list[Site]:
    """Choose sites and print the margins of their grids.

    `margin` (--margin) applies to all sites. Without `margin`, sites in the store keep the margin
    of their cubes.

    Raises:
        CatalogError: as `choose_sites`.
        CubeError: the store cannot be read.
    """
    chosen = choose_sites(wanted, catalog)
    if margin is not None:
        chosen = [dataclasses.replace(site, margin=margin) for site in chosen]
    stored = (
        {site.id: cube.margin_of(store, site.id) for site in chosen}
        if store and margin is None
        else {}
    )
    kept = {name: found for name, found in stored.items() if found is not None}
    named: dict[str, list[str]] = {}
    for site in chosen:
        around = kept.get(site.id, site.margin)
        as_in = f", as in {store}" if around != site.margin else ""
        if around or as_in:
            named.setdefault(f"{around:g} m{as_in}", []).append(site.id)
    for text, names in named.items():
        others = f" and {len(names) - 3} others" if len(names) > 3 else ""
        click.echo(f"margin around {', '.join(names[:3])}{others}: {text}", err=True)
    return [dataclasses.replace(site, margin=kept.get(site.id, site.margin)) for site in chosen]


def _need_file(wanted: SiteChoice) -> None:
    if wanted.layer is not None:
        raise CatalogError(
            f"expected a file of sites with the layer {wanted.layer!r}, found --sites {wanted}; name the file"
        )


def stored_sites(
    store: cube.Store, wanted: SiteChoice, there: Sequence[str] | None = None
) -> list[str]:
    """Choose sites of a store by name, or by a file of sites. Returns their names.

    Args:
        store: the cubes.
        wanted: value of --sites.
        there: the sites to choose from, by default all in the store.

    Raises:
        CatalogError: a name has no match, or a site of the file is missing in the store.
        CubeError: the store cannot be read.
    """
    there = cube.sites(store) if there is None else there
    if not wanted.is_file():
        _need_file(wanted)
        return matching(wanted.text, there, str(store))
    names = [site.id for site in choose_sites(wanted, None)]
    lacking = [name for name in names if name not in there]
    if lacking:
        raise CatalogError(
            f"{store}: no site {lacking[0]!r} of {wanted}; it has {', '.join(sorted(there))}; build it first"
        )
    return names


def sources(catalog: Path | None) -> dict[str, Source]:
    """Load the shipped sources and the user's."""
    return _with_own(load_sources, catalog, "sources.yaml", "source")


def choose_sources(ids: str, catalog: Path | None) -> tuple[Source, ...]:
    """Choose sources in order of preference.

    Raises CatalogError for an unknown or repeated source.
    """
    known, names = sources(catalog), [name.strip() for name in ids.split(",")]
    if len(set(names)) < len(names):
        raise CatalogError(f"--source {ids}: expected each source once")
    return tuple(pick(known, name, "source") for name in names)


def scenes_folder(snapshots: Path | None, store: cube.Store) -> Path:
    """Return the folder of scene lists.

    By default it is next to the store, or in the current folder if the store is a URL.
    """
    name = store.name.rstrip("/")
    return snapshots or Path(f"{name.rpartition('/')[2] if '://' in name else name}-scenes")


def recipes(catalog: Path | None) -> dict[str, Recipe]:
    """Load the shipped recipes and the user's."""
    return _with_own(load_recipes, catalog, "recipes.yaml", "recipe")


def models(catalog: Path | None) -> dict[str, ModelCard]:
    """Load the shipped model cards and the user's."""
    return _with_own(load_models, catalog, "models.yaml", "model")


def presets(catalog: Path | None) -> dict[str, Settings]:
    """Load the shipped training settings and the user's."""
    return _with_own(load_presets, catalog, "presets.yaml", "preset")


def _with_own(
    load: Callable[..., dict[str, T]], catalog: Path | None, file: str, what: str
) -> dict[str, T]:
    known = load()
    if catalog and (catalog / file).exists():
        _merge(known, load(catalog / file), catalog, what)
    return known


def _merge(known: dict[str, T], own: dict[str, T], catalog: Path, what: str) -> None:
    twice = sorted(set(known) & set(own))
    if twice:
        raise CatalogError(
            f"{catalog}: {what} {twice[0]!r} is in the shipped catalogue already; give yours another id"
        )
    known.update(own)


def matching(wanted: str, names: Sequence[str], where: str) -> list[str]:
    """Choose the matching names. Raises CatalogError for a pattern without a match."""
    chosen: list[str] = []
    for pattern in (p.strip() for p in wanted.split(",")):
        found = [n for n in names if fnmatch.fnmatchcase(n, pattern)]
        if not found and not set(pattern) & set("*?["):
            found = same_names(pattern, names)
            if len(found) > 1:
                raise CatalogError(
                    f"site {pattern!r} may be {' or '.join(found)}; spell it as one of them"
                )
        if not found and Path(pattern).is_file():
            raise CatalogError(
                f"{pattern}: expected a site or a file with the suffix of its format; rename the file"
            )
        if not found:
            shown = ", ".join(list(names)[:8]) + (", ..." if len(names) > 8 else "") or "no site"
            raise CatalogError(f"unknown site {pattern!r}; {where} has {shown}")
        chosen += [n for n in found if n not in chosen]
    return chosen


def stored_prediction(store: cube.Store, names: Sequence[str], model: str) -> str:
    """Return the name of the prediction for --model at these sites.

    Prints the name if it differs from --model.
    """
    found = cube.find_prediction(store, names, model)
    if found != model:
        click.echo(f"--model {model}: using prediction {found}", err=True)
    return found


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """Show a progress bar on standard error, only in a terminal.

    Yields advance(n=1, note='', total=None).
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(
        *columns, console=console, disable=not console.is_terminal, transient=True
    ) as bar:
        task = bar.add_task(title, total=total, note="")

        def advance(n: int = 1, note: str = "", total: int | None = None) -> None:
            bar.update(task, advance=n, note=note, total=total)

        yield advance


@contextmanager
def executor_of(scheduler: str | None) -> Iterator[Executor | None]:
    """Yield the Dask scheduler's executor, or None for this machine.

    Raises CatalogError if no scheduler answers.
    """
    if scheduler is None:
        yield None
        return
    try:
        from distributed import Client  # an extra, for clusters only
    except ModuleNotFoundError as error:
        raise CatalogError(
            "--scheduler needs one package more: pip install 'minecube[cluster]'"
        ) from error
    for name in ("distributed", "distributed.client"):  # both print through their own handlers
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        # As the default, a client would receive all further work of this process with Dask. This
        # work would wait for ever for a scheduler that has ended.
        client = Client(scheduler, timeout=f"{_ANSWERS_S}s", set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:  # ValueError: invalid address
        raise CatalogError(
            f"no Dask scheduler answers at {scheduler} ({error}); start one with `dask scheduler`, which says its address, "
            "tcp://host:8786 or the like"
        ) from error
    with client:
        yield client.get_executor()  # type: ignore[no-untyped-call]


def as_ended(tasks: Iterable[Future[T]]) -> Iterator[Future[T]]:
    """Yield tasks as they end.

    Raises WorkerError for a cancelled task, since its scheduler is gone.
    """
    left = set(tasks)
    while left:
        # The timeout is for Ctrl-C: a signal to another thread does not wake this thread.
        ended, left = wait(left, timeout=_LISTENS_S, return_when=FIRST_COMPLETED)
        for task in ended:
            if task.cancelled():  # no code here cancels tasks, so the scheduler is gone
                raise WorkerError(failure_text(CancelledError()))
            yield task


def failure_text(error: BaseException) -> str:
    """Describe a task's failure in one line: the error's own text, `explain`, or type and text."""
    if isinstance(error, MinecubeError):
        return str(error)
    return explain(error) or f"{type(error).__name__}: {one_line(error)}"


def keep_memory() -> None:
    """Make this process keep its freed memory until its end, with glibc only.

    Network layers allocate the same megabytes repeatedly. By default, glibc returns them to the
    system each time, and the system clears them. Keeping them saves a tenth of the mapping time of
    some networks, for a tenth more memory.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # without glibc
        return
    trim_threshold, mmap_threshold = -1, -3  # constants of <malloc.h>
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**25)  # the upper limit of glibc's automatic threshold


def absolute(path: str) -> str:
    """Make a path absolute for workers in other folders. URLs stay unchanged."""
    return path if "://" in path else str(Path(path).absolute())


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a plain-text table for logs and terminals, with numbers aligned right."""
    text = [[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(headings), *text]) for i in range(len(headings))]
    right = [all(isinstance(r[i], int | float) for r in rows) for i in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)
        ).rstrip()

    return "\n".join([line(headings), line(["-" * w for w in widths]), *map(line, text)])
