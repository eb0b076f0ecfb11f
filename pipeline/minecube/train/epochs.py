"""Train a network epoch by epoch, and keep its state after each."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader

from minecube.catalog import TrainingSettings
from minecube.errors import ModelError
from minecube.models import compute_logits
from minecube.places import Place
from minecube.train.checkpoint import Epoch, write_log, write_state
from minecube.train.judge import compute_scores, count_pixels
from minecube.train.loss import compute_loss
from minecube.train.windows import Tiles, Windows, batches, count_steps

_OPTIMISERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
_WITH_STATE = ("network", "optimiser", "schedule")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Ways to compute and keep a training; only the seed affects the network."""

    seed: int = 0
    """Seed of the first weights, the windows and their augmentation."""
    device: str = "cpu"
    workers: int = 0
    """Processes cutting windows; 0: the training process."""
    checkpoint: Place | None = None
    """File for the state after each epoch. The log has the same name with suffix `.csv`."""
    resume: bool = False
    """Whether to resume from the checkpoint, if it exists."""
    progress: Callable[[int, int, str], None] | None = None
    """Called after each step with steps done, steps in total, and a note."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Fixed parts of a training."""

    windows: Windows
    tiles: Tiles | None
    """Windows of the validation sites, if any."""
    identity: dict[str, Any]
    """Values two runs must share to be one training; part of the checkpoint."""
    options: TrainingOptions

    @property
    def settings(self) -> TrainingSettings:
        """Settings of the training."""
        return self.windows.settings

    @property
    def years(self) -> tuple[int, ...]:
        """Years of a window; for a series the same everywhere."""
        return self.windows.survey.views[0][1]


