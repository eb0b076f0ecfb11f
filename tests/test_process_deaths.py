"""A run whose worker processes died ends, on every Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DYING = """
import os
from minecube.jobs.processes import open_processes
if __name__ == "__main__":
    with open_processes(2, "minecube.jobs.processes") as processes:
        futures = [processes.submit(os._exit, 1) for _ in range(6)]
        print([type(future.exception()).__name__ for future in futures])
        print([processes.submit(abs, -number).result() for number in range(3)])
"""


def test_a_script_whose_workers_died_ends(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DYING)
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines() == [str(["BrokenProcessPool"] * 6), "[0, 1, 2]"]
