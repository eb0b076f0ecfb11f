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
from minecube.cli import EXTRAS, common
from minecube.cli.common import catalog_option, table

json_option = click.option("--json", "as_json", is_flag=True, help="The same as JSON.")


@click.group(invoke_without_command=True)
@catalog_option
@json_option
@click.pass_context
def models(ctx: click.Context, catalog: Path | None, as_json: bool) -> None:
    """List the networks, or show the card of one (`models show NAME`).

    \b
    Examples:
      minecube models
      minecube models show segformer-b2
    """
    if ctx.invoked_subcommand:
        return
    cards = common.models(catalog).values()
    if as_json:
        click.echo(json.dumps([as_dict(card) for card in cards], indent=2))
        return
    rows = [
        (
            c.id,
            c.task,
            c.architecture,
            ",".join(c.classes),
            f"{c.window_px} px",
            "yes" if c.weights else "no",
            _paper(c),
        )
        for c in cards
    ]
    click.echo(
        table(("name", "task", "architecture", "classes", "window", "weights", "paper"), rows)
    )


@models.command()
@click.argument("name")
@catalog_option
@json_option
@click.pass_context
def show(ctx: click.Context, name: str, catalog: Path | None, as_json: bool) -> None:
    """Show the card of a network, or of a trained model's file, with the number of parameters.

    \b
    Example:
      minecube models show segformer-b2
      minecube models show model.pt
    """
    before = ctx.parent.params if ctx.parent else {}
    if Path(name).is_file():
        card, trained = _trained(Path(name))
    else:
        card, trained = pick(common.models(catalog or before.get("catalog")), name, "model"), {}
    parameters = _parameters(card)
    if as_json or before.get("as_json"):
        click.echo(json.dumps({**as_dict(card), **trained, "parameters": parameters}, indent=2))
        return
    fields = as_dict(card) | trained
    weights, scores = fields.pop("weights") or {}, fields.pop("scores")
    if not weights:
        del fields["licence"]  # it is the licence of the weights
    lines = {key.replace("_", " "): _text(value) for key, value in fields.items()}
    lines |= {f"weights: {key}": _text(value) for key, value in weights.items()}
    if not weights and not trained:
        lines["weights"] = "none yet: `minecube train`"
    lines |= {f"score: {key}": _text(value) for key, value in scores.items()}
    lines["parameters"] = (
        f"{parameters:,}" if parameters else "not counted: pip install 'minecube[models]'"
    )
    lines = {key: text for key, text in lines.items() if text}
    width = max(map(len, lines))
    click.echo("\n".join(f"{key.ljust(width)}  {text}" for key, text in lines.items()))


def _trained(file: Path) -> tuple[ModelCard, dict[str, Any]]:
    """Return the card in a file of `minecube train`, and details of the training."""
    found = importlib.import_module("minecube.models.network").load(file)
    numbers = {name: [round(v, 1) for v in getattr(found, name)] for name in ("mean", "std")}
    return found.card, {"trained_on": list(found.sites), **numbers, **found.training}


def _paper(card: ModelCard) -> str:
    """Return the first citation, the paper of the network itself."""
    return card.paper.partition(";")[0]


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _parameters(card: ModelCard) -> int | None:
    """Count the trainable parameters. Returns None if the network's libraries are missing."""
    try:
        network = importlib.import_module("minecube.models.network")
        return int(network.parameters(card))
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        return None
