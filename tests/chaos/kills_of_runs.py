"""Disturb `minecube run` at random moments, run it again, and compare with an undisturbed run.

    python tests/chaos/kills_of_runs.py --kills 200 --json tally.json
    python tests/chaos/kills_of_runs.py --kills 20 --kinds worker,driver --seed 7

Each trial disturbs runs of one tiny dataset of two sites and two years, until it is finished:

    worker      SIGKILL of a worker process
    driver      SIGKILL of `minecube run` itself; its workers must end
    machine     SIGKILL of `minecube run` and all of its workers
    scheduler   SIGKILL of the Dask scheduler
    dask-worker SIGKILL of a Dask worker; its nanny starts another one
    disk        a full disk below the store; needs root for a small tmpfs
    store       an S3 server that stops answering for some seconds
    clock       SIGKILL of `minecube run`; each run has another wrong wall clock, by up to two days;
                needs Debian's package libfaketime
    two         two runs at once on one dataset; one of them is killed

After each disturbance, every committed site-year and map equals that of the undisturbed run. At the
end of a trial, another `minecube run` exits with 0, and the script checks:

- All pixels, labels and maps, and the files of the results, equal those of the undisturbed run.
- `verify` finds no damage, and no lock is left.
- No finished unit was started again. At most the units in the hands of dead workers were repeated.
- Every line of the event logs is JSON, apart from lines that a full disk has cut.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import random
import sys
import tempfile
import time
import types
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from moto.server import ThreadedMotoServer

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
import disturbances
from run_trials import FEW_STEPS, Place, Trial, Undisturbed, run_undisturbed

from known_runs import make_run_world

KINDS: dict[str, Callable[[Trial, random.Random], int]] = {
    "worker": disturbances.kill_workers,
    "driver": disturbances.kill_drivers,
    "two": disturbances.kill_one_of_two,
    "machine": disturbances.kill_machines,
    "clock": disturbances.kill_with_wrong_clocks,
    "disk": disturbances.fill_disk,
    "store": disturbances.stop_store,
    "dask-worker": disturbances.kill_dask_workers,
    "scheduler": disturbances.kill_scheduler,
}
_COUNTED = ("worker", "driver", "machine", "clock")
"""Kinds of which each disturbance can repeat no more than the units in work."""


class Bucket:
    """An S3 server of this process with a bucket. It keeps its objects while it is stopped."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it prints each request
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        _, self._port = self._server.get_host_and_port()
        os.environ |= {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }
        url = f"http://127.0.0.1:{self._port}/chaos"
        urllib.request.urlopen(urllib.request.Request(url, method="PUT"), timeout=20)

    def start(self) -> None:
        """Start again, at the same port."""
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()

    def stop(self) -> None:
        """Stop to answer."""
        self._server.stop()


@dataclass
class Campaign:
    """Trials of several kinds, one after the other."""

    root: Path
    world: Path
    undisturbed: Undisturbed
    bucket: Bucket | None

    @classmethod
    def prepare(cls, root: Path, kinds: Sequence[str]) -> Campaign:
        """Make the world, and run its dataset undisturbed."""
        bucket = Bucket() if "store" in kinds else None
        start_fork_server()  # after the server: workers need its address
        world = root / "world"
        world.mkdir()
        make_run_world(world)
        options = () if "machine" in kinds else FEW_STEPS  # as in `try_kind`
        return cls(root, world, run_undisturbed(root / "undisturbed", world, options), bucket)

    def try_kind(self, kind: str, number: int, rng: random.Random) -> tuple[int, list[str]]:
        """Run a trial. Returns the number of disturbances, and the problems."""
        folder = self.root / f"{kind}-{number}"
        with self._locate_store(kind, folder) as store:
            if not store:
                return 0, []
            place = Place.make(folder, self.world, store)
            options = () if kind == "machine" else FEW_STEPS
            trial = Trial(place, self.undisturbed, options, self.bucket)
            kills = KINDS[kind](trial, rng)
            trial.finish()
            if kind in _COUNTED:
                trial.check_repeats()
            if kind != "disk":  # a full disk cuts lines
                trial.check_lines()
            if not trial.problems:
                place.remove()
            return kills, trial.problems

    @contextmanager
    def _locate_store(self, kind: str, folder: Path) -> Iterator[str]:
        """Yield the address of a trial's store; empty if this machine cannot have it."""
        if kind == "disk":
            with disturbances.small_disk(self.root / f"disk-of-{folder.name}") as disk:
                yield "" if disk is None else f"{disk}/cubes.zarr"
        elif kind == "store":
            yield f"s3://chaos/{folder.name}.zarr"
        else:
            yield f"{folder}/cubes.zarr"


def start_fork_server() -> None:
    """Start the server of all processes with the pipeline imported."""
    context = multiprocessing.get_context("forkserver")
    modules = ["torch", "minecube.cli.run", "minecube.jobs.runs.mapping", "run_trials"]
    context.set_forkserver_preload(modules)
    forkserver.ensure_running()


def run_campaign(options: types.SimpleNamespace, root: Path) -> dict[str, Any]:
    """Run trials of each kind in turn until there are enough disturbances. Returns the tally."""
    end = time.monotonic() + 60 * options.minutes
    kinds = options.kinds.split(",")
    campaign = Campaign.prepare(root, kinds)
    rng = random.Random(options.seed)
    by_kind: Counter[str] = Counter()
    identical = 0
    examples: list[str] = []
    number = 0
    while by_kind.total() < options.kills and time.monotonic() < end:
        kind = kinds[number % len(kinds)]
        kills, problems = campaign.try_kind(kind, number, rng)
        by_kind[kind] += kills
        identical += 0 if problems else kills
        examples += [f"{kind} {number}: {text}" for text in problems]
        state = "; ".join(problems) or "identical"
        print(f"{kind} {number}: {kills} disturbances, {state}", file=sys.stderr, flush=True)
        number += 1
        if not kills and number > 3 * len(kinds) and not by_kind.total():
            break  # nothing of this can be done here
    return {
        "kills": by_kind.total(),
        "kills_identical": identical,
        "by_kind": dict(by_kind),
        "problems": examples,
    }


def parse_options() -> types.SimpleNamespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="number of disturbances (200)")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"({','.join(KINDS)})")
    parser.add_argument("--minutes", type=float, default=600, help="begin no trial later (600)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (0)")
    parser.add_argument("--json", type=Path, help="write the tally to this file")
    return types.SimpleNamespace(**vars(parser.parse_args()))


if __name__ == "__main__":
    options = parse_options()
    with tempfile.TemporaryDirectory() as folder_name:
        tally = run_campaign(options, Path(folder_name))
    print(json.dumps({key: value for key, value in tally.items() if key != "problems"}))
    if options.json:
        options.json.write_text(json.dumps(tally, indent=2) + "\n")
    sys.exit(bool(tally["problems"]))
