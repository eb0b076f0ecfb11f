"""Select the scenes for a recipe: by month and cloud cover."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import pystac

from minecube.catalog import Recipe
from minecube.errors import SceneError


def select(scenes: Sequence[pystac.Item], recipe: Recipe) -> list[pystac.Item]:
    """Select the scenes for a recipe.

    They lie in the recipe's months or wider months, and have at most its `max_cloud_cover`.

    Raises:
        SceneError: the scenes of the recipe's months have fewer dates than `min_dates`.
    """
    selected = select_usable(scenes, recipe)
    days = list_solar_days(selected)
    if len(days) < recipe.min_dates:
        in_season = _scenes_of_months(scenes, recipe.months)
        uses = "none"
        if selected:
            uses = f"{len(selected)} of {len(days)} dates"
        raise SceneError(
            f"recipe {recipe.id!r} uses {uses} of {len(scenes)} scenes, "
            f"and needs {recipe.min_dates} dates: "
            f"{len(in_season)} are in months {list(recipe.months)}, {len(selected)} of those "
            f"at most {recipe.max_cloud_cover:g} % cloudy; widen months or max_cloud_cover, "
            "or lower min_dates, in a recipe of your own, or name one more --source"
        )
    return selected + _clear_scenes_of_months(scenes, recipe, recipe.wider_months)


def need_dates(
    scenes: Sequence[pystac.Item], recipe: Recipe, year: int, left_out: Mapping[str, str]
) -> None:
    """Raise SceneError if a year's usable scenes have fewer dates than the recipe's `min_dates`.

    `left_out` maps the id of each other scene to the reason, for the message.
    """
    in_year = [s for s in select_usable(scenes, recipe) if s.datetime and s.datetime.year == year]
    days = list_solar_days(in_year)
    if len(days) < recipe.min_dates:
        counts = sorted(Counter(left_out.values()).items())
        reasons = ", ".join(f"{reason} {count}" for reason, count in counts)
        raise SceneError(
            f"{len(days)} dates of {year} are left, and recipe {recipe.id!r} needs "
            f"{recipe.min_dates}; scenes left out: {reasons}; name one more --source, "
            "or lower min_dates in a recipe of your own"
        )


def select_usable(scenes: Iterable[pystac.Item], recipe: Recipe) -> list[pystac.Item]:
    """Select the scenes of a recipe's months with at most its `max_cloud_cover`."""
    return _clear_scenes_of_months(scenes, recipe, recipe.months)


def _clear_scenes_of_months(
    scenes: Iterable[pystac.Item], recipe: Recipe, months: Sequence[int]
) -> list[pystac.Item]:
    # Scenes of unknown cloud cover stay. The mask finds the clouds. This test only saves reads.
    return [
        scene
        for scene in _scenes_of_months(scenes, months)
        if (scene.properties["eo:cloud_cover"] or 0) <= recipe.max_cloud_cover
    ]


def _scenes_of_months(scenes: Iterable[pystac.Item], months: Sequence[int]) -> list[pystac.Item]:
    return [s for s in scenes if s.datetime and s.datetime.month in months]


def mean_cloud_cover(scenes: Iterable[pystac.Item]) -> float:
    """Average the known cloud covers, in percent. Return NaN if no cloud cover is known."""
    covers = [scene.properties["eo:cloud_cover"] for scene in scenes]
    percents: list[float] = [percent for percent in covers if percent is not None]
    if not percents:
        return math.nan
    return sum(percents) / len(percents)


def list_solar_days(scenes: Iterable[pystac.Item]) -> list[str]:
    """Return the scenes' distinct solar days, YYYY-MM-DD, sorted."""
    return sorted({s.properties["minecube:solar_day"] for s in scenes})
