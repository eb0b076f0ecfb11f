"""Recognise years and dates in the columns of a file."""

from __future__ import annotations

import re
from datetime import UTC, datetime

import geopandas as gpd
import pandas as pd

from minecube.catalog import FIRST_YEAR
from minecube.vectors import to_texts

YEARS = range(1900, 2101)
"""Valid calendar years of a polygon. Others are typing errors."""
_MONTH = "(?:0?[1-9]|1[0-2])"
_DAY = "(?:0?[1-9]|[12][0-9]|3[01])"
_DATE = (
    # 2019-06-01T10:00, 2019/6
    rf"^(?:(\d{{4}})[-/]{_MONTH}(?:[-/]{_DAY}(?:[T ].*)?)?"
    # 2019.06.01, 20190601
    rf"|(\d{{4}})(?:\.{_MONTH}\.{_DAY}|(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]))"
    # 1.6.2019, 06/13/2019, 6/2019
    rf"|(?:{_DAY}[-/.]{_DAY}[-/.]|{_MONTH}[-/])(\d{{4}}))$"
)
_SEPARATOR = r"[-_ ./,]*"
_MONTH_NAME = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?"
    r"|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?|spring|summer|autumn|fall|winter|q[1-4])"
)
_DATE_WITHIN = (
    # S2A_20190601T1010
    r"(?i)(?:(?<!\d)(20\d\d)(?:[-_./](?:0[1-9]|1[0-2])[-_./]|(?:0[1-9]|1[0-2]))"
    r"(?:0[1-9]|[12]\d|3[01])"
    # from 1.6.2019
    rf"|(?<!\d){_DAY}[-/.]{_DAY}[-/.](20\d\d)"
    # 2019-Jun-01, 2019Q3
    rf"|(?<!\d)(20\d\d){_SEPARATOR}{_MONTH_NAME}(?![a-z])"
    # Jun 2019, June 1, 2019
    rf"|(?<![a-z]){_MONTH_NAME}{_SEPARATOR}(?:\d\d?(?:st|nd|rd|th)?[-_ ./,]+)?(20\d\d)"
    r")(?!\d)"
)
_ONLY_YEARS = (
    # 2019/2020, 2019 to 2020
    r"(?i)^\W*(20\d\d)(?:\W+(?:[a-z]{1,3}\W+)?(?:20\d\d|\d\d?))*\W*$"
)
_YEAR_AND_DAY_OR_MONTH = (
    # 2019152, 201906
    r"(?<![\d.,])(20\d\d)"
    r"(?:00[1-9]|0[1-9]\d|[12]\d\d|3[0-5]\d|36[0-6]|0[1-9]|1[0-2])(?:\.0+)?(?![\d,]|\.\d)"
    # 06.2019
    r"|^(?:0?[1-9]|1[0-2])\.(20\d\d)$"
)
_YEAR_WITHIN = r"(?<![\d.,])(20\d\d)(?![0-9A-Za-z]|[.,]\d)"  # C2019, Sommer 2019
_LONG_NUMBER = r"(?<!\d)(?!20\d\d(?!\d))\d{3,}"
_MOST = 0.8
_SAMPLE = 1000
"""Number of values per column searched for years in other forms."""
_ID_NAME = r"Id$|ID$|(?:^|[^a-z])[a-z]?id$|objectid$"
_TIMED_NAME = r"time|date|stamp|epoch|acq|taken|obs"
_DATED_NAME = r"year|date(?!d)|jahr|datum|ann[eé]e|fecha|(?<![a-z])(?:a[nñ]o|anno|rok)(?![a-z])"
"""Words in the names of columns with years or dates."""


def parse_years(column: pd.Series) -> pd.Series:
    """Extract years from numbers, dates, or texts of either, Float64, missing without one."""
    words = to_texts(column)
    dates = words.str.extract(_DATE)
    years = dates[0].fillna(dates[1]).fillna(dates[2])
    return pd.to_numeric(years.fillna(words), errors="coerce").astype("Float64")


def looks_dated(column: pd.Series, name: str) -> bool:
    """Return whether a column without missing values is likely to hold years or dates."""
    if isinstance(column.dtype, gpd.array.GeometryDtype):
        return False
    values = to_texts(column).dropna()
    if values.empty or values.str.contains("\ufffd").any():  # bytes of another content than text
        return False
    are_ids = re.search(_ID_NAME, name) is not None
    are_numbers = pd.api.types.is_numeric_dtype(column)
    year_share = float(parse_years(values).isin(list(YEARS)).mean())
    if year_share == 1 and not (are_numbers and are_ids):
        return True
    if year_share >= 0.5 and not are_numbers:
        return True
    if re.search(_DATED_NAME, name.lower()) and values.str.contains(r"\d").any():
        return True
    sample = values.iloc[:: max(1, len(values) // _SAMPLE)]
    return _contain_dates(sample) or (not are_ids and _contain_years(sample, name))


def _contain_dates(values: pd.Series) -> bool:
    """Return whether half of the texts contain a whole date, or only years, of the mission."""
    dates = values.str.extract(_DATE_WITHIN).bfill(axis="columns").iloc[:, 0]
    years = values.str.extract(_ONLY_YEARS)[0]
    candidates = dates.fillna(years).where(~_are_numbers(values))
    return float(_in_mission(candidates).mean()) >= 0.5


def _contain_years(values: pd.Series, name: str) -> bool:
    """Return whether most numbers or texts contain a year of the mission in another form.

    A single year within a text may be part of a name, so at least two different years are needed.
    """
    numbers = values.str.extract(_YEAR_AND_DAY_OR_MONTH).bfill(axis="columns").iloc[:, 0]
    if float(_in_mission(numbers).mean()) >= _MOST or _are_seconds(values, name):
        return True
    is_text = ~values.str.contains(_LONG_NUMBER) & ~_are_numbers(values)
    years = values.str.extract(_YEAR_WITHIN)[0].where(is_text)
    in_mission = _in_mission(years)
    return float(in_mission.mean()) >= _MOST and len(years[in_mission].unique()) > 1


def _are_seconds(values: pd.Series, name: str) -> bool:
    """Return whether most values are seconds or milliseconds since 1970, in the mission's years.

    Ids and phone numbers may be as large. So the values must be whole minutes, or the name must
    mention time.
    """
    long_numbers = values.where(values.str.fullmatch(r"\d{10}(\d{3})?(\.0+)?"))
    numbers = pd.to_numeric(long_numbers).astype("Float64")
    seconds = numbers.where(numbers < 1e10, numbers / 1000)
    years = pd.to_datetime(seconds, unit="s", errors="coerce").dt.year
    in_mission = _in_mission(years)
    if not re.search(_TIMED_NAME, name.lower()):
        in_mission &= (seconds % 60 == 0).fillna(False)
    return float(in_mission.mean()) >= _MOST


def _are_numbers(values: pd.Series) -> pd.Series:
    with_decimal_comma = values.str.fullmatch(r"\d+,(?!20\d\d$)\d+")
    return pd.to_numeric(values, errors="coerce").notna() | with_decimal_comma


def _in_mission(years: pd.Series) -> pd.Series:
    """Mark years from the mission's first to next year."""
    mission = range(FIRST_YEAR, datetime.now(tz=UTC).year + 2)
    return pd.to_numeric(years).isin(list(mission)).fillna(False).astype(bool)
