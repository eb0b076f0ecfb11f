"""Pages name only files, commands, options and Python names that exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from minecube.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / name / "README.md" for name in ("catalog", "workflows", "findings")),
    ]
)


def blocks(text, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(params=PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def page(request):
    return request.param


def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    files = [link.partition("#")[0] for link in links if not link.startswith(("http", "#"))]
    assert [file for file in files if not (page.parent / file).exists()] == []


def test_commands_and_options_exist(page):
    context = click.Context(cli)
    for block in blocks(page.read_text(), ""):
        for line in re.findall(r"^minecube +[a-z].*", block, flags=re.MULTILINE):
            _, name, *words = shlex.split(line, comments=True)
            command = cli.get_command(context, name)
            assert command is not None, line
            while isinstance(command, click.Group) and words:
                command = command.get_command(context, words.pop(0))
            options = {option for p in command.params for option in p.opts} | {"--help"}
            assert {w for w in words if w.startswith("--")} <= options, line


def test_python_examples_parse_and_import(page):
    for block in blocks(page.read_text(), "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("minecube"):
                module = importlib.import_module(node.module)
                assert [a.name for a in node.names if not hasattr(module, a.name)] == []


def test_python_names_exist(page):
    for name in re.findall(r"`(minecube(?:\.\w+)+)\b", page.read_text()):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name
