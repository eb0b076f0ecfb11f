"""What is shipped: a wheel that works from anywhere, requirements said once, imports that stay light."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
import yaml

import minecube
from minecube.catalog import load_sites

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Where conda-forge calls a package otherwise than PyPI does.
CONDA = {"dask": "dask-core", "matplotlib": "matplotlib-base", "torch": "pytorch"}


def split(requirement):
    name, _, versions = re.fullmatch(
        r"([A-Za-z0-9_.-]+)(\[.*\])?\s*([<>=!~].*)?", requirement
    ).groups()
    return name, versions or ""


def test_environment_yml_names_what_pyproject_needs():
    extras = PROJECT["optional-dependencies"]
    needed = {split(r) for r in [*PROJECT["dependencies"], *extras["torch"], *extras["cluster"]]}
    listed = {
        split(r) for r in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    }
    assert listed == {(CONDA.get(n, n), v) for n, v in needed} | {
        ("python", PROJECT["requires-python"])
    }


def test_every_requirement_is_pinned_for_the_tests():
    pinned = {
        split(line)[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    wanted = [
        *PROJECT["dependencies"],
        *(r for e in ("torch", "cluster", "dev") for r in PROJECT["optional-dependencies"][e]),
    ]
    assert {split(r)[0].lower() for r in wanted} <= pinned


def test_every_extra_that_texts_name_is_declared():
    files = [
        p
        for folder in ("pipeline", "docs", "workflows", "catalog")
        for p in (ROOT / folder).rglob("*.*")
    ]
    texts = [
        p.read_text() for p in [*files, ROOT / "README.md"] if p.suffix in {".py", ".md", ".yaml"}
    ]
    named = {extra for text in texts for extra in re.findall(r"minecube\[([a-z]+)\]", text)}
    assert named <= set(PROJECT["optional-dependencies"])
    assert named >= {"torch", "models", "cluster", "publish"}


def test_the_extra_all_holds_every_extra_for_users():
    extras = PROJECT["optional-dependencies"]
    (everything,) = extras["all"]
    inside = set(re.fullmatch(r"minecube\[(.*)\]", everything)[1].split(","))
    assert inside == set(extras) - {"all", "dev"}


def test_importing_it_loads_neither_dask_nor_torch():
    heavy = {"torch", "dask", "distributed", "stackstac"}
    code = f"import sys, minecube; minecube.Site; print(sorted({heavy} & set(sys.modules)))"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_every_public_name_is_there():
    assert list(minecube.__all__) == sorted(minecube.__all__)
    for name in minecube.__all__:
        assert callable(getattr(minecube, name))
    with pytest.raises(AttributeError, match="no attribute 'engine'"):
        _ = minecube.engine


@pytest.mark.slow
def test_the_wheel_works_from_an_empty_folder(tmp_path):
    """Built, installed in a new environment, run where no checkout is; its requirements are this environment's."""
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("minecube-*.whl")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel],
        check=True,
        capture_output=True,
    )
    (folder,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    here = next(p for p in map(Path, sys.path) if p.name == "site-packages")
    # A .pth file would bring this environment's editable minecube along, too; a plain path does not.
    (folder / "requirements.pth").write_text(f"{here}\n")
    (empty := tmp_path / "empty").mkdir()

    def run(*arguments):
        command = [str(tmp_path / "venv" / "bin" / "minecube"), *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=True,
            cwd=empty,
            env={"PATH": "/usr/bin:/bin"},
        ).stdout

    asked = [python, "-c", "import minecube; print(minecube.__file__)"]
    where = subprocess.run(asked, capture_output=True, text=True, cwd=empty, check=True)
    assert str(tmp_path) in where.stdout
    assert "Commands:" in run("--help")
    assert len(run("sites").splitlines()) == len(load_sites()) + 2
    assert list(empty.iterdir()) == []
