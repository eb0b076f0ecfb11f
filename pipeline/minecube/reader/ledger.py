"""What became of every read: planned, read, retried, lost; bytes and seconds; by scene and band.

Counts are additive: over blocks, over the runs of a build that was interrupted, over machines.
"""

from __future__ import annotations

import io
import threading

import pandas as pd

from minecube.catalog import SCL

COUNTS = ("planned", "read", "lost", "requests", "retried", "bytes", "seconds")
"""One read is one asset's window. requests: asked of the network (0 for local files); retried: those asked again; bytes: of
the answers, or of the local file's compressed tiles; seconds: from the first request to the pixels, waiting included."""
_KEY = ["scene", "band"]


class Ledger:
    """Counts of one site-year, for any thread of this process; a copy in another process is new, and allows no loss.

    Args:
        lossy: whether a read that is lost leaves its pixels unobserved, instead of failing at once.
        before: a table of counts to go on from, as `to_parquet` wrote it.
        copied: whether a file that is gone for good fails all the same, since another source may have a copy.
    """

    def __init__(self, *, lossy: bool = False, before: bytes | None = None, copied: bool = False) -> None:
        self.lossy = lossy
        self.copied = copied
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], dict[str, float]] = {}
        self._reasons: dict[tuple[str, str], str] = {}
        for row in pd.read_parquet(io.BytesIO(before)).to_dict("records") if before else ():
            self._counts[row["scene"], row["band"]] = {name: row[name] for name in COUNTS}
            if row["reason"]:
                self._reasons[row["scene"], row["band"]] = row["reason"]

    def __reduce__(self) -> tuple[type[Ledger], tuple[()]]:
        return Ledger, ()  # strict: what is lost where nobody counts must fail

    def __dask_tokenize__(self) -> int:
        return id(self)

    def add(self, scene: str, band: str, *, reason: str = "", **counts: float) -> None:
        """Add counts of a read; `reason` says why one was lost."""
        with self._lock:
            row = self._counts.setdefault((scene, band), dict.fromkeys(COUNTS, 0))
            for name, value in counts.items():
                row[name] += value
            if reason:
                self._reasons[scene, band] = reason

    def repeated(self) -> Ledger:
        """The same account, for what was read before: it costs once more, and was planned once."""
        return _Repeated(self)

    def totals(self) -> dict[str, float]:
        """Sums of all counts, and `completeness`: the share of planned reads that were read, 1 where none was planned.

        With a mask, the bands of its scene are lost, too, which then nobody plans to read.
        """
        with self._lock:
            sums = {name: sum(row[name] for row in self._counts.values()) for name in COUNTS}
            masks = sum(row["lost"] for (_, band), row in self._counts.items() if band == SCL)
            unasked = masks * len({band for _, band in self._counts} - {SCL})
        whole = {name: value if name == "seconds" else int(value) for name, value in sums.items()}
        whole["seconds"] = round(whole["seconds"], 3)
        wanted = sums["planned"] + unasked
        return {**whole, "completeness": (sums["planned"] - sums["lost"]) / wanted if wanted else 1.0}

    def lost(self) -> list[str]:
        """A line for each scene and band of which a read was lost, with the reason."""
        with self._lock:
            return [f"{scene} {band}: {reason}" for (scene, band), reason in sorted(self._reasons.items())]

    def table(self) -> pd.DataFrame:
        """One row a scene and band: `COUNTS`, and why a read was lost."""
        with self._lock:
            rows = [
                {"scene": scene, "band": band, **row, "reason": self._reasons.get((scene, band), "")}
                for (scene, band), row in sorted(self._counts.items())
            ]
        types = {name: float if name == "seconds" else "int64" for name in COUNTS}
        return pd.DataFrame(rows, columns=[*_KEY, *COUNTS, "reason"]).astype(types)

    def to_parquet(self) -> bytes:
        """The table as the bytes of a Parquet file."""
        out = io.BytesIO()
        self.table().to_parquet(out, index=False)
        return out.getvalue()


class _Repeated(Ledger):
    def __init__(self, of: Ledger) -> None:
        super().__init__(lossy=of.lossy, copied=of.copied)
        self._of = of

    def add(self, scene: str, band: str, *, reason: str = "", **counts: float) -> None:
        # One that is lost only now is read no longer.
        self._of.add(scene, band, reason=reason, **{**counts, "planned": 0, "read": -counts.get("lost", 0)})
