"""Train a network in plain torch, on one process or on several started by `torchrun`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from minecube.catalog import ModelCard, TrainingSettings, as_dict
from minecube.device import find_device
from minecube.errors import ModelError
from minecube.models import TrainedModel, build, compute_logits
from minecube.train.checkpoint import Epoch, need_same, read_state
from minecube.train.epochs import Plan, State, TrainingOptions, process_share, train_epochs
from minecube.train.source import WindowSource
from minecube.train.statistics import survey_source
from minecube.train.windows import Tiles, Windows, count_steps

_FOR_PEOPLE = {"title", "paper", "licence", "source", "trained_on", "scores"}
"""Fields of cards and settings without effect on a training."""
_DEFAULT_OPTIONS = TrainingOptions()


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a training."""

    trained: TrainedModel
    """Model with the weights of the best epoch."""
    best: Epoch
    """Epoch of the highest F1 on the validation sites, or the last epoch without any."""
    history: tuple[Epoch, ...]


def fit(
    card: ModelCard,
    train: WindowSource,
    valid: WindowSource | None,
    settings: TrainingSettings,
    run: TrainingOptions = _DEFAULT_OPTIONS,
) -> TrainingResult:
    """Train the card's network on all labelled and observed pixels of `train`.

    The same cubes, settings, seed and number of threads give the same network. Interruptions and
    the number of workers have no effect. Threads and GPUs split sums, so last bits differ between
    machines. Under `torchrun`, with an existing process group, each process learns from its share
    of every batch. Gradients are averaged. Batch normalisation uses a process's own share.

    Normalisation and the choice of windows use only `train`. The F1 of the sites in `valid` selects
    the best epoch and stops training early. It is of all classes together, with counts pooled over
    windows, without unknown pixels. Without `valid`, the last epoch is kept.

    Raises:
        ModelError: The sites lack bands, labels, years or a class. Sites are in both sources. The
            window does not fit the card, or the network its task. The device is not available. The
            loss is not finite (the last epoch's checkpoint stays). The checkpoint is another
            training's. The checkpoint is of an interrupted training, without `resume`.
    """
    device = find_device(run.device)
    _check_sources(card, settings, train, valid)
    surveyed = survey_source(train, card, settings)
    windows = Windows(train, card, settings, surveyed, run.seed)
    tiles = None
    if valid is not None:
        of_valid = survey_source(valid, card, settings)
        tiles = Tiles(valid, card, settings, of_valid, surveyed.mean, surveyed.std)
    identity = _identify(windows, tiles, run.seed)
    plan = Plan(windows=windows, tiles=tiles, identity=identity, options=run)
    content = _read_checkpoint(run, identity)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(run.seed)
        network = build(card).to(device)
        _check_network(network, windows)
        steps = settings.epochs * count_steps(len(windows), settings, process_share()[1])
        state = State.create(network, settings, steps)
        if content:
            state.restore(content)
        if not state.ended:
            train_epochs(state, plan)
    return _finish(state, plan)


def _finish(state: State, plan: Plan) -> TrainingResult:
    """Return the model of the best epoch, and the history of the training."""
    best = state.history[state.best]
    weights = state.best_weights or state.network.state_dict()
    weights = {name: value.cpu() for name, value in weights.items()}
    network = state.network.cpu()
    network.load_state_dict(weights)
    training = {name: plan.identity[name] for name in ("settings", "seed", "validation sites")}
    training["epoch"] = int(best.epoch)
    if plan.tiles is not None:
        training |= {"validation F1": float(best.f1), "validation IoU": float(best.iou)}
    windows = plan.windows
    trained = TrainedModel(
        card=windows.card,
        network=network.eval(),
        mean=windows.survey.mean,
        std=windows.survey.std,
        sites=tuple(sorted(map(str, windows.source.sites))),
        training=training,
    )
    return TrainingResult(trained=trained, best=best, history=tuple(state.history))


def _check_sources(
    card: ModelCard, settings: TrainingSettings, train: WindowSource, valid: WindowSource | None
) -> None:
    size = settings.window_px or card.window_px
    if size % card.multiple_px:
        raise ModelError(
            f"model {card.id}: expected window_px in multiples of {card.multiple_px} px, found "
            f"{size} in settings {settings.id}; the network halves windows that often; set another "
            "window_px"
        )
    if valid is None:
        return
    if card.task == "series":
        length = len(train.years_of(train.sites[0]))
        valid_length = len(valid.years_of(valid.sites[0]))
        if valid_length != length:
            raise ModelError(
                f"model {card.id} sees all years at once, so expected as many of the validation "
                f"sites as of the training sites ({length}), found {valid_length} at "
                f"{valid.sites[0]}; name sites or years that agree"
            )
    common = sorted(set(train.sites) & set(valid.sites))
    if common:
        raise ModelError(
            f"expected training and validation sites apart, found {', '.join(common)} in both; a "
            "score on ground that was learnt from says nothing of other ground: split by site"
        )


def _check_network(network: nn.Module, windows: Windows) -> None:
    """Check the network's input and output on windows of its card's task."""
    card = windows.card
    years = windows.survey.views[0][1]
    dates = len(years) if card.task == "series" else 1
    device = next(network.parameters()).device
    window = torch.zeros(1, len(years), len(card.bands), windows.size, windows.size, device=device)
    expected = (1, dates, len(card.classes), windows.size, windows.size)
    try:
        with torch.inference_mode():
            shape = tuple(compute_logits(network.eval(), card.task, window, years).shape)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"model {card.id}: {card.architecture} cannot be applied to windows of the task "
            f"{card.task}, {tuple(window.shape)} ({error}); correct the card's task, options or "
            "multiple_px"
        ) from error
    if shape != expected:
        raise ModelError(
            f"model {card.id}: expected logits of shape {expected} for windows of shape "
            f"{tuple(window.shape)}, found {shape} from {card.architecture}; correct the card's "
            "task, options or multiple_px"
        )


def _identify(windows: Windows, tiles: Tiles | None, seed: int) -> dict[str, Any]:
    """Collect the values two runs must share to be one training."""
    card = windows.card
    numbers = zip(card.bands, windows.survey.mean, windows.survey.std, strict=True)
    surveys = {"training labels": windows.survey}
    validation_sites: list[str] = []
    if tiles is not None:
        surveys["validation labels"] = tiles.survey
        validation_sites = sorted(tiles.source.sites)
    return {
        "card": _without_texts(as_dict(card)),
        "settings": _without_texts(as_dict(windows.settings)),
        "seed": seed,
        "training sites": sorted(windows.source.sites),
        "validation sites": validation_sites,
        "normalisation": {band: [mean, std] for band, mean, std in numbers},
        "pixels": {
            name: [surveyed.pixels, *surveyed.positive] for name, surveyed in surveys.items()
        },
    }


def _without_texts(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _FOR_PEOPLE}


def _read_checkpoint(run: TrainingOptions, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state to resume from, if any; raise ModelError if it would be mixed or lost."""
    if run.checkpoint is None or not run.checkpoint.exists():
        return None
    content = read_state(run.checkpoint)
    if run.resume:
        need_same(run.checkpoint, content, identity)
        return content
    if not content["ended"]:
        raise ModelError(
            f"{run.checkpoint}: is the state of a training that was interrupted after epoch "
            f"{len(content['history'])}; it would be lost: go on with --resume, or remove it to "
            "train afresh"
        )
    return None
