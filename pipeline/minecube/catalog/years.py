"""Read years from text."""

from __future__ import annotations

import re
from collections.abc import Sequence


def parse_years(text: str) -> tuple[int, ...]:
    """Parse years such as 2019-2023, or 2019,2021, or both. Returns each once, ascending.

    Raises ValueError for other text.
    """
    years: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{4})(?:\s*-\s*(\d{4}))?\s*", part)
        span = range(0)
        if match:
            start = int(match[1])
            span = range(start, int(match[2] or start) + 1)
        if not span:
            raise ValueError(f"expected years such as 2019-2023 or 2019,2021, found {text!r}")
        years |= set(span)
    return tuple(sorted(years))


def format_years(years: Sequence[int]) -> str:
    """Format years as text: 2019-2023,2025."""
    spans: list[list[int]] = []
    for year in sorted(years):
        if spans and year == spans[-1][-1] + 1:
            spans[-1].append(year)
        else:
            spans.append([year])
    return ",".join(_format_span(span) for span in spans)


def _format_span(span: Sequence[int]) -> str:
    if len(span) == 1:
        return str(span[0])
    return f"{span[0]}-{span[-1]}"
