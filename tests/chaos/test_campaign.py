"""Pairs of commands that start at the same moment on one store, in real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CAMPAIGN = Path(__file__).with_name("campaign.py")


def test_a_short_campaign_finds_nothing(tmp_path):
    out = tmp_path / "tally.json"
    asked = ["--pairs", "6", "--where", "folder", "--reads", "50", "--json", str(out)]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), *asked],
        capture_output=True,
        text=True,
        check=False,
        env=alone,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    tally = json.loads(out.read_text())
    assert tally["examples"] == []
    assert {
        what: tally[what] for what in ("pairs", "damaged", "lost", "dishonest_exits", "mixed_reads")
    } == {
        "pairs": 6,
        "damaged": 0,
        "lost": 0,
        "dishonest_exits": 0,
        "mixed_reads": 0,
    }
