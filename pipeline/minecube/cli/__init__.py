"""The command line: one module per subcommand, with its options and what it prints.

`minecube.jobs` does the work. Nothing imports this package.

Exit codes: 0 done, 1 something failed (a site-year, a server, a disk), 2 bad use, 70 an error of
minecube itself, 130 interrupted. Every error is one sentence on standard error. `-v` adds the
traceback of unexpected errors.
"""

from __future__ import annotations

import gc
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from minecube import network
from minecube.cli.extras import explain_missing
from minecube.cli.words import check_words
from minecube.errors import MinecubeError
from minecube.jobs.failures import exit_code_of, explain, one_line

log = logging.getLogger(__name__)

INTERNAL_ERROR = 70
"""Exit code for an error of minecube itself: EX_SOFTWARE of <sysexits.h>."""

# `minecube --help` shows these without loading the modules.
COMMANDS = {
    "sites": "List the sites of the catalogue or of a file.",
    "simulate": "Simulate a Sentinel-2 archive with known truth.",
    "search": "Search the scenes of sites and years, and save the lists.",
    "audit": "Compare what sources list with the passes expected from the orbits.",
    "plan": "Estimate the requests, bytes, memory, time and cost of a build.",
    "release": "Import, audit or re-create the published EuroMineNet archive.",
    "run": "Run all steps of a whole dataset, and resume them.",
    "status": "Show the state of a dataset or a store.",
    "retry": "Try the failed parts of a run again.",
    "update": "Add years, sites and new scenes to a dataset.",
    "build": "Composite scenes into annual cubes.",
    "polygons": "Check, repair and compare mine polygons.",
    "label": "Draw mine polygons on the grids of the cubes.",
    "models": "List the networks, or show the card of one.",
    "train": "Train a network on labelled cubes.",
    "predict": "Map mines or their changes with a trained network.",
    "tracks": "Smooth maps through time; date openings and growth.",
    "score": "Compare predictions with labels.",
    "bench": "Train, apply and score several networks on one split.",
    "export": "Export COGs, NetCDF, Zarr, GeoParquet, STAC, Croissant and pictures.",
    "publish": "Save a version of a store in Icechunk.",
    "versions": "List published versions, compare them, and go back.",
    "verify": "Check a store against its checksums and list what to rebuild.",
    "pack": "Pack a store into one read-only zip file.",
    "demo": "Run the whole pipeline on a simulated world and score it.",
}
"""Subcommand -> summary. The module `minecube.cli.NAME` has the subcommand NAME."""

_AGAIN = "run the same command again"
AFTER_INTERRUPT = {
    "run": f"finished steps are safe; {_AGAIN} to resume",
    "retry": f"finished steps are safe; {_AGAIN} to resume",
    "update": f"finished steps are safe; {_AGAIN} to resume",
    "build": f"committed years are safe; {_AGAIN} to resume",
    "predict": f"committed years are safe; {_AGAIN} to resume",
    "bench": f"finished models and maps are safe; {_AGAIN} to resume",
    "train": f"finished epochs are safe; {_AGAIN} with --resume",
    "demo": "remove the folder of --out before you run it again",
}
"""Subcommand -> what to do after an interruption."""


class _Commands(click.Group):
    """A group of subcommands, each loaded at its first call."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click passes it
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        del ctx  # click passes it
        if cmd_name not in COMMANDS:
            return None
        # Imports make 200,000 objects that stay. Collections of them take an eighth of the time of
        # the imports, and a fifth of that of a search in a file of items.
        gc.disable()
        try:
            module = importlib.import_module(f"{__name__}.{cmd_name}")
        except ModuleNotFoundError as error:
            raise explain_missing(error, cmd_name) from error
        finally:
            gc.freeze()
            gc.enable()
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        del ctx  # click passes it
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, words = super().resolve_command(ctx, args)
        if name and command:
            check_words(ctx, command, name, words)
        return name, command, words

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MinecubeError as error:
            _fail(ctx, one_line(error), error.exit_code)
        except ModuleNotFoundError as error:  # libraries of networks are loaded late
            raise explain_missing(error, ctx.invoked_subcommand or "") from error
        except KeyboardInterrupt:
            click.echo(
                f"interrupted; {AFTER_INTERRUPT.get(ctx.invoked_subcommand or '', _AGAIN)}",
                err=True,
            )
            ctx.exit(130)
        except Exception as error:
            text = explain(error)
            if text is None:
                raise
            log.info("%s: %s", type(error).__name__, one_line(error), exc_info=True)
            _fail(ctx, text, exit_code_of(error))


def _fail(ctx: click.Context, text: str, code: int) -> NoReturn:
    click.echo(f"error: {text}", err=True)
    ctx.exit(code)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="minecube")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Print more: refused scenes with reasons, and what is resumed.",
)
def cli(verbose: bool) -> None:
    """Build cloud-free annual Sentinel-2 cubes of mines, map the mines, and measure how they
    change.

    \b
    Example, the whole job on your own polygons:
      minecube build --sites my_mines.geojson --years 2019-2023 --source earth-search --store cubes.zarr
    """
    network.forget_unreachable()
    _log_to_stderr(logging.INFO if verbose else logging.WARNING)
    if not sys.warnoptions:  # set by python -W and PYTHONWARNINGS
        # Hide third-party deprecations from users. The tests turn them into errors.
        warnings.simplefilter("ignore")


def _log_to_stderr(level: int) -> None:
    """Show only minecube's log lines on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    logger = logging.getLogger("minecube")
    logger.handlers = [handler]
    logger.setLevel(level)
    # Without a handler, logging prints the warnings of other libraries.
    logging.getLogger().addHandler(logging.NullHandler())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code.

    Report an error of minecube itself in one sentence.
    """
    try:
        cli.main(args=argv, prog_name="minecube")
    except Exception as error:
        log.info("the error in full:", exc_info=True)
        click.echo(
            f"internal error: {type(error).__name__}: {one_line(error)}; "
            "please report it, with the traceback that `minecube -v` prints",
            err=True,
        )
        sys.exit(INTERNAL_ERROR)
