"""The benchmarks run, and write the figures that they are read for."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def figures(folder: Path, name: str, *arguments: str) -> dict[str, Any]:
    file = folder / "figures.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--json", str(file), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
def test_mapping(tmp_path: Path) -> None:
    found = figures(
        tmp_path,
        "predict.py",
        "--models",
        "a2net-small,deeplabv3plus-mobilenetv2-small",  # the fastest of their tasks
        "--rounds",
        "1",
        "--seconds",
        "0.1",
        "--no-memory",
    )
    names = ["a2net-small", "deeplabv3plus-mobilenetv2-small"]
    assert list(found["end_to_end_fraction"]) == names
    for name, fraction in found["end_to_end_fraction"].items():
        of = found["models"][name]
        (whole,) = of["rounds"]["end to end"]
        assert fraction == pytest.approx(of["rounds"][of["alone"]][0] / whole)
        assert of["mpx_s"] == pytest.approx(of["maps"] * 0.768**2 / whole, rel=0.01)


@pytest.mark.slow
def test_runs(tmp_path: Path) -> None:
    """The benchmark stops with an error unless the second run keeps what the first one built."""
    found = figures(tmp_path, "runs.py", "--only", "rerun", "--sites", "2")
    assert found["rerun_ms_per_site_year"] > 0


@pytest.mark.slow
def test_scoring(tmp_path: Path) -> None:
    """The benchmark stops with an error if its counts differ from torchmetrics'."""
    found = figures(tmp_path, "score.py", "--sites", "2", "--rounds", "3")
    years = 10
    maps = 2  # prediction and truth
    for prefix in ("", "noise_"):
        seconds = {
            name: statistics.median(rounds) for name, rounds in found[f"{prefix}rounds"].items()
        }
        assert len(found[f"{prefix}rounds"]["score"]) == 3
        assert found[f"{prefix}gigabytes"] == pytest.approx(2 * maps * years * 900**2 / 1e9)
        assert found[f"{prefix}bandwidth_fraction"] == pytest.approx(
            seconds["xor"] / seconds["score"]
        )
        assert found[f"{prefix}vs_torchmetrics"] == pytest.approx(
            seconds["torchmetrics"] / seconds["score"]
        )


def test_no_read_is_mixed(tmp_path: Path) -> None:
    """The short form: some updates pass while a reader polls."""
    found = figures(tmp_path, "mixed_reads.py", "--reads", "60")
    assert found["mixed_reads"] == 0
    assert found["store"] == found["main"] == found["tag"] == 20
    assert found["refused_reads"] <= 20
    assert found["versions"] > 1
