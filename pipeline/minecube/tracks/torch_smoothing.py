"""Smooth as `smoothing` does, on a GPU in torch, equal to the last stored step.

Input and output are numpy. Each step is one operation of float32 with a unique rounding in IEEE
754. Operations keep their order and are never fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from minecube.device import device_of
from minecube.tracks.areas import UNKNOWN
from minecube.tracks.smoothing import (
    SCALE,
    Rates,
    UInt8,
    evidence,
    initial_odds,
    need_stored,
    steps_of,
)

STRIP_VALUES = 2**26
"""Values on the device at a time, at most 20 bytes each."""


class TorchSmoothing:
    """Both kernels on a device.

    Args:
        device: cuda, cuda:1, cpu, ...

    Raises:
        ModelError: torch does not know the device, or sees no such GPU.
    """

    def __init__(self, device: str) -> None:
        self.device = device_of(device)

    def posterior(self, values: UInt8, years: Sequence[int], rates: Rates) -> UInt8:
        """Compute `smoothing.posterior` on the device."""
        return self._in_strips(_posterior, values, years, rates)

    def viterbi(self, values: UInt8, years: Sequence[int], rates: Rates) -> UInt8:
        """Compute `smoothing.viterbi` on the device."""
        return self._in_strips(_viterbi, values, years, rates)

    def _in_strips(
        self,
        strip: Callable[[Tensor, list[list[float]], float], Tensor],
        values: UInt8,
        years: Sequence[int],
        rates: Rates,
    ) -> UInt8:
        table = torch.from_numpy(evidence(rates)).to(self.device)
        # float of a float32 is exact, and a float32 tensor takes scalars as float32 again.
        steps = [[float(a) for a in step] for step in steps_of(years, rates)]
        out = np.empty_like(values)
        for part in _strips(*values.shape):
            own = torch.from_numpy(np.ascontiguousarray(values[:, part])).to(self.device)
            need_stored(bool(((own > SCALE) & (own < int(UNKNOWN))).any()))
            found = strip(table[own.int()], steps, float(initial_odds(rates)))
            unknown = (own == int(UNKNOWN)).all(0)
            out[:, part] = torch.where(unknown, int(UNKNOWN), found.to(torch.uint8)).cpu().numpy()
        return out


def _strips(years: int, pixels: int) -> Iterator[slice]:
    step = max(STRIP_VALUES // years, 1)
    return (slice(at, at + step) for at in range(0, pixels, step))


def _posterior(likely: Tensor, steps: list[list[float]], start: float) -> Tensor:
    odds = torch.empty_like(likely)
    odds[0] = likely[0] * start
    for t, (a00, a01, a10, a11) in enumerate(steps, 1):
        before = odds[t - 1]
        odds[t] = likely[t] * ((before * a11 + a01) / (before * a10 + a00))
    back = torch.ones_like(odds[0])
    for t, (a00, a01, a10, a11) in zip(range(len(steps) - 1, -1, -1), reversed(steps), strict=True):
        ahead = likely[t + 1] * back
        back = (ahead * a11 + a10) / (ahead * a01 + a00)
        odds[t] *= back
    # Divide two tensors: torch computes number / tensor by a reciprocal and rounds twice.
    return (SCALE - torch.full_like(odds, SCALE) / (odds + 1)).round()


def _viterbi(likely: Tensor, steps: list[list[float]], start: float) -> Tensor:
    odds = torch.empty_like(likely)
    odds[0] = likely[0] * start
    for t, (a00, a01, a10, a11) in enumerate(steps, 1):
        before = odds[t - 1]
        odds[t] = likely[t] * ((before * a11).clamp(min=a01) / (before * a10).clamp(min=a00))
    path = torch.empty_like(odds, dtype=torch.bool)
    state = path[-1] = odds[-1] >= 1
    for t, (a00, a01, a10, a11) in zip(range(len(steps) - 1, -1, -1), reversed(steps), strict=True):
        state = path[t] = torch.where(state, odds[t] * a11 >= a01, odds[t] * a10 > a00)
    return path
