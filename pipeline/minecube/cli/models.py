"""Subcommand models: list the networks.

Works without PyTorch. With PyTorch, `show` counts the parameters.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import click

from minecube.catalog import ModelCard, as_dict, pick
from minecube.cli.extras import EXTRAS
from minecube.cli.options import catalog_option
from minecube.jobs.catalogs import load_all_models
from minecube.jobs.tables import format_table
from minecube.places import Place, place_of

json_option = click.option("--json", "as_json", is_flag=True, help="The same as JSON.")


@click.group(invoke_without_command=True)
@catalog_option
@json_option
@click.pass_context
def models(ctx: click.Context, catalog: Place | None, as_json: bool) -> None:
    """List the networks, or show the card of one (`models show NAME`).

    \b
    Examples:
      minecube models
      minecube models show segformer-b2
    """
    if ctx.invoked_subcommand:
        return
    cards = load_all_models(catalog).values()
    if as_json:
        click.echo(json.dumps([as_dict(card) for card in cards], indent=2))
        return
    columns = ("name", "task", "architecture", "classes", "window", "weights", "paper")
    click.echo(format_table(columns, [_summarise(card) for card in cards]))


@models.command()
@click.argument("name")
@catalog_option
@json_option
@click.pass_context
def show(ctx: click.Context, name: str, catalog: Place | None, as_json: bool) -> None:
    """Show the card of a network, or of a trained model's file, with the number of parameters.

    \b
    Example:
      minecube models show segformer-b2
      minecube models show model.pt
    """
    options: dict[str, Any] = {}  # of `minecube models`, before `show`
    if ctx.parent:
        options = ctx.parent.params
    training: dict[str, Any] = {}
    if "://" in name or Path(name).is_file():
        card, training = _read_trained(place_of(name))
    else:
        card = pick(load_all_models(catalog or options.get("catalog")), name, "model")
    parameters = _count_parameters(card)
    if as_json or options.get("as_json"):
        click.echo(json.dumps({**as_dict(card), **training, "parameters": parameters}, indent=2))
        return
    lines = _describe(card, training)
    lines["parameters"] = "not counted: pip install 'minecube[models]'"
    if parameters:
        lines["parameters"] = f"{parameters:,}"
    width = max(map(len, lines))
    click.echo("\n".join(f"{key.ljust(width)}  {text}" for key, text in lines.items()))


def _summarise(card: ModelCard) -> tuple[str, ...]:
    """Return the row of a network in the list."""
    weights = "no"
    if card.weights:
        weights = "yes"
    paper = card.paper.partition(";")[0]  # of the network itself
    classes = ",".join(card.classes)
    window = f"{card.window_px} px"
    return (card.id, card.task, card.architecture, classes, window, weights, paper)


def _describe(card: ModelCard, training: dict[str, Any]) -> dict[str, str]:
    """Return the fields of a card as text, without empty fields."""
    fields = as_dict(card) | training
    weights = fields.pop("weights") or {}
    scores = fields.pop("scores")
    if not weights:
        del fields["licence"]  # it is the licence of the weights
    lines = {key.replace("_", " "): _format_value(value) for key, value in fields.items()}
    lines |= {f"weights: {key}": _format_value(value) for key, value in weights.items()}
    if not weights and not training:
        lines["weights"] = "none yet: `minecube train`"
    lines |= {f"score: {key}": _format_value(value) for key, value in scores.items()}
    return {key: text for key, text in lines.items() if text}


def _format_value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(str, value))
    return str(value)


def _read_trained(file: Place) -> tuple[ModelCard, dict[str, Any]]:
    """Return the card in a file of `minecube train`, and details of the training."""
    trained = importlib.import_module("minecube.models.network").load(file)
    details = {
        "trained_on": list(trained.sites),
        "mean": [round(value, 1) for value in trained.mean],
        "std": [round(value, 1) for value in trained.std],
    }
    return trained.card, {**details, **trained.training}


def _count_parameters(card: ModelCard) -> int | None:
    """Count the trainable parameters. Returns None if the network's libraries are missing."""
    try:
        network = importlib.import_module("minecube.models.network")
        return int(network.count_parameters(card))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return None
