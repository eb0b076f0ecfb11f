"""The smoothing of `smoothing` on a GPU, in torch: numpy in, numpy out, the same; whole numbers are added and compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from minecube.device import device_of
from minecube.tracks.smoothing import FAR, NEVER, Rates, UInt8, log_odds, stored

STRIP_VALUES = 2**26
"""Values that are on the device at a time; at most 32 bytes each."""


class TorchSmoothing:
    """The kernel on a device.

    Args:
        device: cuda, cuda:1, cpu, ...

    Raises:
        ModelError: torch does not know the device, or sees no such GPU.
    """

    def __init__(self, device: str) -> None:
        self.device = device_of(device)

    def best_stories(self, values: UInt8, rates: Rates) -> UInt8:
        """As `smoothing.best_stories`."""
        table, back = (torch.from_numpy(made).to(self.device) for made in (log_odds(), stored()))
        out = np.empty_like(values)
        step = max(STRIP_VALUES // len(values), 1)
        for at in range(0, values.shape[1], step):
            own = torch.from_numpy(np.ascontiguousarray(values[:, at : at + step])).to(self.device)
            out[:, at : at + step] = back[_max_marginals(table[own.int()], rates.charge)].cpu().numpy()
        return out


def _max_marginals(odds: Tensor, charge: int) -> Tensor:
    always = odds.cumsum(0, dtype=torch.int32)
    out, mine = torch.full_like(odds, NEVER), torch.full_like(odds, NEVER)
    for t in range(1, len(odds)):
        out[t] = torch.maximum(out[t - 1], torch.maximum(always[t - 1], mine[t - 1] + charge))
        mine[t] = odds[t] + torch.maximum(mine[t - 1], (out[t - 1] + charge).clamp(min=0))
    never_on = always_on = out_on = mine_on = torch.zeros_like(odds[0])
    for t in range(len(odds) - 1, -1, -1):
        yes = torch.maximum(always[t] + always_on, mine[t] + mine_on)
        no = torch.maximum(never_on, out[t] + out_on)
        opened, open_still = odds[t] + mine_on, odds[t] + always_on
        never_on, always_on = torch.maximum(never_on, opened), torch.maximum(open_still, out_on)
        out_on, mine_on = torch.maximum(out_on, opened + charge), torch.maximum(opened, out_on + charge)
        always[t] = (yes - no).clamp(-FAR, FAR) + FAR
    return always
