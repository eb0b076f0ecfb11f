"""Build sites x years, or map sites, on a Dask cluster.

The workers are processes of this machine, or belong to a scheduler.

    python workflows/cluster.py --workers 4 -- build --sites my_mines.geojson --years 2019-2023 \\
        --source earth-search --store cubes.zarr
    python workflows/cluster.py --workers 4 -- predict --store cubes.zarr --model model.pt
    python workflows/cluster.py --scheduler tcp://10.0.0.1:8786 -- build --sites ...

After `--` comes `minecube build` or `minecube predict` without the word minecube. All workers
must see the same files: catalogue, scene lists, model and store.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distributed import LocalCluster

from minecube.cli import main as minecube


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command on the cluster and exit with its code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--workers", type=int, help="start this many worker processes here")
    place.add_argument("--scheduler", help="address of a Dask scheduler")
    parser.add_argument("command", choices=("build", "predict"), help="of minecube, after --")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command")
    options = parser.parse_args(argv)
    if options.workers is not None and options.workers < 1:
        parser.error(
            f"--workers {options.workers}: expected 1 or more; no task begins without a worker"
        )
    command = [options.command, *options.arguments, "--scheduler"]
    if options.scheduler:
        minecube([*command, options.scheduler])
    # Each worker runs one task at a time: a site-year has its own reading threads and memory.
    with LocalCluster(
        n_workers=options.workers, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        minecube([*command, cluster.scheduler_address])


if __name__ == "__main__":
    main()
