"""Help, options and lists of the command line, and one sentence for each misuse."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing

import pytest

from known_builds import run, run_here
from minecube.cli import COMMANDS


def commands():
    """All commands and subcommands that take options, by name."""
    for name in COMMANDS:
        command = getattr(importlib.import_module(f"minecube.cli.{name}"), name)
        yield name, command
        for below, subcommand in getattr(command, "commands", {}).items():
            yield f"{name} {below}", subcommand


def test_every_option_reaches_its_command():
    """By its own name, or as a field of a dataclass that the command receives."""
    collected = 0
    for name, command in commands():
        function = command.callback
        if not hasattr(function, "__wrapped__") or name.startswith("models"):
            continue
        options = {param.name for param in command.params if param.expose_value}
        hints = typing.get_type_hints(function.__wrapped__)
        fields = [
            {field.name for field in dataclasses.fields(hints[parameter])}
            for parameter in set(hints) - options - {"return"}
        ]
        assert options <= set(hints).union(*fields), name
        for parameter in set(hints) - options - {"return"}:  # none is missing without a default
            for field in dataclasses.fields(hints[parameter]):
                optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
                assert optional or field.name in options, (name, field.name)
        collected += 1
    assert collected > 15


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_shows_an_example(command):
    out, _ = run_here(command, "--help")
    assert "Example" in out
    assert f"minecube {command}" in out
    assert re.search(r"^  Examples?:$", out, re.MULTILINE)  # where help begins, not astray
    assert not re.search(r"\b(XXX|TODO|FIXME)\b", out)


def test_the_list_of_commands():
    out, _ = run("--help")
    listed = out.split("Commands:")[1]
    assert [
        line.split()[0] for line in listed.splitlines() if line.startswith("  ") and line[2] != " "
    ] == list(COMMANDS)


def test_the_list_of_sites_says_which_years():
    out, _ = run_here("sites", "--sites", "demo_1,Austria_1")
    demo, austria = (line.split() for line in out.splitlines()[2:])
    assert demo == [
        "demo_1",
        "Simulated",
        "train",
        "2015,2020,2022",
        "EPSG:32633",
        "384",
        "x",
        "384",
        "px",
    ]
    assert austria == ["Austria_1", "Austria", "train", "2015-2024", "no", "polygon", "yet"]


BAD = {
    "unknown site": (
        ("sites", "--sites", "Atlantis_*"),
        "unknown site 'Atlantis_*'; the catalogue has Austria_1",
    ),
    "no such file": (("sites", "--sites", "mines.geojson"), "mines.geojson: no such file"),
    "years": (
        ("search", "--sites", "demo_1", "--years", "20x", "--source", "cdse"),
        "expected years such as 2019-2023",
    ),
    "years backwards": (
        ("search", "--sites", "demo_1", "--years", "2023-2019", "--source", "cdse"),
        "expected years such as",
    ),
    "unknown source": (
        ("search", "--sites", "demo_1", "--years", "2020", "--source", "nasa"),
        "unknown source 'nasa'; there is: cdse, earth-",
    ),
    "unknown command": (("fly",), "No such command 'fly'"),
    "no store": (
        ("export", "--store", "nowhere.zarr", "--out", "x"),
        "nowhere.zarr: there is no store",
    ),
    "no model": (
        ("train", "--store", "nowhere.zarr", "--out", "x", "--model", "gpt"),
        "unknown model 'gpt'; there is: a2net",
    ),
    "no polygons": (("label", "--store", "nowhere.zarr", "--polygons", "no.gpkg"), "no.gpkg"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_use(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, said = BAD[case]
    out, err = run_here(*arguments, ok=2)
    assert said in out + err
    assert list(tmp_path.iterdir()) == []
