"""Without a terminal, commands print one line with the time per finished part."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from known_builds import PROGRESS, args, make_world, run_here
from minecube.cli.bars import Lines, format_duration


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


def texts(err):
    """The lines without their times."""
    lines = err.splitlines()
    assert all(PROGRESS.match(line) for line in lines), err
    return [line[len("2026-11-30 16:47:25Z ") :] for line in lines]


def without_time_left(lines):
    return [re.sub(r", \d+ s left$", "", line) for line in lines]


def test_time_left_is_the_mean_rate_times_the_remaining_parts(capsys):
    """Parts that end after 60, 240 and 300 s: 3 x 60 s, 2 x 120 s and 1 x 100 s remain."""
    bar = Lines("building", 4, "site-years", clock=iter([1000, 1060, 1240, 1300, 1400]).__next__)
    for year in (2019, 2020, 2021, 2022):
        bar.advance(f"pit {year}")
    assert texts(capsys.readouterr().err) == [
        "building 4 site-years",
        "building 1 of 4: pit 2019, 3 min left",
        "building 2 of 4: pit 2020, 4 min left",
        "building 3 of 4: pit 2021, 2 min left",
        "building 4 of 4: pit 2022",
    ]


def test_only_the_last_fifty_lines_give_the_rate(capsys):
    """A repeated run: 900 parts are skipped at once, then 50 take 60 s each, and 50 remain."""
    times = [0] * 901 + [60 * (part + 1) for part in range(51)]
    bar = Lines("building", 1000, "site-years", clock=iter(times).__next__)
    for _ in range(951):
        bar.advance("pit")
    assert texts(capsys.readouterr().err)[-1] == "building 951 of 1000: pit, 49 min left"


def test_the_searches_before_a_build_say_nothing_of_its_time(capsys):
    """An hour of searches with one failure. Then the first part takes 10 s, and one remains."""
    times = [0, 1800, 3600, 3600, 3610]
    bar = Lines("building", 3, "site-years", clock=iter(times).__next__)
    bar.advance("a 2019, failed: no scene")
    bar.prepare("a 2020 searched")
    bar.advance("a 2020")
    assert texts(capsys.readouterr().err) == [
        "building 3 site-years",
        "building 1 of 3: a 2019, failed: no scene, 1 h 0 min left",
        "building 1 of 3: a 2020 searched",
        "building 2 of 3: a 2020, 10 s left",
    ]


def test_small_parts_print_the_first_the_last_and_one_in_ten_seconds(capsys):
    """A training resumes at step 5; 4 steps in the 12 s between the lines of steps 5 and 9."""
    times = {5: 101, 6: 104, 7: 107, 8: 110, 9: 113, 10: 114}
    bar = Lines("training", None, "parts", clock=iter([100, *times.values()]).__next__)
    for step in times:
        bar.reach(step, 10, "epoch 1")
    assert texts(capsys.readouterr().err) == [
        "training",
        "training 5 of 10: epoch 1",
        "training 9 of 10: epoch 1, 3 s left",
        "training 10 of 10: epoch 1",
    ]


def test_a_new_step_restarts_the_rate(capsys):
    bar = Lines("preparing", None, "parts", clock=iter([0, 500, 600, 620]).__next__)
    bar.reach_step("training a", 1, 2, "")
    bar.reach_step("mapping pit", 1, 5, "")
    bar.reach_step("mapping pit", 3, 5, "")
    assert texts(capsys.readouterr().err)[1:] == [
        "training a 1 of 2",
        "mapping pit 1 of 5",
        "mapping pit 3 of 5, 20 s left",
    ]


def test_notes_within_a_part_print_one_line_in_ten_seconds(capsys):
    bar = Lines("mapping", 2, "sites", clock=iter([0, 4, 11, 12]).__next__)
    for windows in (17, 34, 51):
        bar.show(f"pit, {windows} of 68 windows")
    assert texts(capsys.readouterr().err) == [
        "mapping 2 sites",
        "mapping 0 of 2: pit, 34 of 68 windows",
    ]


def test_an_unknown_number_of_parts_and_a_reason_of_several_lines(capsys):
    bar = Lines("downloading MB", None, "parts", clock=iter([0, 1]).__next__)
    bar.reach(7, 0, "first\nsecond")
    assert texts(capsys.readouterr().err)[1:] == ["downloading MB 7: first second"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (89, "1 min"),
        (3599, "1 h 0 min"),
        (11520, "3 h 12 min"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_a_terminal_has_a_bar_and_results_stay_in_their_pipe():
    """Standard error is a terminal, standard output is none."""
    script = """
from minecube.cli.bars import progress_bar
with progress_bar("mapping", 2, "sites") as bar:
    bar.advance("a note with [/brackets]")
    print("a result")
"""
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert (done.returncode, done.stdout) == (0, b"a result\n")
    assert "1/2" in shown
    assert "a note with [/brackets]" in shown
    assert not PROGRESS.search(shown)


def test_a_killed_build_leaves_its_lines(world, tmp_path):
    """2019 has no scene and fails in the search, long before the others are built."""
    words = args(world, tmp_path / "cubes.zarr", years="2019,2020,2022")
    log = tmp_path / "log"
    with log.open("wb") as err:
        build = subprocess.Popen(
            [sys.executable, "-c", "from minecube.cli import main; main()", "build", *words],
            stdout=subprocess.PIPE,
            stderr=err,
        )
        try:
            while b"pit 2019" not in log.read_bytes():
                assert build.poll() is None, log.read_text()
                time.sleep(0.05)
        finally:
            build.kill()
            out, _ = build.communicate()
    assert (build.returncode, out) == (-signal.SIGKILL, b"")
    first, second = texts(log.read_text())[:2]
    assert first == "building 3 site-years"
    assert second.startswith("building 1 of 3: pit 2019, failed: no scene of 2019 over pit")


def test_every_site_year_of_a_build_has_a_line(world, tmp_path):
    years = args(world, tmp_path / "cubes.zarr")
    _, err = run_here("build", *years)
    lines = without_time_left(texts(err))
    assert lines[0] == "building 2 site-years"
    assert {line.rpartition(": ")[2] for line in lines[1:]} == {"pit 2020", "pit 2022"}
    assert [line.partition(":")[0] for line in lines[1:]] == ["building 1 of 2", "building 2 of 2"]
    _, err = run_here("build", *years)
    notes = {line.rpartition(": ")[2] for line in without_time_left(texts(err))[1:]}
    assert notes == {"pit 2020, kept", "pit 2022, kept"}
    _, err = run_here("label", "--store", tmp_path / "cubes.zarr", "--polygons", outlines(world))
    assert texts(err) == ["labelling 1 sites", "labelling 1 of 1: pit"]


def outlines(world):
    return world / "archive" / "truth_footprints.parquet"
