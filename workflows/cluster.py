"""Run `minecube build` or `minecube predict` on a Dask cluster.

    python workflows/cluster.py --workers 4 -- build --sites my_mines.geojson --years 2019-2023 \\
        --source earth-search --store cubes.zarr
    python workflows/cluster.py --workers 4 -- predict --store cubes.zarr --model model.pt
    python workflows/cluster.py --scheduler tcp://10.0.0.1:8786 -- build --sites ...

`--workers` starts worker processes on this machine. `--scheduler` uses a running cluster. Write
the minecube command after `--`, without the word minecube. All workers must see the same files:
catalogue, scene lists, model and store.
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
    cluster_options = parser.add_mutually_exclusive_group(required=True)
    cluster_options.add_argument(
        "--workers", type=int, help="number of worker processes to start on this machine"
    )
    cluster_options.add_argument("--scheduler", help="address of a running Dask scheduler")
    parser.add_argument("command", choices=("build", "predict"), help="minecube command, after --")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="arguments of the minecube command"
    )
    options = parser.parse_args(argv)
    if options.workers is not None and options.workers < 1:
        parser.error(
            f"--workers {options.workers}: expected 1 or more, because workers run the tasks"
        )
    command = [options.command, *options.arguments, "--scheduler"]
    if options.scheduler:
        minecube([*command, options.scheduler])
    # One task per worker, because a site-year needs its own reading threads and memory.
    with LocalCluster(
        n_workers=options.workers, threads_per_worker=1, dashboard_address=None
    ) as cluster:
        minecube([*command, cluster.scheduler_address])


if __name__ == "__main__":
    main()
