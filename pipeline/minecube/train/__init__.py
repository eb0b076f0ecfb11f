"""Fitting networks to cubes."""

from __future__ import annotations

from minecube.train.fitting import fit

__all__ = ["fit"]
