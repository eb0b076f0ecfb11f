"""Move the wall clock of this process by WRONG_CLOCK_S seconds: `time.time` and `datetime.now`."""

from __future__ import annotations

import datetime
import os
import time

_OFFSET_S = float(os.environ["WRONG_CLOCK_S"])
_time = time.time
_datetime = datetime.datetime


def _wrong_time() -> float:
    return _time() + _OFFSET_S


class _WrongDatetime(_datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
        return _datetime.fromtimestamp(_wrong_time(), tz)


time.time = _wrong_time
datetime.datetime = _WrongDatetime  # type: ignore[misc]
