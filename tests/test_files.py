"""Files are whole under their final names, whatever happens to their writers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from minecube import files
from minecube.files import replacing

HOLDS_A_DRAFT = (
    "import sys; from pathlib import Path; from minecube.files import replacing\n"
    "with replacing(Path(sys.argv[1])) as draft:\n"
    "    draft.write_text('half'); print('writing', flush=True); input(); draft.write_text('whole')\n"
)


def writer_of(path: Path) -> subprocess.Popen[str]:
    """Start a process that stops while it writes."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_DRAFT, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"  # brackets mean something to glob
    with replacing(path) as draft:
        draft.write_text("whole")
        assert draft.suffix == ".txt"
        assert not path.exists()
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["a[1].txt"]


def test_a_failed_writer_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as draft:
            draft.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_two_writers_of_one_path_share_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    other = writer_of(path)
    with replacing(path) as draft:
        draft.write_text("whole too")
    assert path.read_text() == "whole too"
    other.communicate("\n", timeout=30)
    assert other.returncode == 0
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["a.txt"]


def test_the_draft_of_a_killed_writer_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    killed = writer_of(path)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=30)
    (left,) = names(tmp_path)
    assert left.startswith(".a.txt.part-")
    with replacing(path) as draft:
        draft.write_text("whole")
    assert names(tmp_path) == ["a.txt"]


def test_a_writer_that_has_not_locked_its_draft_yet_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second writer starts and ends at the moment when the first one is about to lock."""
    path = tmp_path / "a.txt"
    lock = files._lock

    def lock_late(file: IO[str]) -> None:
        monkeypatch.setattr(files, "_lock", lock)
        with replacing(path) as draft:
            draft.write_text("second")
        lock(file)

    monkeypatch.setattr(files, "_lock", lock_late)
    with replacing(path) as draft:
        assert path.read_text() == "second"
        draft.write_text("first")
    assert path.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_replaces_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "cube.zarr"
    for content in ("old", "new"):
        with replacing(path) as draft:
            draft.mkdir()
            (draft / content).write_text(content)
    assert names(path) == ["new"]
    assert names(tmp_path) == ["cube.zarr"]


def test_the_older_folder_comes_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cube.zarr"
    path.mkdir()
    (path / "old").write_text("old")
    rename = Path.replace

    def write_new() -> None:
        with replacing(path) as draft:
            draft.mkdir()
            (draft / "new").write_text("new")

    def replace(source: Path, target: Path) -> Path:
        if (source / "new").exists():
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        write_new()
    assert names(path) == ["old"]
    assert names(tmp_path) == ["cube.zarr"]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "missing" / "a.txt"):
        pass
    assert names(tmp_path) == []
