"""Train a network in plain torch, on one process or on several started by `torchrun`."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader

from minecube.catalog import ModelCard, Settings, as_dict
from minecube.device import device_of
from minecube.errors import ModelError
from minecube.models import Trained, build, logits
from minecube.train.checkpoint import Epoch, need_same, read_state, write_log, write_state
from minecube.train.judge import judged, scores_of
from minecube.train.loss import loss_of
from minecube.train.source import Source
from minecube.train.survey import survey
from minecube.train.windows import Tiles, Windows, batches, steps_of


@dataclass(frozen=True, kw_only=True)
class Run:
    """Ways to compute and keep a training; only the seed affects the network."""

    seed: int = 0
    """Seed of the first weights, the windows and their augmentation."""
    device: str = "cpu"
    workers: int = 0
    """Processes cutting windows; 0: the training process."""
    checkpoint: Path | None = None
    """File for the state after each epoch. The log has the same name with suffix `.csv`."""
    resume: bool = False
    """Whether to resume from the checkpoint, if it exists."""
    progress: Callable[[int, int, str], None] | None = None
    """Called after each step with steps done, steps in total, and a note."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Result of a training."""

    trained: Trained
    """Model with the weights of the best epoch."""
    best: Epoch
    """Epoch of the highest F1 on the validation sites, or the last epoch without any."""
    history: tuple[Epoch, ...]


@dataclass
class _State:
    """Changing state of a training."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    history: list[Epoch] = field(default_factory=list)
    best: int = -1
    """Index of the best epoch in the history."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    ended: bool = False


def fit(
    card: ModelCard, train: Source, valid: Source | None, settings: Settings, run: Run = Run()
) -> Fitted:
    """Train the card's network on all labelled and observed pixels of `train`.

    The same cubes, settings, seed and number of threads give the same network. Interruptions and
    the number of workers have no effect. Threads and GPUs split sums, so last bits differ between
    machines. Under `torchrun`, with an existing process group, each process learns from its share
    of every batch. Gradients are averaged. Batch normalisation uses a process's own share.

    Args:
        card: The network to train.
        train: Sites to learn from. Normalisation and the choice of windows use only these.
        valid: Validation sites. Their F1 selects the best epoch and stops training early. It is of
            all classes together, with counts pooled over windows, without unknown pixels. None: the
            last epoch is kept.
        settings: Settings as in `catalog/presets.yaml`.
        run: Device, checkpoint and other options.

    Raises:
        ModelError: The sites lack bands, labels, years or a class. Sites are in both sources. The
            window does not fit the card, or the network its task. The device is not available. The
            loss is not finite (the last epoch's checkpoint stays). The checkpoint is another
            training's. The checkpoint is of an interrupted training, without `resume`.
    """
    place = device_of(run.device)
    _check(card, settings, train, valid)
    surveyed = survey(train, card, settings)
    windows = Windows(train, card, settings, surveyed, run.seed)
    tiles = None
    if valid is not None:
        tiles = Tiles(
            valid, card, settings, survey(valid, card, settings), surveyed.mean, surveyed.std
        )
    asked = _asked(card, settings, run, windows, tiles)
    before = _resumed(run, asked)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(run.seed)
        network = build(card).to(place)
        _try(network, windows)
        state = _begun(
            network, settings, settings.epochs * steps_of(len(windows), settings, _share()[1])
        )
        if before:
            _restore(state, before)
        if not state.ended:
            _train(state, windows, tiles, run, asked)
    weights = {
        name: value.cpu()
        for name, value in (state.best_weights or state.network.state_dict()).items()
    }
    network = state.network.cpu()
    network.load_state_dict(weights)
    best, sites = state.history[state.best], tuple(sorted(map(str, train.sites)))
    how = {name: asked[name] for name in ("settings", "seed", "validation sites")} | {
        "epoch": int(best.epoch)
    }
    if valid is not None:
        how |= {"validation F1": float(best.f1), "validation IoU": float(best.iou)}
    trained = Trained(
        card=card,
        network=network.eval(),
        mean=surveyed.mean,
        std=surveyed.std,
        sites=sites,
        training=how,
    )
    return Fitted(trained=trained, best=best, history=tuple(state.history))


