"""Reducers on a GPU in torch: numpy in, numpy out, and the same results.

Ranks, medoid and best dates are identical to the bit. They use integers, or single steps with only
one rounding under IEEE 754. The geomedian uses the same search in double precision. It is within
1e-5 of reflectance of numpy's, unless the sum of distances is almost flat.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minecube.composite.reducers import MOST_AHEAD, MOST_STEPS, Geomedian
from minecube.device import device_of

Bool = npt.NDArray[np.bool_]
UInt16 = npt.NDArray[np.uint16]
Int16 = npt.NDArray[np.int16]
Float32 = npt.NDArray[np.float32]

STRIP_VALUES = 2**26
"""Maximum number of stack values on the device at a time, at most 24 bytes each."""
CLOSE, TOUCHING = 3e-8, 1e-8
"""Reflectance: a step shorter than CLOSE ends a search. A point nearer than TOUCHING to an
observation is on it."""
_ABOVE_ALL = 2**16
_TINY = 1e-12


class TorchReducers:
    """`reducers` on a device.

    Args:
        device: cuda, cuda:1, cpu, ...

    Raises:
        ModelError: Torch does not know the device, or finds no such GPU.
    """

    def __init__(self, device: str) -> None:
        self.device = device_of(device)

    def median(self, observed: UInt16) -> UInt16:
        """Compute `reducers.median`."""
        return self.percentile(observed, 50)

    def percentile(self, observed: UInt16, percent: float) -> UInt16:
        """Compute `reducers.percentile`."""
        days = len(observed)
        out = np.zeros(observed.shape[1:], dtype=np.uint16)
        if not days:
            return out
        exact = torch.arange(-1, days, dtype=torch.float64, device=self.device).clamp(min=0) * (
            percent / 100
        )
        ranks = exact.floor().long()  # of 0..days observations
        shares = exact - ranks
        flat, result = observed.reshape(days, -1), out.reshape(-1)
        for part in _strips(flat):
            values = self._there(flat[:, part])
            count = (values > 0).sum(0)
            values = torch.where(values > 0, values, _ABOVE_ALL).sort(0).values
            rank, share = ranks[count], shares[count]
            low = values.gather(0, rank[None])[0].double()
            high = values.gather(0, (rank + (share > 0))[None])[0].double()
            between = high - low
            value = torch.where(share < 0.5, low + between * share, high - between * (1 - share))
            result[part] = torch.where(count > 0, value.round(), 0).cpu().numpy()
        return out

    def geomedian(self, stack: UInt16) -> Geomedian:
        """Compute `reducers.geomedian`, within 1e-5 of reflectance."""
        bands, days, *shape = stack.shape
        flat = stack.reshape(bands, days, math.prod(shape))
        middle = np.zeros((bands, flat.shape[2]), dtype=np.uint16)
        away = np.full((3, flat.shape[2]), np.nan, dtype=np.float32)
        for part in _strips(flat):
            seen = torch.from_numpy(flat[0, :, part] > 0).to(self.device)
            spectra = self._there(flat[:, :, part]).double() * 1e-4
            made, deviations = _geomedian(spectra, seen)
            stored = torch.where(seen.any(0), (made * 1e4).round().clamp(min=1), 0)
            middle[:, part] = stored.cpu().numpy()
            away[:, part] = deviations.cpu().numpy()
        emad, smad, bcmad = away.reshape(3, *shape)
        return Geomedian(middle.reshape(bands, *shape), emad, smad, bcmad)

    def medoid(self, stack: UInt16) -> Int16:
        """Compute `reducers.medoid`."""
        bands, days, *shape = stack.shape
        flat = stack.reshape(bands, days, math.prod(shape))
        out = np.full(flat.shape[2], -1, dtype=np.int16)
        for part in _strips(flat):
            spectra = self._there(flat[:, :, part]).float()
            seen = spectra[0] > 0
            total = torch.full(seen.shape, torch.inf, dtype=torch.float64, device=self.device)
            for day in range(days):
                distance = _squared_distance(spectra, spectra[:, day]).sqrt().double() * seen
                total[day] = torch.where(seen[day], distance.sum(0), torch.inf)
            out[part] = _first_least(total).cpu().numpy()
        return out.reshape(shape)

    def max_ndvi(self, red: UInt16, nir: UInt16) -> Int16:
        """Compute `reducers.max_ndvi`."""
        out = np.full(red.shape[1:], -1, dtype=np.int16)
        result, reds, nirs = (
            out.reshape(-1),
            red.reshape(len(red), out.size),
            nir.reshape(len(nir), out.size),
        )
        for part in _strips(reds):
            r, n = self._there(reds[:, part]), self._there(nirs[:, part])
            # Different ratios of 16-bit numbers stay different in double precision.
            result[part] = (
                _first_least(torch.where(r > 0, -n.double() / r.double(), torch.inf)).cpu().numpy()
            )
        return out

    def best_pixel(self, score: Float32, observed: Bool) -> Int16:
        """Compute `reducers.best_pixel`."""
        out = np.full(score.shape[1:], -1, dtype=np.int16)
        result, scores, seen = (
            out.reshape(-1),
            score.reshape(len(score), out.size),
            observed.reshape(len(score), out.size),
        )
        for part in _strips(scores):
            there, flags = (torch.from_numpy(a[:, part]).to(self.device) for a in (scores, seen))
            result[part] = _first_least(torch.where(flags, -there, torch.inf)).cpu().numpy()
        return out

    def taken(self, observed: UInt16, index: Int16) -> UInt16:
        """Compute `reducers.taken`."""
        days = len(observed)
        out = np.zeros(index.shape, dtype=np.uint16)
        result, flat, chosen = out.reshape(-1), observed.reshape(days, out.size), index.reshape(-1)
        for part in _strips(flat):
            at = torch.from_numpy(chosen[part].astype(np.int64)).to(self.device)
            values = self._there(flat[:, part]).gather(0, at.clamp(min=0)[None])[0]
            result[part] = torch.where(at >= 0, values, 0).cpu().numpy()
        return out

    def _there(self, values: UInt16) -> Tensor:
        """Copy the values to the device as int32.

        They are transferred as int16: torch supports signed types best.
        """
        signed = torch.from_numpy(np.ascontiguousarray(values).view(np.int16)).to(self.device)
        return signed.to(torch.int32) & 0xFFFF


def _strips(values: npt.NDArray[Any]) -> Iterator[slice]:
    """Yield ranges of pixels (the last dimension) of about `STRIP_VALUES` values each.

    Without days there are no ranges.
    """
    *lead, pixels = values.shape
    each = int(np.prod(lead))
    step = max(STRIP_VALUES // max(each, 1), 1)
    return (
        slice(start, min(start + step, pixels)) for start in range(0, pixels if each else 0, step)
    )


def _first_least(values: Tensor) -> Tensor:
    """Return the index of the least value along days [pixel], -1 if all are infinite.

    It is the first of equal values; argmin may return any of them.
    """
    least = values.min(0).values
    days = torch.arange(len(values), device=values.device)[:, None]
    first = torch.where(values == least, days, len(values)).min(0).values
    return torch.where(torch.isinf(least), -1, first)


def _middle(values: Tensor, seen: Tensor) -> Tensor:
    """Compute the median of float32 [..., day, pixel] over the days seen [day, pixel].

    An even number of days gives the mean of the two middle values. 0 = none.
    """
    count = seen.sum(0)
    ordered = torch.where(seen, values, torch.inf).sort(-2).values
    ranks = torch.stack([(count - 1).clamp(min=0) // 2, count // 2])
    ranks[1] = torch.where(count > 0, ranks[1], 0)
    low, high = (ordered.gather(-2, r.expand(*values.shape[:-2], 1, -1)).squeeze(-2) for r in ranks)
    return torch.where(count > 0, (low + high) * 0.5, 0)


def _geomedian(spectra: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Compute geomedian [band, pixel] and deviations [3, pixel] of reflectance.

    The input is float64 [band, day, pixel].
    """
    middle = _at_observations(spectra, seen, _searched(spectra, seen.double()))
    apart = torch.stack([(v - m).abs() for v, m in zip(spectra, middle, strict=True)]).sum(0)
    total = torch.stack([v + m for v, m in zip(spectra, middle, strict=True)]).sum(0)
    lengths, length = (
        _squared_distance(spectra, torch.zeros_like(middle)).sqrt(),
        (middle * middle).sum(0).sqrt(),
    )
    directions, direction = spectra / lengths.clamp(min=_TINY), middle / length.clamp(min=_TINY)
    away = [
        _squared_distance(spectra, middle).sqrt(),
        _squared_distance(directions, direction) / 2,
        apart / total.clamp(min=_TINY),
    ]
    return middle, torch.where(seen.any(0), _middle(torch.stack(away), seen), torch.nan)


