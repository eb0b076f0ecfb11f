"""A command that is interrupted, or loses its Dask scheduler, ends with one sentence."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from known_bad_inputs import BUILD, STORE, make_world
from known_builds import messages_in
from known_run_failures import write_dataset
from minecube import cube


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


# The command says on standard error that all is imported, so that the signal meets the command at work.
INTERRUPTED = """
import sys
import time
from importlib import import_module
from minecube.cli import main
import_module(f"minecube.cli.{sys.argv[1]}")
print("ready", file=sys.stderr, flush=True)
main()
"""


@pytest.mark.parametrize(
    ("line", "seconds", "said"),
    [
        (f"tracks {STORE} --model m --out new", 0.3, "interrupted; run the same command again"),
        ("simulate --sites demo_1 --out new", 2, "interrupted; run the same command again"),
        (
            f"train {STORE} --epochs 500 --out m.pt",
            3,
            "finished epochs are safe; run the same command again with --resume",
        ),
        ("demo --out new", 2, "remove the folder of --out"),
    ],
    ids=lambda value: str(value).split(" ")[0],
)
def test_an_interrupt_is_one_sentence(world, tmp_path, line, seconds, said):
    words = [word.format(w=world) for word in shlex.split(line)]
    if words[0] == "tracks":
        words[2] = _with_a_map(world, tmp_path)
    command = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert command.stderr.readline() == "ready\n"
        time.sleep(seconds)
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=30)
    finally:
        command.kill()
        command.communicate()
    (sentence,) = messages_in(err)
    assert said in sentence
    assert command.returncode == 130
    assert not (tmp_path / "m.pt").exists()


# Each search takes a second, and there are more of them than the command may wait for.
SLOW_SEARCHES = """
import sys
import time
from minecube import scenes
from minecube.cli import main

def search(*args):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(1)
    raise scenes.NoScenesError("none", None)

scenes.search = search
main()
"""


def test_sigterm_ends_the_searches_of_an_update_as_a_run(world, tmp_path):
    dataset = write_dataset(tmp_path, world, years="2016-2023")
    command = subprocess.Popen(
        [sys.executable, "-c", SLOW_SEARCHES, "update", dataset],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while command.stderr.readline() != "ready\n":
            assert command.poll() is None
        command.send_signal(signal.SIGTERM)
        start = time.monotonic()
        _, err = command.communicate(timeout=30)
    finally:
        command.kill()
        command.communicate()
    assert time.monotonic() - start < 7  # of the eight seconds of one site
    lines = [line for line in err.splitlines() if line != "ready"]
    assert lines == ["interrupted; finished steps are safe; run the same command again to resume"]
    assert command.returncode == 130


def _with_a_map(world, folder):
    """Copy the store, and put a map by model `m` into the copy."""
    store = str(folder / "mapped.zarr")
    shutil.copytree(world / "cubes.zarr", store)
    for site in "abc":
        footprint = cube.open_committed(cube.Store(store), site)["footprint"].load()
        cube.write_probability(cube.Store(store), site, "m", footprint * np.uint8(250), {"id": "m"})
    return store


def test_a_scheduler_that_dies_is_one_sentence(world, tmp_path):
    """It has no worker, so the build waits for it; without it, the same command builds."""
    pytest.importorskip("distributed")
    address = tmp_path / "scheduler.json"
    start = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
    ]
    scheduler = subprocess.Popen(
        [*start, "--scheduler-file", str(address)], stderr=subprocess.DEVNULL
    )
    words = [word.format(w=world) for word in shlex.split(f"build {BUILD} --store new.zarr")]
    command = [sys.executable, "-c", "from minecube.cli import main; main()", *words]
    build = None
    try:
        _wait_for(address)
        given = ["--scheduler", json.loads(address.read_text())["address"]]
        build = subprocess.Popen(
            [*command, *given],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        _wait_for(tmp_path / "new.zarr" / "a")
        time.sleep(2)
        scheduler.kill()
        out, err = build.communicate(timeout=40)
    finally:
        for process in filter(None, (scheduler, build)):
            process.kill()
            process.wait()
    told = "error: the Dask scheduler is gone; committed site-years are safe, so start it and run the same command again"
    assert (build.returncode, out, messages_in(err)) == (1, "", [told])
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "built" in again.stdout


def _wait_for(path):
    until = time.monotonic() + 40
    while not path.exists() or (path.suffix == ".json" and not path.read_text().endswith("}")):
        assert time.monotonic() < until
        time.sleep(0.1)
