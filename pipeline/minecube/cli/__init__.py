"""The command line: one subcommand per stage, and `demo` for all stages.

Only this package and workflows/ combine stages.

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
from minecube.cli.explain import exit_code_of, explain, one_line
from minecube.cli.words import check_words
from minecube.errors import MinecubeError

log = logging.getLogger(__name__)

INTERNAL_ERROR = 70
"""Exit code for an error of minecube itself: EX_SOFTWARE of <sysexits.h>."""

# Subcommand -> (module, summary). `minecube --help` shows the summaries without loading the modules.
COMMANDS = {
    "sites": ("minecube.cli.data", "List the sites of the catalogue or of a file."),
    "simulate": ("minecube.cli.data", "Simulate a Sentinel-2 archive with known truth."),
    "search": ("minecube.cli.survey", "Search the scenes of sites and years, and save the lists."),
    "audit": (
        "minecube.cli.survey",
        "Compare what sources list with the passes expected from the orbits.",
    ),
    "plan": (
        "minecube.cli.survey",
        "Estimate the requests, bytes, memory, time and cost of a build.",
    ),
    "release": (
        "minecube.cli.release",
        "Import, audit or re-create the published EuroMineNet archive.",
    ),
    "build": ("minecube.cli.data", "Composite scenes into annual cubes."),
    "polygons": ("minecube.cli.polygons", "Check, repair and compare mine polygons."),
    "label": ("minecube.cli.data", "Draw mine polygons on the grids of the cubes."),
    "models": ("minecube.cli.models", "List the networks, or show the card of one."),
    "train": ("minecube.cli.learn", "Train a network on labelled cubes."),
    "predict": ("minecube.cli.predict", "Map mines or their changes with a trained network."),
    "tracks": ("minecube.cli.tracks", "Smooth maps through time; date openings and growth."),
    "score": ("minecube.cli.score", "Compare predictions with labels."),
    "bench": ("minecube.cli.bench", "Train, apply and score several networks on one split."),
    "export": (
        "minecube.cli.results",
        "Export COGs, NetCDF, Zarr, GeoParquet, STAC, Croissant and pictures.",
    ),
    "publish": ("minecube.cli.publish", "Save releases of a store in Icechunk, and compare them."),
    "verify": (
        "minecube.cli.verify",
        "Check a store against its checksums and list what to rebuild.",
    ),
    "pack": ("minecube.cli.verify", "Pack a store into one read-only zip file."),
    "demo": ("minecube.cli.demo", "Run the whole pipeline on a simulated world and score it."),
}

# Missing module -> (display name, extra that installs it).
EXTRAS = {
    "torch": ("PyTorch", "torch"),
    "icechunk": ("Icechunk", "publish"),
    "segmentation_models_pytorch": ("segmentation-models-pytorch", "models"),
    "timm": ("timm", "models"),
    "transformers": ("transformers", "models"),
}

# Subcommand -> what to do after an interruption.
_AGAIN = "run the same command again"
AFTER_INTERRUPT = {
    "build": f"committed years are safe; {_AGAIN} to resume",
    "predict": f"committed years are safe; {_AGAIN} to resume",
    "bench": f"finished models and maps are safe; {_AGAIN} to resume",
    "train": f"finished epochs are safe; {_AGAIN} with --resume",
    "demo": "remove the folder of --out before you run it again",
}


def _missing(error: ModuleNotFoundError, command: str) -> Exception:
    """Return an install hint for an optional package; return any other import error unchanged."""
    if error.name not in EXTRAS:
        return error
    package, extra = EXTRAS[error.name]
    return click.UsageError(
        f"`minecube {command}` needs {package}: pip install 'minecube[{extra}]'"
    )


class _Stages(click.Group):
    """A group of subcommands, each loaded at its first call."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click passes it
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        try:
            module = importlib.import_module(COMMANDS[cmd_name][0])
        except ModuleNotFoundError as error:
            raise _missing(error, cmd_name) from error
        # Exclude the 200,000 objects of imported modules from garbage collection.
        # Collections of them take a fifth of the time of a search in a file of items.
        gc.freeze()
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])

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
            raise _missing(error, ctx.invoked_subcommand or "") from error
        except KeyboardInterrupt:
            click.echo(
                f"interrupted; {AFTER_INTERRUPT.get(ctx.invoked_subcommand or '', _AGAIN)}",
                err=True,
            )
            ctx.exit(130)
        except Exception as error:
            said = explain(error)
            if said is None:
                raise
            log.info("%s: %s", type(error).__name__, one_line(error), exc_info=True)
            _fail(ctx, said, exit_code_of(error))


def _fail(ctx: click.Context, text: str, code: int) -> NoReturn:
    click.echo(f"error: {text}", err=True)
    ctx.exit(code)


@click.group(cls=_Stages, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="minecube")
@click.option(
    "-v",
    "--verbose",
    is_flag=True,
    help="Print more: refused scenes with reasons, and what is resumed.",
)
def cli(verbose: bool) -> None:
    """Build cloud-free annual Sentinel-2 cubes of mines, map the mines, and measure how they change.

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
    ours = logging.getLogger("minecube")
    ours.handlers = [handler]
    ours.setLevel(level)
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
            f"internal error: {type(error).__name__}: {one_line(error)}; please report it, with the traceback that "
            "`minecube -v` prints",
            err=True,
        )
        sys.exit(INTERNAL_ERROR)