def _check(card: ModelCard, settings: Settings, train: Source, valid: Source | None) -> None:
    size = settings.window_px or card.window_px
    if size % card.multiple_px:
        raise ModelError(
            f"model {card.id}: expected window_px in multiples of {card.multiple_px} px, found {size} in settings "
            f"{settings.id}; the network halves windows that often; set another window_px"
        )
    if card.task == "series" and valid is not None:
        learnt, other = train.years_of(train.sites[0]), valid.years_of(valid.sites[0])
        if len(learnt) != len(other):
            raise ModelError(
                f"model {card.id} sees all years at once, so expected as many of the validation sites as of the training sites "
                f"({len(learnt)}), found {len(other)} at {valid.sites[0]}; name sites or years that agree"
            )
    both = sorted(set(train.sites) & set(valid.sites)) if valid is not None else []
    if both:
        raise ModelError(
            f"expected training and validation sites apart, found {', '.join(both)} in both; a score on ground that was learnt "
            "from says nothing of other ground: split by site"
        )


def _try(network: nn.Module, windows: Windows) -> None:
    """Check the network's input and output on windows of its card's task."""
    card, view, side = windows.card, windows.survey.views[0][1], windows.size
    given = torch.zeros(
        1, len(view), len(card.bands), side, side, device=next(network.parameters()).device
    )
    wanted = (1, len(view) if card.task == "series" else 1, len(card.classes), side, side)
    try:
        with torch.inference_mode():
            found = tuple(logits(network.eval(), card.task, given, view).shape)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ModelError(
            f"model {card.id}: {card.architecture} cannot be applied to windows of the task {card.task}, {tuple(given.shape)} "
            f"({error}); correct the card's task, options or multiple_px"
        ) from error
    if found != wanted:
        raise ModelError(
            f"model {card.id}: expected logits {wanted} of windows {tuple(given.shape)}, found {found} of {card.architecture}; "
            "correct the card's task, options or multiple_px"
        )


def _asked(
    card: ModelCard, settings: Settings, run: Run, windows: Windows, tiles: Tiles | None
) -> dict[str, Any]:
    """Collect the values two runs must share to be one training."""
    numbers = zip(card.bands, windows.survey.mean, windows.survey.std, strict=True)
    surveys = {"training": windows.survey} | ({"validation": tiles.survey} if tiles else {})
    for_people = {"title", "paper", "licence", "source", "trained_on", "scores"}
    return {
        "card": {name: value for name, value in as_dict(card).items() if name not in for_people},
        "settings": {
            name: value for name, value in as_dict(settings).items() if name not in for_people
        },
        "seed": run.seed,
        "training sites": sorted(windows.source.sites),
        "validation sites": sorted(tiles.source.sites) if tiles else [],
        "normalisation": {band: [mean, std] for band, mean, std in numbers},
        "pixels": {
            f"{name} labels": [found.pixels, *found.positive] for name, found in surveys.items()
        },
    }


