"""Runs a real STAC API, stac-fastapi over pgstac, on loopback; `python pgstac_server.py` says whether it could run here.

Postgres keeps its data in a temporary folder and runs only as long as the API does.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path


class Unavailable(Exception):  # noqa: N818 - a skip's reason, no fault
    """What is missing, and the line that brings it."""


def programs():
    """The folder of Postgres' own programs, of the newest version that has PostGIS."""
    for package in ("pypgstac", "psycopg", "psycopg-pool", "stac-fastapi.pgstac", "uvicorn"):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            hint = "pip install pypgstac 'psycopg[binary,pool]' stac-fastapi.pgstac uvicorn"
            raise Unavailable(f"the Python package {package} is missing; {hint}") from None
    # Debian keeps them off PATH, one folder a version.
    folders = sorted(
        Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name), reverse=True
    )
    folders += [Path(p).resolve().parent for p in [shutil.which("initdb")] if p]
    for folder in folders:
        if all(
            (folder / name).exists() for name in ("initdb", "postgres", "pg_isready", "pg_config")
        ):
            share = subprocess.check_output([folder / "pg_config", "--sharedir"], text=True).strip()
            if Path(share, "extension", "postgis.control").exists():
                return folder
    raise Unavailable(
        "Postgres' server with PostGIS is missing; apt-get install postgresql-postgis"
    )


@contextlib.contextmanager
def pgstac(folder: Path, collection: dict, items: list[dict]) -> Iterator[str]:
    """The URL of an API that holds these items; `folder` takes its logs. Raises Unavailable where it cannot run."""
    tools = programs()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    # The caller's own Postgres must not be reached by mistake.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PG")}
    env |= {
        "PGHOST": "127.0.0.1",
        "PGPORT": port,
        "PGUSER": "postgres",
        "PGPASSWORD": "any",
        "PGDATABASE": "postgres",
    }
    client = {"cwd": folder, "env": env}
    with contextlib.ExitStack() as stack:
        # Not in `folder`: a socket's path is at most 107 characters long, and pytest's folders are shut to other users.
        data = stack.enter_context(tempfile.TemporaryDirectory(prefix="pgstac-"))
        server = {"cwd": data, "env": env}
        if os.geteuid() == 0:  # as whom Postgres refuses to run
            nobody = pwd.getpwnam("nobody")
            os.chown(data, nobody.pw_uid, nobody.pw_gid)
            server |= {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        finish(
            [
                tools / "initdb",
                "-D",
                "db",
                "-U",
                "postgres",
                "-A",
                "trust",
                "-E",
                "UTF8",
                "--locale=C",
                "-N",
            ],
            **server,
        )
        # With its context on, pgstac says how many items match.
        options = ["-c", "fsync=off", "-c", "listen_addresses=127.0.0.1", "-c", "pgstac.context=on"]
        postgres = [tools / "postgres", "-D", "db", "-k", data, *options]
        ready = [tools / "pg_isready", "-q"]
        up = running(
            postgres,
            folder / "postgres.log",
            lambda: not subprocess.run(ready, env=env).returncode,
            **server,
        )
        stack.enter_context(up)
        pypgstac = [sys.executable, "-m", "pypgstac.pypgstac"]
        finish([*pypgstac, "migrate"], **client)
        for table, rows in (("collections", [collection]), ("items", items)):
            (folder / table).write_text("\n".join(json.dumps(row) for row in rows))
            finish([*pypgstac, "load", table, table], **client)
        app = [
            sys.executable,
            "-m",
            "uvicorn",
            "--factory",
            "stac_fastapi.pgstac.app:create_app",
            "--port",
            "0",
        ]
        log = folder / "api.log"
        stack.enter_context(
            running(app, log, lambda: "running on http" in log.read_text(), **client)
        )
        yield re.search(r"running on (http://\S+)", log.read_text())[1]


def finish(command, **options):
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-3000:]}")


@contextlib.contextmanager
def running(command, log, ready, **options):
    # So that it ends even with a test run that is killed.
    tether = ["setpriv", "--pdeathsig", "INT", "--"] if shutil.which("setpriv") else []
    with (
        log.open("w") as out,
        subprocess.Popen([*tether, *command], stdout=out, stderr=out, **options) as process,
    ):
        try:
            give_up = time.monotonic() + 60
            while not ready():
                if process.poll() is not None or time.monotonic() > give_up:
                    raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


if __name__ == "__main__":
    try:
        programs()
    except Unavailable as missing:
        sys.exit(f"The tests against a real STAC API will be skipped: {missing}.")
