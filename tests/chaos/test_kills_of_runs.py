"""Runs of a dataset that are killed at random moments, in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).with_name("kills_of_runs.py")


def test_a_short_campaign_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "tally.json"
    words = ["--kills", "7", "--kinds", "worker,driver", "--seed", "1", "--json", str(out)]
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(out.read_text())
    assert tally["problems"] == []
    assert set(tally["by_kind"]) == {"worker", "driver"}
    assert tally["kills_identical"] == tally["kills"]