@dataclass
class State:
    """Changing state of a training."""

    network: nn.Module
    optimiser: torch.optim.Optimizer
    schedule: LRScheduler
    history: list[Epoch] = field(default_factory=list)
    best: int = -1
    """Index of the best epoch in the history."""
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    ended: bool = False

    @classmethod
    def create(cls, network: nn.Module, settings: TrainingSettings, steps: int) -> State:
        """Return the state before the first of this number of steps."""
        optimiser = _OPTIMISERS[settings.optimiser](
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        schedule: LRScheduler = ConstantLR(optimiser, factor=1.0)
        if settings.schedule == "one-cycle":
            schedule = OneCycleLR(optimiser, settings.learning_rate, total_steps=steps)
        return cls(network, optimiser, schedule)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return next(self.network.parameters()).device

    def restore(self, content: dict[str, Any]) -> None:
        """Take over the content of a checkpoint."""
        for name in _WITH_STATE:
            getattr(self, name).load_state_dict(content[name])
        self.history = [Epoch(**fields) for fields in content["history"]]
        self.best = content["best"]
        self.best_weights = content["best_weights"]
        self.ended = content["ended"]

    def save(self, path: Place, identity: dict[str, Any]) -> None:
        """Write the checkpoint and the log."""
        content = {name: getattr(self, name).state_dict() for name in _WITH_STATE}
        content["best"] = self.best
        content["best_weights"] = self.best_weights
        content["ended"] = self.ended
        content["history"] = [dataclasses.asdict(epoch) for epoch in self.history]
        write_state(path, identity | content)
        write_log(path.with_suffix(".csv"), self.history)

    def choose_best(self, settings: TrainingSettings, by_f1: bool) -> None:
        """Note if the last epoch is the best so far, and if the training ends with it."""
        last = len(self.history) - 1
        if not by_f1 or self.best < 0 or self.history[last].f1 > self.history[self.best].f1:
            self.best = last
            if by_f1:  # otherwise the last weights are used
                self.best_weights = {
                    name: value.detach().cpu().clone()
                    for name, value in self.network.state_dict().items()
                }
        patience = settings.patience
        waited = patience is not None and by_f1 and last - self.best >= patience
        self.ended = waited or last + 1 == settings.epochs


def train_epochs(state: State, plan: Plan) -> None:
    """Train from the state's last epoch on, until the training ends.

    Raises:
        ModelError: The loss is not finite. The checkpoint cannot be written. No window of the
            validation sites has a pixel of a class.
    """
    windows = plan.windows
    rank, processes = process_share()
    network = state.network
    if processes > 1:
        # Some weights may have no gradient, but they are the same ones each step.
        network = nn.parallel.DistributedDataParallel(state.network, static_graph=True)
    start_epoch = len(state.history)
    keys = batches(len(windows), plan.settings, start_epoch, (rank, processes))
    stream = iter(_load(windows, plan, keys, state.device))
    judging = None
    if plan.tiles is not None:
        judging = _load(plan.tiles, plan, _share_tiles(plan.tiles, rank, processes), state.device)
    for epoch in range(start_epoch, plan.settings.epochs):
        # Dropout in an epoch depends only on these three. No other random state is kept.
        seeds = np.random.SeedSequence([windows.seed, epoch, rank])
        torch.manual_seed(int(seeds.generate_state(1, np.uint32)[0]))
        start = time.monotonic()
        loss, rate = _train_epoch(state, plan, network, stream, epoch)
        seconds = time.monotonic() - start
        counts = Tensor([0, 0, 0])
        if judging is not None:
            card = windows.card
            counts = count_pixels(state.network, judging, card, plan.settings, plan.years)
        state.history.append(
            Epoch(
                epoch=epoch + 1,
                loss=loss,
                **compute_scores(counts),
                learning_rate=rate,
                seconds=time.monotonic() - start,
                windows_per_s=max(len(windows), 2 * processes) / seconds,
            )
        )
        state.choose_best(plan.settings, judging is not None)
        if plan.options.checkpoint is not None and rank == 0:
            state.save(plan.options.checkpoint, plan.identity)
        if state.ended:
            return


def _train_epoch(
    state: State, plan: Plan, network: nn.Module, stream: Iterator[list[Tensor]], epoch: int
) -> tuple[float, float]:
    """Train one epoch; returns the mean loss and the last learning rate.

    `network` is the state's network, wrapped where several processes train it.
    """
    device = state.device
    steps = count_steps(len(plan.windows), plan.settings, process_share()[1])
    total = 0.0
    rate = math.nan
    network.train()
    for step in range(steps):
        batch = [part.to(device, non_blocking=True) for part in next(stream)]
        loss = train_step(network, state.optimiser, batch, plan.windows)
        if not math.isfinite(loss):
            raise _loss_error(plan, epoch, step, loss)
        rate = state.optimiser.param_groups[0]["lr"]
        state.schedule.step()
        total += loss
        if plan.options.progress is not None:
            note = f"epoch {epoch + 1}, loss {total / (step + 1):.3f}{_describe_best(state)}"
            plan.options.progress(epoch * steps + step + 1, plan.settings.epochs * steps, note)
    return total / steps, rate


def train_step(
    network: nn.Module, optimiser: torch.optim.Optimizer, batch: list[Tensor], windows: Windows
) -> float:
    """Train one step on a batch of images and targets, and return its loss."""
    image, targets = batch
    device = image.device.type
    with torch.autocast(device, torch.bfloat16, enabled=device in windows.settings.bf16):
        output = compute_logits(network, windows.card.task, image, windows.survey.views[0][1])
    loss = compute_loss(output, targets, windows.settings)
    value = loss.item()
    if math.isfinite(value):
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return value


def _loss_error(plan: Plan, epoch: int, step: int, loss: float) -> ModelError:
    windows = plan.windows
    epochs = batches(len(windows), plan.settings, epoch, (0, 1))
    keys = next(keys for number, keys in enumerate(epochs) if number == step)
    site_years: set[tuple[str, int]] = set()
    for key in keys:
        site, years = windows.position(*key).view
        site_years |= {(site, year) for year in years}
    listed = ", ".join(f"{site} {year}" for site, year in sorted(site_years))
    state = "nothing was kept"
    if plan.options.checkpoint and epoch:
        state = f"{plan.options.checkpoint} holds epoch {epoch}"
    return ModelError(
        f"model {windows.card.id}: the loss became {loss} in epoch {epoch + 1}, step {step + 1} "
        f"(windows of {listed}); {state}: look at the reflectance of these site-years, or try a "
        "lower learning_rate or another seed"
    )


def _load(dataset: Windows | Tiles, plan: Plan, keys: Any, device: torch.device) -> DataLoader[Any]:
    workers = plan.options.workers
    starts_fresh = workers > 0 and not dataset.source.forkable
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # a length and items are all it needs
        batch_sampler=keys,
        num_workers=workers,
        multiprocessing_context="spawn" if starts_fresh else None,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def _share_tiles(tiles: Tiles, rank: int, processes: int) -> list[list[int]]:
    """Split this process's share of the tiles into batches."""
    numbers = range(rank, len(tiles), processes)
    batch = tiles.settings.batch
    return [list(numbers[start : start + batch]) for start in range(0, len(numbers), batch)]


def process_share() -> tuple[int, int]:
    """Return this process's rank and the number of processes."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _describe_best(state: State) -> str:
    if state.best < 0 or math.isnan(state.history[state.best].f1):
        return ""
    return f", best F1 {state.history[state.best].f1:.3f}"
