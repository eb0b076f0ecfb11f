"""`python newest_python.py` prints the newest installed Python that the tests know, if it is newer than the running one.

It searches PATH and the versions of pyenv. Without a newer Python it prints nothing on stdout, and a sentence on stderr.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

KNOWN = [(3, 13), (3, 12)]
"""Versions that `constraints.txt` has pins for, newest first."""


def find_candidates(name: str) -> Iterator[str]:
    """Paths of `python3.13` and the like. pyenv puts a script on PATH, which fails where the version is not active."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(map(str, root.glob(f"versions/*/bin/{name}")))
    on_path = shutil.which(name)
    if on_path:
        yield on_path


def makes_environments(python: str) -> bool:
    """Whether this Python runs, and has what `python -m venv` needs."""
    tried = subprocess.run(
        [python, "-c", "import venv, ensurepip"], capture_output=True, check=False
    )
    return tried.returncode == 0


def find_newest(running: tuple[int, int]) -> str | None:
    """Path of the newest known Python that is newer than the running one, if any."""
    for version in KNOWN:
        if version <= running:
            return None
        name = ".".join(map(str, version))
        for python in find_candidates(f"python{name}"):
            if makes_environments(python):
                return python
    return None


if __name__ == "__main__":
    newest = find_newest(sys.version_info[:2])
    if newest:
        print(newest)
    else:
        names = " or ".join(".".join(map(str, version)) for version in KNOWN)
        print(f"test-newest is skipped: no Python {names} is newer than this one", file=sys.stderr)
