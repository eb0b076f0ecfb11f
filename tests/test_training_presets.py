"""Presets of training settings are checked when they are loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from minecube.catalog import load_presets
from minecube.errors import CatalogError


def test_published_presets_are_as_told_and_say_so() -> None:
    for name in ("published-mapping", "published-change"):
        found = load_presets()[name]
        assert (found.optimiser, found.learning_rate, found.schedule, found.weight_decay) == (
            "adam",
            1e-4,
            "constant",
            0,
        )
        assert (found.epochs, found.batch, found.window_px, found.step_px) == (10, 64, 160, 160)
        assert (found.gaps, found.rare, found.turns, found.jitter, found.patience) == (
            (),
            0,
            False,
            0,
            None,
        )
        assert "2510.14661" in found.source
        assert "nferred" in found.source
        assert "told" in found.source  # not read in the paper
    assert {"cpu", "default", "demo"} <= set(load_presets())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("batch: 1", "'batch': expected 2 or more"),
        ("rare: 1.5", "'rare': expected a share"),
        ("{rare: 0.5, step_px: 16}", "'rare': expected 0 with step_px"),
        ("year_dropout: 1", "'year_dropout'"),
        ("optimiser: sgd", "adam or adamw, found 'sgd'"),
        ("schedule: cosine", "one-cycle or constant"),
        ("learning_rate: 0", "'learning_rate'"),
        ("bf16: [mps]", "some of cpu, cuda, found mps"),
        ("gaps: [0]", "'gaps'"),
        ("jitter: 0.5", "'jitter'"),
        ("epochs: 0", "'epochs': expected 1 or more"),
        ("focal: -1", "'focal'"),
        ("lr: 1", "'lr'"),
    ],
)
def test_wrong_presets_are_refused(line: str, words: str, tmp_path: Path) -> None:
    fields = line.strip("{}").split(", ")
    file = tmp_path / "presets.yaml"
    file.write_text("mine:\n  title: t\n" + "".join(f"  {field}\n" for field in fields))
    with pytest.raises(CatalogError, match=words):
        load_presets(file)
