"""A command that stops at any file leaves whole files, and a second run finishes it."""

from __future__ import annotations

import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from known_stores import build, files_of, make_hole, run
from minecube import codes, cube
from minecube.cli import cli
from minecube.jobs.export import FORMATS


@pytest.fixture(scope="module")
def hole():
    return make_hole()


@pytest.fixture(scope="module")
def small(tmp_path_factory, hole):
    """Make a store of a small site, with labels and the prediction of a model."""
    store = str(tmp_path_factory.mktemp("small") / "cubes.zarr")
    for year in (2019, 2020):
        build(store, hole, year, seed=year)
    opened = cube.open_cube(cube.Store(store), "hole").sel(year=[2019, 2020])
    footprint = opened["footprint"].load().copy(data=np.zeros((2, 60, 60), np.uint8))
    footprint[:, 20:40, 10:30] = codes.MINE
    cube.write_footprint(cube.Store(store), "hole", footprint, "drawn")
    cube.write_probability(
        cube.Store(store),
        "hole",
        "net",
        (footprint * 200 + 20).astype(np.uint8),
        {"id": "net", "licence": "MIT"},
    )
    return store


WRITERS = {
    "export": (
        "export",
        "--model",
        "net",
        *(f for name in FORMATS for f in ("--format", name)),
        "--out",
        "out",
    ),
    "score": ("score", "--model", "net", "--baselines", "--out", "out"),
    "tracks": ("tracks", "--model", "net", "--rates", "0.01,0.01", "--out", "out"),
    "release export": ("release", "export", "--out", "out"),
    "pack": ("pack", "--out", "out/cubes.zip"),
}


@pytest.fixture(params=WRITERS)
def writer(request, small, tmp_path, monkeypatch):
    """Return a command that writes below `out`, and the files of an undisturbed run."""
    monkeypatch.chdir(tmp_path)
    command = (*WRITERS[request.param], "--store", small)
    run(*command)
    expected = files_of(Path("out"))
    shutil.rmtree("out")
    return command, expected


def assert_whole(folder, expected):
    """Assert that every file under a final name is whole; hidden folders hold drafts."""
    found = {name: of for name, of in files_of(folder).items() if ".part-" not in name}
    assert found.items() <= expected.items(), {
        name for name, of in found.items() if expected.get(name) != of
    }


def test_a_command_that_stops_at_any_file_goes_on_when_it_is_run_again(writer, monkeypatch):
    """Each run fails one file later than the one before, and finds what that has left."""
    command, expected = writer
    rename, folder = Path.replace, Path("out").absolute()

    def fail_at(last):
        finished = []

        def replace(source, target):
            if Path(target).absolute().is_relative_to(folder) and ".part-" not in str(target):
                finished.append(target)
                assert_whole(folder, expected)
                if len(finished) == last:
                    raise OSError(28, "No space left on device")
            return rename(source, target)

        return replace

    for last in range(1, 200):
        with monkeypatch.context() as patched:
            patched.setattr(Path, "replace", fail_at(last))
            done = CliRunner().invoke(cli, [str(a) for a in command])
        if done.exit_code == 0:  # the command has fewer files than that
            break
        assert done.exit_code == 2, done.exception
        assert done.output.count("error: ") == 1
        assert "No space left on device" in done.output
        assert_whole(folder, expected)
        assert not list(folder.rglob(".*.part-*"))
    assert last > 1
    assert files_of(folder) == expected


@pytest.mark.parametrize("limit", [300, 3000])
def test_a_disk_that_fills_up_leaves_whole_files(writer, limit):
    command, expected = writer
    with largest_file(limit):
        done = CliRunner().invoke(cli, [str(a) for a in command])
    assert done.exit_code in (0, 2), (done.output, done.exception)
    assert_whole(Path("out"), expected)
    run(*command)
    assert files_of(Path("out")) == expected


@contextmanager
def largest_file(limit):
    """Let no file grow beyond so many bytes, which is what a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
