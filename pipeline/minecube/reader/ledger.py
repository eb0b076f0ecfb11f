"""Counts of all reads by scene and band: planned, read, retried, lost, bytes and seconds.

Counts are additive over blocks, over runs of an interrupted build, and over machines.
"""

from __future__ import annotations

import io
import threading
from typing import Any

import pandas as pd

from minecube.catalog import SCL

COUNTS = ("planned", "read", "lost", "requests", "retried", "bytes", "struck", "seconds")
"""One read is one asset's window. requests: sent to the network (0 for local files). retried:
repeated requests. bytes: of the answers, or of the local file's compressed tiles. struck: file
pixels left out by a check: numbers above 32767, and in SCL pixels of edge strips. A pixel in
several windows counts several times. seconds: from the first request to the pixels, waiting
included."""
_KEY = ["scene", "band"]


class Ledger:
    """Counts of one site-year, for any thread of this process.

    A copy in another process starts empty and allows no loss.

    Args:
        lossy: Allow lost reads and leave their pixels unobserved. Otherwise a lost read fails at
            once.
        before: Table of counts to continue from, as written by `to_parquet`.
        copied: Fail on permanently missing files even if lossy. Another source may have a copy.
    """

    def __init__(
        self, *, lossy: bool = False, before: bytes | None = None, copied: bool = False
    ) -> None:
        self.lossy = lossy
        self.copied = copied
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], dict[str, float]] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        if before:
            self._load(before)

    def _load(self, parquet: bytes) -> None:
        for row in pd.read_parquet(io.BytesIO(parquet)).to_dict("records"):
            key = (row["scene"], row["band"])
            self._counts[key] = {name: row.get(name, 0) for name in COUNTS}
            if row["reason"]:
                self._reasons[key] = row["reason"]

    def __reduce__(self) -> tuple[type[Ledger], tuple[()]]:
        return Ledger, ()  # unpickled ledgers are strict: a failed read raises

    def __dask_tokenize__(self) -> int:
        return id(self)

    def add(self, scene: str, band: str, *, reason: str = "", **counts: float) -> None:
        """Add counts of a read; `reason` explains a lost read."""
        with self._lock:
            row = self._counts.setdefault((scene, band), dict.fromkeys(COUNTS, 0))
            for name, value in counts.items():
                row[name] += value
            if reason:
                self._reasons[scene, band] = reason

    def for_repeats(self) -> Ledger:
        """Return a view for repeated reads: their cost is counted, but not planned again."""
        return _RepeatedLedger(self)

    def totals(self) -> dict[str, float]:
        """Sum all counts and compute `completeness`, the share of planned reads done.

        Completeness is 1 if no read was planned. A lost SCL read also counts as a lost read of each
        other band, since these are never planned.
        """
        totals: dict[str, float] = {}
        with self._lock:
            for name in COUNTS:
                totals[name] = sum(row[name] for row in self._counts.values())
            lost_masks = sum(row["lost"] for (_, band), row in self._counts.items() if band == SCL)
            other_bands = {band for _, band in self._counts} - {SCL}
        planned = totals["planned"] + lost_masks * len(other_bands)
        completeness = 1.0
        if planned:
            completeness = (totals["planned"] - totals["lost"]) / planned
        seconds = round(totals.pop("seconds"), 3)
        counts = {name: int(value) for name, value in totals.items()}
        return {**counts, "seconds": seconds, "completeness": completeness}

    def lost(self) -> list[str]:
        """List a line with the reason for each scene and band with a lost read."""
        with self._lock:
            return [
                f"{scene} {band}: {reason}"
                for (scene, band), reason in sorted(self._reasons.items())
            ]

    def list_struck(self) -> list[dict[str, Any]]:
        """Return scene, band and number of the pixels left out by a check, as plain JSON."""
        with self._lock:
            return [
                {"scene": scene, "band": band, "pixels": int(row["struck"])}
                for (scene, band), row in sorted(self._counts.items())
                if row["struck"]
            ]

    def table(self) -> pd.DataFrame:
        """Return one row per scene and band: `COUNTS`, and the reason of a lost read."""
        with self._lock:
            rows = [
                {
                    "scene": scene,
                    "band": band,
                    **row,
                    "reason": self._reasons.get((scene, band), ""),
                }
                for (scene, band), row in sorted(self._counts.items())
            ]
        types: dict[str, str] = dict.fromkeys(COUNTS, "int64") | {"seconds": "float64"}
        return pd.DataFrame(rows, columns=[*_KEY, *COUNTS, "reason"]).astype(types)

    def to_parquet(self) -> bytes:
        """Return the table as the bytes of a Parquet file."""
        buffer = io.BytesIO()
        self.table().to_parquet(buffer, index=False)
        return buffer.getvalue()


class _RepeatedLedger(Ledger):
    def __init__(self, ledger: Ledger) -> None:
        super().__init__(lossy=ledger.lossy, copied=ledger.copied)
        self._ledger = ledger

    def add(self, scene: str, band: str, *, reason: str = "", **counts: float) -> None:
        # A repeated read lost now no longer counts as read. Struck pixels are counted already.
        changes = {"planned": 0, "read": -counts.get("lost", 0), "struck": 0}
        self._ledger.add(scene, band, reason=reason, **{**counts, **changes})
