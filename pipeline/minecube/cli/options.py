"""Options that several commands share, and the values that commands receive."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from minecube import cube
from minecube.catalog import LARGEST_MARGIN_M, MARGIN_M, Dataset, Site, load_dataset
from minecube.cli.parameters import SEED, FiniteRange, InFolder, Years
from minecube.jobs.selection import SiteChoice, choose_sites, stored_sites
from minecube.places import Place
from minecube.vectors import FORMAT_NAMES

F = TypeVar("F", bound=Callable[..., Any])

_LAYER = "minecube.layer"  # key in a click context; holds the layer for --sites


def collect_options(command: Callable[..., None]) -> Callable[..., None]:
    """Pass options to a command in the dataclasses of its parameters.

    A parameter named like an option receives the value of the option. Every other parameter has a
    dataclass as its type, and receives an instance. The options named like its fields fill them.

        @click.command()
        @catalog_sites_options
        @collect_options
        def sites(sites: SiteOptions) -> None: ...
    """
    types = typing.get_type_hints(command)

    @functools.wraps(command)
    def call(**options: Any) -> None:
        values: dict[str, Any] = {}
        for name in inspect.signature(command).parameters:
            if name in options:
                values[name] = options[name]
            else:
                fields = {field.name for field in dataclasses.fields(types[name])}
                values[name] = types[name](**{key: options[key] for key in fields & set(options)})
        command(**values)

    return call


@dataclass(frozen=True)
class SiteOptions:
    """Sites of the catalogue or of a file: --sites, --sites-layer, --margin and --catalog."""

    choice: SiteChoice
    margin: float | None = None
    """Metres of ground around each polygon; None: as the site or the store has it."""
    catalog: Place | None = None

    def load(self, store: cube.Store | None = None) -> list[Site]:
        """Choose the sites, and print the margins of their grids.

        Without --margin, sites in the store keep the margin of their cubes.

        Raises:
            CatalogError: as `choose_sites`.
            CubeError: the store cannot be read.
        """
        sites = choose_sites(self.choice, self.catalog)
        if self.margin is not None:
            sites = [dataclasses.replace(site, margin=self.margin) for site in sites]
        stored: dict[str, float] = {}
        if store and self.margin is None:
            for site in sites:
                margin = cube.read_margin(store, site.id)
                if margin is not None:
                    stored[site.id] = margin
        _print_margins(sites, stored, store)
        return [
            dataclasses.replace(site, margin=stored.get(site.id, site.margin)) for site in sites
        ]


def _print_margins(
    sites: Sequence[Site], stored: dict[str, float], store: cube.Store | None
) -> None:
    """Print each margin once, with the sites that have it."""
    names_by_margin: dict[str, list[str]] = {}
    for site in sites:
        margin = stored.get(site.id, site.margin)
        text = f"{margin:g} m"
        if margin != site.margin:
            text += f", as in {store}"
        if margin or margin != site.margin:
            names_by_margin.setdefault(text, []).append(site.id)
    for text, names in names_by_margin.items():
        listed = ", ".join(names[:3])
        if len(names) > 3:
            listed += f" and {len(names) - 3} others"
        click.echo(f"margin around {listed}: {text}", err=True)


@dataclass(frozen=True)
class StoreSites:
    """Sites of a store: --store, --sites and --sites-layer."""

    store: cube.Store
    choice: SiteChoice

    def names(self, choices: Sequence[str] | None = None) -> list[str]:
        """Choose from these sites, by default from all in the store.

        Raises as `stored_sites` does.
        """
        return stored_sites(self.store, self.choice, choices)

    def prediction(self, sites: Sequence[str], model: str) -> str:
        """Return the name of the prediction for --model at these sites.

        Prints the name if it differs from --model.
        """
        name = cube.find_prediction(self.store, sites, model)
        if name != model:
            click.echo(f"--model {model}: using prediction {name}", err=True)
        return name


def _check_store(_ctx: click.Context, _param: click.Parameter, name: str) -> cube.Store:
    return cube.Store.connect(name)


def _check_writable(_ctx: click.Context, _param: click.Parameter, name: str) -> cube.Store:
    return cube.Store.connect(name, writable=True)


def _keep_layer(ctx: click.Context, _param: click.Parameter, layer: str | None) -> None:
    ctx.meta[_LAYER] = layer


def add_layer(ctx: click.Context, _param: click.Parameter, text: str | None) -> SiteChoice | None:
    """Combine the words of --sites with the layer of --sites-layer.

    A callback of options for sites.
    """
    if text is None:
        return None
    return SiteChoice(text, ctx.meta.get(_LAYER))


def parse_dataset(
    _ctx: click.Context, _param: click.Parameter, path: Path | None
) -> Dataset | None:
    """Load the argument DATASET."""
    return None if path is None else load_dataset(path)


dataset_argument = click.argument(
    "dataset", type=click.Path(dir_okay=False, path_type=Path), callback=parse_dataset
)
store_option = click.option(
    "--store",
    required=True,
    callback=_check_store,
    help="Store of cubes: a folder, an object-store URL, or a packed store (.zip), which is "
    "read-only.",
)
writable_store_option = click.option(
    "--store",
    required=True,
    callback=_check_writable,
    help="Store of cubes: a folder or an object-store URL.",
)
scheduler_option = click.option(
    "--scheduler",
    help="Address of a Dask scheduler (tcp://host:8786). [default: run on this machine]",
)
_margin_option = click.option(
    "--margin",
    type=FiniteRange(min=0, max=LARGEST_MARGIN_M),
    help="Metres of ground around a site's polygon. A store keeps the margin of a site's first "
    f"build. [default: the site's `margin` field; without one, {MARGIN_M} for a file of "
    "polygons and 0 for sites of the catalogue]",
)
catalog_option = click.option(
    "--catalog",
    type=InFolder(),
    help="Folder with your own sites.geojson, sources.yaml, recipes.yaml, models.yaml or "
    "presets.yaml. Their entries are added to the shipped ones.",
)
years_option = click.option(
    "--years", type=Years(), required=True, help="Years: 2019-2023, or 2019,2021."
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, ..."
)
training_seed_option = click.option(
    "--seed",
    type=SEED,
    default=0,
    show_default=True,
    help="Seed of weights, windows and augmentation.",
)
layer_option = click.option(
    "--layer", help="Layer of the polygon file, if several layers have polygons. * is allowed."
)


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


def sites_option(command: F) -> F:
    """Add --sites, and --sites-layer for a file of sites."""
    return _sites_option(sites_layer_option("--sites-layer", "--layer")(command))


def catalog_sites_options(command: F) -> F:
    """Add the options of `SiteOptions`: --sites, --sites-layer, --margin and --catalog."""
    return sites_option(_margin_option(catalog_option(command)))


def sites_with_polygons_option(command: F) -> F:
    """Add --sites and --sites-layer. --layer remains for the command's polygons."""
    return _sites_option(sites_layer_option("--sites-layer")(command))


_sites_option = click.option(
    "--sites",
    "choice",
    default="*",
    show_default=True,
    callback=add_layer,
    help="Names of sites, comma-separated, * allowed. Or a file with one polygon per site "
    f"({FORMAT_NAMES}), by path or object-store URL.",
)