def _searched(spectra: Tensor, there: Tensor) -> Tensor:
    """Search the geomedians [band, pixel] of spectra [band, day, pixel], as `reducers` does.

    `there` is 1 at observations.
    """
    origin = _middle(spectra, there > 0)
    spectra, at = spectra - origin[:, None], torch.zeros_like(origin)
    out, where = torch.zeros_like(at), torch.arange(at.shape[1], device=at.device)
    before: tuple[Tensor, Tensor, Tensor] | None = None
    for _ in range(MOST_STEPS):
        now = _weiszfeld(spectra, there, at)
        ahead, before = _leap(now, before)
        moved = torch.maximum(((ahead - at) ** 2).sum(0), (now[0] ** 2).sum(0))
        at, going = ahead, moved >= CLOSE**2
        out[:, where] = at
        if not going.any():
            break
        if not going.all():
            where, at, spectra, there = (
                where[going],
                at[:, going],
                spectra[:, :, going],
                there[:, going],
            )
            before = (before[0][:, going], before[1][:, going], before[2][going])
    return out + origin


def _leap(
    now: tuple[Tensor, Tensor, Tensor], before: tuple[Tensor, Tensor, Tensor] | None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    if before is None:
        return now[1], now
    turn = now[0] - before[0]
    ahead = (now[0] * turn).sum(0) / (turn * turn).sum(0).clamp(min=1e-40)
    ahead = torch.where(ahead < 0.5, ahead.clamp(min=-MOST_AHEAD), 0)
    worse = now[2] > before[2] * (1 + 1e-9)
    target = torch.where(worse, before[1], now[1] - ahead * (now[1] - before[1]))
    step, reached, cost = (torch.where(worse, b, n) for n, b in zip(now, before, strict=True))
    return target, (step, reached, cost)


def _weiszfeld(spectra: Tensor, there: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step from `at` [band, pixel].

    Returns the step, its end, and the sum of distances at its start.
    """
    distance = _squared_distance(spectra, at).sqrt()
    touching = (distance <= TOUCHING) * there
    pull = (there - touching) / distance.clamp(min=TOUCHING)
    total = pull.sum(0)
    step = torch.stack([(values * pull).sum(0) for values in spectra]) / total.clamp(
        min=_TINY
    ) - at * (total > 0)
    held, pulled = touching.sum(0), (step**2).sum(0).sqrt() * total
    step = torch.where(held > 0, step * (1 - held / pulled.clamp(min=_TINY)).clamp(min=0), step)
    return step, at + step, (distance * there).sum(0)


def _at_observations(spectra: Tensor, seen: Tensor, middle: Tensor) -> Tensor:
    """Move geomedians onto the nearest observation if it is the geomedian itself.

    See Kuhn 1973, Mathematical Programming 4.
    """
    away = torch.where(seen, _squared_distance(spectra, middle), torch.inf)
    index = away.argmin(0)
    nearest = spectra.gather(1, index.expand(len(spectra), 1, -1))[:, 0]
    away = _squared_distance(spectra, nearest).sqrt()
    unit = torch.where(seen & (away > 0), 1 / away.clamp(min=_TINY), 0)
    pull = torch.stack(
        [((values - at) * unit).sum(0) for values, at in zip(spectra, nearest, strict=True)]
    )
    best = (pull * pull).sum(0).sqrt() < ((away == 0) & seen).sum(0) * (1 - 1e-6)
    return torch.where(best, nearest, middle)


def _squared_distance(spectra: Tensor, to: Tensor) -> Tensor:
    """Compute squared distances of spectra [band, day, pixel] to one spectrum [band, pixel].

    Returns [day, pixel] in the dtype of the spectra. Bands are summed in their order, as numpy
    does.
    """
    out = torch.zeros_like(spectra[0])
    for values, middle in zip(spectra, to, strict=True):
        apart = values - middle
        out += apart * apart
    return out
