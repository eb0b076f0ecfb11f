"""Errors and log lines reach the user as one sentence each."""

from __future__ import annotations

import subprocess
import sys
import types
from concurrent.futures import CancelledError

import click
import obstore.exceptions
import pytest
from distributed.scheduler import KilledWorker

from minecube.catalog.fields import FieldError
from minecube.cli import COMMANDS, cli
from minecube.jobs.failures import exit_code_of, explain


def test_errors_that_are_explained():
    """By classes of the libraries themselves."""
    killed = KilledWorker("build_year-1", None, 3)
    assert (
        "a worker died on it 4 times, most often for lack of memory; give each worker more memory"
        in explain(killed)
    )
    assert "the Dask scheduler is gone; committed site-years are safe" in explain(CancelledError())
    dump = "Generic S3 error: Error performing GET http://h/x in 1.7s, after 9 retries, max_retries: 9, retry_timeout: 9s  - no"
    said = explain(
        obstore.exceptions.GenericError(dump + "\n\nDebug source:\nGeneric {\n    store: 1\n}")
    )
    assert "(Generic S3 error: Error performing GET http://h/x - no)" in said
    assert explain(OSError(28, "No space left on device", "/x")).startswith(
        "/x: No space left on device; "
    )
    assert explain(FieldError("field 'href': expected a URL")) == "field 'href': expected a URL"
    assert exit_code_of(FieldError()) == exit_code_of(RecursionError()) == 2
    assert exit_code_of(OSError(28, "No space left on device")) == exit_code_of(MemoryError()) == 1
    assert explain(BrokenPipeError(32, "Broken pipe")) is None
    for ours in (KeyError("x"), AssertionError(), click.UsageError("x"), RuntimeError("x")):
        assert explain(ours) is None


ADDED = """
import logging, sys, types, warnings
import click
from minecube import cli
def add(command):
    cli.COMMANDS[command.name] = "A command for this test."
    module = types.SimpleNamespace(**{command.name: command})
    sys.modules[f"minecube.cli.{command.name}"] = module
"""
BUG = f"""{ADDED}
@add
@click.command()
def wrong():
    raise ZeroDivisionError("nobody expects this")
cli.main(sys.argv[1:])
"""


def test_a_bug_of_ours_is_one_sentence_and_a_traceback_when_asked():
    plain, loud = (
        subprocess.run([sys.executable, "-c", BUG, *more, "wrong"], capture_output=True, text=True)
        for more in ([], ["-v"])
    )
    (line,) = plain.stderr.splitlines()
    assert line.startswith(
        "internal error: ZeroDivisionError: nobody expects this; please report it"
    )
    assert "Traceback" in loud.stderr
    assert line in loud.stderr
    assert plain.returncode == loud.returncode == 70


def test_callers_in_python_see_the_error_itself(monkeypatch):
    @click.command()
    def wrong():
        raise ZeroDivisionError

    monkeypatch.setitem(COMMANDS, "wrong", "A command for this test.")
    monkeypatch.setitem(sys.modules, "minecube.cli.wrong", types.SimpleNamespace(wrong=wrong))
    with pytest.raises(ZeroDivisionError):
        cli.main(["wrong"], standalone_mode=False)


LOGS = f"""{ADDED}
@add
@click.command()
def noisy():
    for name in ("urllib3", "distributed.client", "rasterio._env", "botocore", "pystac", "asyncio"):
        logging.getLogger(name).error("noise of %s", name)
    warnings.warn("noise of a library")
    logging.getLogger("minecube.scenes").warning("our warning")
    logging.getLogger("minecube.scenes").info("our news")
cli.main(sys.argv[1:])
"""


def test_only_our_log_is_shown():
    plain, loud = (
        subprocess.run([sys.executable, "-c", LOGS, *more, "noisy"], capture_output=True, text=True)
        for more in ([], ["-v"])
    )
    assert plain.stderr.splitlines() == ["WARNING our warning"]
    assert loud.stderr.splitlines() == ["WARNING our warning", "INFO our news"]
