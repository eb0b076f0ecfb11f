"""Check the words of a command line: repeated options, empty words, and too long names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click

_LONGEST = 255
"""Most bytes of a file name on common file systems. Sites and models give folders their names."""


def check_words(
    parent: click.Context, command: click.Command, name: str, words: Sequence[str]
) -> None:
    """Check the words given to a command and to its subcommands.

    Raises:
        click.UsageError: a single-value option is given twice, or a word is empty or too long.
    """
    ctx = command.context_class(command, info_name=name, parent=parent)
    values, arguments, order = command.make_parser(ctx).parse_args(list(words))
    if isinstance(command, click.Group) and arguments:
        subcommand = command.get_command(ctx, arguments[0])
        if subcommand:
            check_words(ctx, subcommand, arguments[0], arguments[1:])
    for param in order:
        if order.count(param) > 1 and not _takes_several(param):
            raise click.BadParameter(
                "expected once, found several times; keep one of them", ctx=ctx, param=param
            )
        for word in _texts(values.get(param.name or "")):
            _check_word(word, ctx, param)


def _takes_several(param: click.Parameter) -> bool:
    return param.multiple or getattr(param, "count", False) or getattr(param, "is_flag", False)


def _texts(value: Any) -> list[str]:
    """List the words of an option, for single, repeated and multiple values."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return []


def _check_word(word: str, ctx: click.Context, param: click.Parameter) -> None:
    if not word.strip():
        raise click.BadParameter(
            "expected a value, found an empty one; give one, or leave the option out",
            ctx=ctx,
            param=param,
        )
    if "://" in word:  # URLs may have long signatures
        return
    longest = max(len(part.encode(errors="replace")) for part in re.split("[,/]", word))
    if longest > _LONGEST:
        raise click.BadParameter(
            f"expected names of up to {_LONGEST} characters, found one of {longest:,}; shorten it",
            ctx=ctx,
            param=param,
        )