def _resumed(run: Run, asked: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state to resume from, if any.

    Raises:
        ModelError: The state is another training's, or would be lost.
    """
    if run.checkpoint is None or not run.checkpoint.exists():
        return None
    state = read_state(run.checkpoint)
    if run.resume:
        need_same(run.checkpoint, state, asked)
        return state
    if not state["ended"]:
        raise ModelError(
            f"{run.checkpoint}: is the state of a training that was interrupted after epoch {len(state['history'])}; it would "
            "be lost: go on with --resume, or remove it to train afresh"
        )
    return None


def _begun(network: nn.Module, settings: Settings, steps: int) -> _State:
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.optimiser]
    optimiser = kind(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    if settings.schedule == "one-cycle":
        return _State(
            network,
            optimiser,
            torch.optim.lr_scheduler.OneCycleLR(
                optimiser, settings.learning_rate, total_steps=steps
            ),
        )
    return _State(network, optimiser, torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0))


def _restore(state: _State, kept: dict[str, Any]) -> None:
    for name in ("network", "optimiser", "schedule"):
        getattr(state, name).load_state_dict(kept[name])
    state.history = [Epoch(**fields) for fields in kept["history"]]
    state.best, state.best_weights, state.ended = kept["best"], kept["best_weights"], kept["ended"]


def _keep(state: _State, path: Path, asked: dict[str, Any]) -> None:
    content = {
        name: getattr(state, name).state_dict() for name in ("network", "optimiser", "schedule")
    }
    content |= {name: getattr(state, name) for name in ("best", "best_weights", "ended")}
    write_state(
        path, asked | content | {"history": [dataclasses.asdict(epoch) for epoch in state.history]}
    )
    write_log(path.with_suffix(".csv"), state.history)


def _train(
    state: _State, windows: Windows, tiles: Tiles | None, run: Run, asked: dict[str, Any]
) -> None:
    settings, (rank, processes) = windows.settings, _share()
    place = next(state.network.parameters()).device
    # Some weights may have no gradient, but they are the same ones each step.
    network = (
        nn.parallel.DistributedDataParallel(state.network, static_graph=True)
        if processes > 1
        else state.network
    )
    begun = len(state.history)
    stream = iter(_loader(windows, run, batches(len(windows), settings, begun, (rank, processes))))
    judging = (
        None
        if tiles is None
        else _loader(tiles, run, _shared_out(tiles, settings, rank, processes))
    )
    for epoch in range(begun, settings.epochs):
        # Dropout in an epoch depends only on these three. No other random state is kept.
        torch.manual_seed(
            int(np.random.SeedSequence([run.seed, epoch, rank]).generate_state(1, np.uint32)[0])
        )
        start, steps = time.monotonic(), steps_of(len(windows), settings, processes)
        total = 0.0
        network.train()
        for step in range(steps):
            loss = _step(
                network,
                state.optimiser,
                [part.to(place, non_blocking=True) for part in next(stream)],
                windows,
            )
            if not math.isfinite(loss):
                raise _no_number(windows, epoch, step, loss, run.checkpoint)
            rate = state.optimiser.param_groups[0]["lr"]
            state.schedule.step()
            total += loss
            if run.progress is not None:
                done = epoch * steps + step + 1
                run.progress(
                    done,
                    settings.epochs * steps,
                    f"epoch {epoch + 1}, loss {total / (step + 1):.3f}{_shown(state)}",
                )
        took = time.monotonic() - start
        counts = Tensor([0, 0, 0])
        if judging is not None and tiles is not None:
            counts = judged(
                state.network, judging, windows.card, settings, tiles.survey.views[0][1]
            )
        scores = scores_of(counts)
        state.history.append(
            Epoch(
                epoch=epoch + 1,
                loss=total / steps,
                **scores,
                learning_rate=rate,
                seconds=time.monotonic() - start,
                windows_per_s=max(len(windows), 2 * processes) / took,
            )
        )
        _choose(state, settings, judging is not None)
        if run.checkpoint is not None and rank == 0:
            _keep(state, run.checkpoint, asked)
        if state.ended:
            return


def _step(
    network: nn.Module, optimiser: torch.optim.Optimizer, item: list[Tensor], windows: Windows
) -> float:
    """Train one step on a batch and return its loss."""
    image, wanted = item
    with torch.autocast(
        image.device.type, torch.bfloat16, enabled=image.device.type in windows.settings.bf16
    ):
        found = logits(network, windows.card.task, image, windows.survey.views[0][1])
    loss = loss_of(found, wanted, windows.settings)
    value = loss.item()
    if math.isfinite(value):
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return value


def _no_number(
    windows: Windows, epoch: int, step: int, loss: float, checkpoint: Path | None
) -> ModelError:
    keys = next(
        keys
        for n, keys in enumerate(batches(len(windows), windows.settings, epoch, (0, 1)))
        if n == step
    )
    seen = {
        (site, year) for site, years in (windows.place(*key).view for key in keys) for year in years
    }
    where = ", ".join(f"{site} {year}" for site, year in sorted(seen))
    kept = f"{checkpoint} holds epoch {epoch}" if checkpoint and epoch else "nothing was kept"
    return ModelError(
        f"model {windows.card.id}: the loss became {loss} in epoch {epoch + 1}, step {step + 1} (windows of {where}); {kept}: "
        "look at the reflectance of these site-years, or try a lower learning_rate or another seed"
    )


def _choose(state: _State, settings: Settings, by_f1: bool) -> None:
    """Note if the epoch is the best so far, and if it is the last."""
    last = len(state.history) - 1
    if not by_f1 or state.best < 0 or state.history[last].f1 > state.history[state.best].f1:
        state.best = last
        if by_f1:  # otherwise the last weights are used
            state.best_weights = {
                name: value.detach().cpu().clone()
                for name, value in state.network.state_dict().items()
            }
    waited = settings.patience is not None and by_f1 and last - state.best >= settings.patience
    state.ended = waited or last + 1 == settings.epochs


def _loader(data: Windows | Tiles, run: Run, keys: Any) -> DataLoader[Any]:
    return DataLoader(
        data,  # type: ignore[arg-type]  # a length and items are all it needs
        batch_sampler=keys,
        num_workers=run.workers,
        multiprocessing_context=None if run.workers == 0 or data.source.forkable else "spawn",
        persistent_workers=run.workers > 0,
        pin_memory=torch.device(run.device).type == "cuda",
    )


def _shared_out(tiles: Tiles, settings: Settings, rank: int, processes: int) -> list[list[int]]:
    own = range(rank, len(tiles), processes)
    return [list(own[at : at + settings.batch]) for at in range(0, len(own), settings.batch)]


def _share() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _shown(state: _State) -> str:
    if state.best < 0 or math.isnan(state.history[state.best].f1):
        return ""
    return f", best F1 {state.history[state.best].f1:.3f}"
