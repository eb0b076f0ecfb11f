"""Format tables as text, and write text and JSON files in one step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TypeVar

import pandas as pd

from minecube.errors import CatalogError
from minecube.files import replacing
from minecube.places import Place, outgoing

PlaceT = TypeVar("PlaceT", bound=Place)


def format_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a plain-text table for logs and terminals, with numbers aligned right."""
    text = [list(map(_format_cell, row)) for row in rows]
    columns = range(len(headings))
    widths = [max(map(len, column)) for column in zip(headings, *text, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in columns]

    def align(text: str, column: int) -> str:
        if numeric[column]:
            return text.rjust(widths[column])
        return text.ljust(widths[column])

    def line(cells: Sequence[str]) -> str:
        return "  ".join(map(align, cells, columns)).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, text)])


def format_markdown(frame: pd.DataFrame) -> str:
    """Format a table of text, with model names as its index, in Markdown."""
    rule = ("---", *["---:"] * len(frame.columns))
    rows = [("model", *frame.columns), rule, *_text_rows(frame)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def format_latex(frame: pd.DataFrame) -> str:
    """Format a table of text, with model names as its index, as a LaTeX tabular for booktabs."""
    rows = [("model", *frame.columns), *_text_rows(frame)]
    head, *body = (" & ".join(map(_escape_latex, row)) + r" \\" for row in rows)
    lines = [
        rf"\begin{{tabular}}{{l{'r' * len(frame.columns)}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
    ]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def write_text(path: PlaceT, text: str, noun: str) -> PlaceT:
    """Write a text file completely or not at all. Returns its path or URL.

    Makes missing folders. The noun of the text, such as "the scores", is for the error.

    Raises CatalogError if the file cannot be written.
    """
    try:
        with outgoing(path) as local:
            local.parent.mkdir(parents=True, exist_ok=True)
            with replacing(local) as draft:
                draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CatalogError(
            f"{path}: {noun} cannot be written ({error.strerror}); name another file"
        ) from error
    return path


def write_json(path: PlaceT, content: object, noun: str) -> PlaceT:
    """Write plain values as indented JSON, as `write_text` does."""
    return write_text(path, json.dumps(content, indent=2) + "\n", noun)


def _format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _text_rows(frame: pd.DataFrame) -> list[tuple[str, ...]]:
    names = map(str, frame.index)
    return [(name, *map(str, row)) for name, row in zip(names, frame.to_numpy(), strict=True)]


def _escape_latex(text: str) -> str:
    return "".join(f"\\{char}" if char in "&%$#_{}" else char for char in text)
