"""Training: a network from labelled cubes."""

from __future__ import annotations

from pathlib import Path

import click

from minecube import cube, models
from minecube import train as training
from minecube.catalog import pick
from minecube.cli import common
from minecube.cli.common import catalog_option, progress_bar, sites_option, store_option, stored_sites


@click.command()
@store_option
@sites_option
@catalog_option
@click.option("--model", "model_id", default="unet-small", show_default=True, help="Which network (catalog/models.yaml).")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File for the trained model.")
@click.option("--epochs", type=click.IntRange(min=1), default=30, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of weights, windows and augmentation: the same gives the same.")
def train(store: str, wanted: str, catalog: Path | None, model_id: str, out: Path, epochs: int, seed: int) -> None:
    """Train a network on all labelled site-years of the chosen cubes.

    Split by site: never train on a site that will be scored.

    \b
    Example:
      minecube train --store cubes.zarr --sites 'Germany_*' --out model.pt
    """
    card = pick(common.models(catalog), model_id, "model")
    cubes = {name: cube.open_committed(store, name).load() for name in stored_sites(store, wanted)}
    with progress_bar("training", epochs) as advance:
        trained = training.fit(cubes, card, epochs=epochs, seed=seed, progress=lambda _, loss: advance(note=f"loss {loss:.3f}"))
    models.save(trained, out)
    click.echo(f"{out}: {card.id} trained on {', '.join(cubes)}")
