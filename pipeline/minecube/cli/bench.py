"""Subcommand bench: train, apply and score networks on one split, and write two tables."""

from __future__ import annotations

from dataclasses import dataclass

import click

from minecube import cube, models
from minecube.catalog import ModelCard, TrainingSettings, pick
from minecube.cli.bars import print_line, progress_bar
from minecube.cli.options import (
    add_layer,
    catalog_option,
    collect_options,
    device_option,
    sites_layer_option,
    training_seed_option,
    writable_store_option,
)
from minecube.cli.parameters import OutFolder
from minecube.jobs.bench import Benchmark, Split, choose_models, run_benchmark, split_sites
from minecube.jobs.catalogs import load_all_models, load_all_presets
from minecube.jobs.selection import SiteChoice
from minecube.places import Place


@dataclass(frozen=True)
class SplitOptions:
    """Store and sites of each part: --store, --train, --valid and --test."""

    store: cube.Store
    train_sites: SiteChoice
    valid_sites: SiteChoice
    test_sites: SiteChoice

    def load(self) -> Split:
        """Choose the sites of each part."""
        return split_sites(self.store, self.train_sites, self.valid_sites, self.test_sites)


@dataclass(frozen=True)
class NetworksOptions:
    """Networks and training settings: --models, --preset and --catalog."""

    patterns: str
    preset_id: str
    catalog: Place | None

    def cards(self) -> tuple[ModelCard, ...]:
        """Return the cards of the networks."""
        return choose_models(load_all_models(self.catalog), self.patterns)

    def settings(self) -> TrainingSettings:
        """Return the settings of each training."""
        return pick(load_all_presets(self.catalog), self.preset_id, "preset")


@click.command()
@writable_store_option
@click.option(
    "--train",
    "train_sites",
    required=True,
    callback=add_layer,
    help="Training sites: names, comma-separated, * allowed; or a file of polygons.",
)
@click.option(
    "--valid",
    "valid_sites",
    required=True,
    callback=add_layer,
    help="Validation sites, named like --train. Their F1 chooses the best epoch.",
)
@click.option(
    "--test",
    "test_sites",
    required=True,
    callback=add_layer,
    help="Test sites, named like --train. They are mapped and scored, and never trained on.",
)
@sites_layer_option("--sites-layer", "--layer")
@catalog_option
@click.option(
    "--models",
    "patterns",
    default="*-small",
    show_default=True,
    help="Names of networks, comma-separated, * allowed.",
)
@click.option(
    "--preset",
    "preset_id",
    default="cpu",
    show_default=True,
    help="Training settings (catalog/presets.yaml).",
)
@training_seed_option
@device_option
@click.option("--out", type=OutFolder(), required=True, help="Folder for models and tables.")
@collect_options
def bench(
    split: SplitOptions, networks: NetworksOptions, seed: int, device: str, out: Place
) -> None:
    """Train, apply and score several networks on one split, and tabulate their scores.

    Networks that map footprints are scored twice: their maps, and the maps smoothed through time
    (NAME+hmm). Trivial baselines are scored, too. An interrupted run resumes when you run it again.

    \b
    Example:
      minecube bench --store cubes.zarr --train 'train_*' --valid 'valid_*' --test 'test_*' --out bench
    """
    benchmark = Benchmark(
        store=split.store,
        split=split.load(),
        cards=networks.cards(),
        settings=networks.settings(),
        seed=seed,
        compute=models.Compute(device=device),
        folder=out,
    )

    def print_model(number: int, card: ModelCard) -> None:
        print_line(f"{number} of {len(benchmark.cards)}: {card.id}")

    with progress_bar("preparing") as bar:
        paths = run_benchmark(benchmark, print_model, bar.reach_step)
    for path in paths:
        click.echo(path)
    click.echo("\n" + (out / "mapping.md").read_bytes().decode("utf-8"))
    click.echo((out / "change.md").read_bytes().decode("utf-8"))
