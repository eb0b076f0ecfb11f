"""The Python API of whole jobs: its names, what importing it loads, and that it needs no command line."""

from __future__ import annotations

import pkgutil
import platform
import subprocess
import sys

import pytest

from minecube import jobs

MODULES = sorted(module.name for module in pkgutil.iter_modules(jobs.__path__))


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_loads_neither_dask_nor_torch():
    heavy = {"torch", "dask", "distributed", "stackstac", "click"}
    code = f"import sys, minecube.jobs; print(sorted({heavy} & set(sys.modules)))"
    assert python(code) == "[]"


def test_no_job_needs_the_command_line():
    """No job imports commands or progress bars, and nothing is printed."""
    imports = "; ".join(f"import minecube.jobs.{name}" for name in MODULES)
    hide = "import sys; sys.modules |= dict.fromkeys(('rich', 'minecube.cli'))"
    assert python(f"{hide}; {imports}") == ""


def test_every_public_name_is_there_and_none_is_a_module():
    """A module of the same name would take its place once it is imported."""
    assert list(jobs.__all__) == sorted(jobs.__all__)
    assert not set(jobs.__all__) & set(MODULES)
    for name in jobs.__all__:
        assert callable(getattr(jobs, name))
        assert getattr(jobs, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'engine'"):
        _ = jobs.engine


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_that_is_kept_is_not_given_anew():
    """By page faults while 80 MB are taken and freed, again and again."""
    program = """
import resource, sys, numpy
from minecube.jobs.memory import keep_memory
if sys.argv[1] == "kept":
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [numpy.ones(2**18) for _ in range(40)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    asked = [
        subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True)
        for how in ("kept", "freed")
    ]
    kept, freed = (int(done.stdout) for done in asked)
    assert freed > 100
    assert kept < freed / 20
