"""Options refuse empty and repeated values, and accept long lists and places of stores."""

from __future__ import annotations

from importlib import import_module

import click
import pytest
from click.testing import CliRunner

from minecube import cube
from minecube.cli import COMMANDS, cli
from minecube.cli.words import check_words
from minecube.errors import PlaceError


def options():
    """All options that take a value, by the words that lead to them."""
    for name in COMMANDS:
        command = getattr(import_module(f"minecube.cli.{name}"), name)
        below = command.commands.items() if isinstance(command, click.Group) else ()
        for words, one in (((name,), command), *(((name, under), sub) for under, sub in below)):
            for param in one.params:
                if isinstance(param, click.Option) and not param.is_flag:
                    yield words, param


def test_the_help_of_a_choice_of_policies_names_them():
    (help_text,) = [param.help for _, param in options() if param.name == "on_offset_conflict"]
    for policy in ("warn", "fix", "drop", "fail"):
        assert f"{policy}: " in help_text


def test_no_option_is_empty_or_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = 0
    for words, param in options():
        option = param.opts[-1]
        for blank in ("", " "):
            need_refusal([*words, option, *[blank] * param.nargs], option, "found an empty one")
        if not param.multiple:
            need_refusal(
                [*words, *[option, *["x"] * param.nargs] * 2], option, "found several times"
            )
        asked += 1
    assert asked > 90
    assert list(tmp_path.iterdir()) == []


def need_refusal(words, option, said):
    done = CliRunner().invoke(cli, words)
    assert isinstance(done.exception, SystemExit), words
    assert done.exit_code == 2
    assert f"'{option}'" in done.stderr
    assert said in done.stderr


def test_words_that_may_be_long_or_several():
    context = click.Context(cli)
    command = import_module("minecube.cli.export").export
    check_words(
        context,
        command,
        "export",
        ["--store", "s3://b/" + "x" * 999, "--format", "cog", "--format", "netcdf"],
    )
    check_words(
        context,
        command,
        "export",
        ["--sites", ",".join(["Germany_1"] * 99), "--store", "/".join(["folder"] * 99)],
    )


@pytest.mark.parametrize(
    "store", ["cubes.zarr", "/data/cubes.zarr", "s3://b/x", "gs://b/x", "az://c/x", "a b", "C:/x"]
)
def test_places_that_may_hold_a_store(store, monkeypatch):
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    assert (cube.Store(store).path is None) == ("://" in store)


def test_an_endpoint_that_is_no_url(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "s3.example.org")
    with pytest.raises(PlaceError, match=r"AWS_ENDPOINT_URL is 's3.example.org'; expected the URL"):
        cube.Store("s3://bucket/x").client()
    cube.Store("gs://bucket/x").client()
