"""Maps of change score as the footprints that they are made from."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from known_footprints import YEARS, series
from minecube import metrics
from minecube.errors import ModelError
from minecube.metrics import Counts, count, finish

PAIRS = list(combinations(YEARS, 2))


def as_change(p: np.ndarray, classes: tuple[str, ...]) -> np.ndarray:
    """What a perfect reader of two maps would say, as a change model's probabilities."""
    says = {
        "changed": lambda a, b: a != b,
        "new": lambda a, b: (a == 0) & (b == 1),
        "removed": lambda a, b: (a == 1) & (b == 0),
    }
    maps = []
    for i, j in combinations(range(len(p)), 2):
        unknown = (p[i] == 255) | (p[j] == 255)
        maps.append([np.where(unknown, 255, says[c](p[i], p[j]) * 200) for c in classes])
    return np.array(maps, np.uint8)


@pytest.mark.parametrize(
    ("classes", "variants"),
    [
        (("changed",), {"change"}),
        (("new",), {"expansion"}),
        (("removed", "new"), {"change", "transition", "expansion"}),
        (("new", "removed"), {"change", "transition", "expansion"}),
    ],
)
def test_maps_of_change_are_scored_as_footprints_are(
    classes: tuple[str, ...], variants: set[str]
) -> None:
    p, y = series(32), series(33)
    of_maps, of_change = (
        count(p, y, YEARS),
        metrics.count_change(as_change(p, classes), y, YEARS, PAIRS, classes),
    )
    expected, found = (metrics.tabulate_gaps(s) for s in (of_maps, of_change))
    names = [
        name
        for name in expected.columns
        if name.split("_")[0] in variants and name != "change_unmapped"
    ]
    assert {name.split("_")[0] for name in found.columns} - {"change"} == variants - {"change"}
    assert found[names].equals(expected[names])
    assert finish(of_change).keys() >= set(names)
    assert found["change_unmapped"].equals(expected["change_unmapped"])
    assert ("change_f1" in found) == ("change" in variants)
    if classes != ("new",):
        assert of_change.change.keys() == {1, 2, 3, 4}
        assert "change_auprc" in found


def test_a_perfect_map_of_change_scores_one_and_one_without_change_zero() -> None:
    y = series(34)
    for classes in (("changed",), ("new",), ("removed", "new")):
        found = finish(metrics.count_change(as_change(y, classes), y, YEARS, PAIRS, classes))
        assert found.pop("change_unmapped") == 0
        assert set(found.values()) == {1.0}
        none = np.zeros((len(PAIRS), len(classes), *y.shape[1:]), np.uint8)
        scores = {
            n: v
            for n, v in finish(metrics.count_change(none, y, YEARS, PAIRS, classes)).items()
            if n.endswith(("f1", "iou"))
        }
        assert set(scores.values()) == {0.0}


def test_of_removed_and_new_the_more_probable_counts() -> None:
    y = np.array([[[0, 0, 1, 0]], [[1, 1, 0, 0]]], np.uint8)
    change = np.array([[[[130, 200, 200, 124]], [[200, 130, 199, 124]]]], np.uint8)  # removed, new
    pair = metrics.count_change(change, y, [1, 2], [(1, 2)], ("removed", "new")).pairs[1, 2]
    assert (pair.new_new, pair.new_gone, pair.gone_gone, pair.same_same) == (1, 1, 1, 1)


def test_change_the_wrong_way_round_is_refused() -> None:
    y = series(35)
    maps = as_change(y, ("new",))
    backwards = [(b, a) for a, b in PAIRS]
    cases = [
        (maps, backwards, ("new",), "backwards"),
        (maps, [*PAIRS[:-1], PAIRS[0]], ("new",), "each once"),
        (maps, [*PAIRS[:-1], (2015, 2031)], ("new",), "among"),
        (maps, PAIRS, ("gone",), "expected"),
        (maps, PAIRS, ("removed", "new"), "2 classes"),
        (maps[:, :, :-1], PAIRS, ("new",), "grid"),
        (np.full_like(maps, 251), PAIRS, ("new",), "0..250"),
    ]
    for change, pairs, classes, words in cases:
        with pytest.raises(ModelError, match=words):
            metrics.count_change(change, y, YEARS, pairs, classes)


def test_scores_of_different_change_classes_are_not_joined() -> None:
    y = series(36)
    one, other = (
        metrics.count_change(as_change(y, c), y, YEARS, PAIRS, c) for c in (("new",), ("changed",))
    )
    with pytest.raises(ModelError, match="score the two models apart"):
        one + other
    assert Counts() + one == one
