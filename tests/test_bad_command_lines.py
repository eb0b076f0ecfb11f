"""Bad command lines, run as real processes: each is answered in one sentence, in seconds, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures import CancelledError
from importlib import import_module

import click
import geopandas as gpd
import numpy as np
import obstore.exceptions
import pandas as pd
import pytest
import zarr
from click.testing import CliRunner
from distributed.scheduler import KilledWorker
from shapely.geometry import Point

from known_scenes import site_of
from minecube import cube, models
from minecube.catalog import load_models
from minecube.catalog.fields import FieldError
from minecube.cli import COMMANDS, cli
from minecube.cli.words import check_words
from minecube.errors import CubeError
from minecube.jobs.failures import exit_code_of, explain
from minecube.simulate import World, simulate_archive

LONG = "x" * 5000
BUILD = "--sites {w}/sites.geojson --years 2020 --source sim-earth-search --catalog {w}/archive"
DEMO = "build --store new.zarr --sites demo_1 --years 2020 --source earth-search"
STORE = "--store {w}/cubes.zarr"
DEAD = "--sites demo_1 --years 2020 --catalog {d}/dead --source dead"
SPLIT = "bench --store {w}/cubes.zarr --train a --valid b --test c"

# A command line, and a part of its answer. All end with exit code 2.
BAD_USE = f"""
build {BUILD} --store '' => empty
build {BUILD} --store ' ' => empty
build {BUILD} --store ftp://host/x => s3://, gs://, az://
build {BUILD} --store http://127.0.0.1:9/x => s3://, gs://, az://
build {BUILD} --store file://{{w}}/x => s3://, gs://, az://
build {BUILD} --store hdfs://h/x => s3://, gs://, az://
build {BUILD} --store S3://bucket/x => s3://, gs://, az://
build {BUILD} --store memory://x => s3://, gs://, az://
build {BUILD} --store ://x => s3://, gs://, az://
build {BUILD} --store s3:// => no bucket
build {BUILD} --store s3:/// => no bucket
build {BUILD} --store {{d}}/file.txt => is a file
build {BUILD} --store {LONG} => up to 255
build {BUILD} --store a/{LONG}/b => up to 255
build {BUILD} --store new.zarr --store other.zarr => several times
build {BUILD} --store new.zarr --years 2021 => several times
build {BUILD} --store new.zarr --scheduler nonsense => no Dask scheduler
build {BUILD} --store new.zarr --scheduler '' => empty
build {BUILD} --store new.zarr --scheduler tcp://127.0.0.1:9 => no Dask scheduler
build {BUILD} --store new.zarr --scheduler ftp://127.0.0.1:9 => no Dask scheduler
build {BUILD} --store new.zarr --device nodevice => nodevice
build {BUILD} --store new.zarr --device cuda:99 => cuda:99
build {BUILD} --store new.zarr --device meta => is not there
build {BUILD} --store new.zarr --device mps => is not there
build {BUILD} --store new.zarr --min-read-completeness nan => finite
build {BUILD} --store new.zarr --min-read-completeness inf => range
build {BUILD} --store new.zarr --min-read-completeness -1 => range
build {BUILD} --store new.zarr --min-read-completeness much => valid
build {BUILD} --store new.zarr --on-offset-conflict maybe => maybe
build {BUILD} --store new.zarr --recipe nope => unknown recipe
build {BUILD} --store new.zarr --scenes {{d}}/file.txt => cannot be written
build {DEMO[6:]} --catalog {{d}}/nothere => does not exist
build {DEMO[6:]} --catalog {{d}}/file.txt => is a file
build {DEMO[6:]} --catalog {{d}}/open => recipes.yaml: cannot be read as a catalogue: line 2: expected
build {DEMO[6:]} --catalog {{d}}/tab => recipes.yaml: cannot be read as a catalogue: line 2: found character
build {DEMO[6:]} --catalog {{d}}/tag => recipes.yaml: cannot be read as a catalogue: line 1: could not determine
build {DEMO[6:]} --catalog {{d}}/twice => recipes.yaml: cannot be read as a catalogue: line 3: 'a' occurs twice
build {DEMO[6:]} --catalog {{d}}/alias => recipes.yaml: cannot be read as a catalogue: line 1: found undefined alias
build {DEMO[6:]} --catalog {{d}}/key => recipes.yaml: cannot be read as a catalogue: line 1: found unhashable key
build {DEMO[6:]} --catalog {{d}}/deep => recipes.yaml: cannot be read as a catalogue: it is nested too deeply
build {DEMO[6:]} --catalog {{d}}/list => expected entries by id
build {DEMO[6:]} --catalog {{d}}/junk => recipes.yaml: cannot be read as a catalogue
build --store new.zarr --sites , --years 2020 --source earth-search => unknown site ''
build --store new.zarr --sites {LONG} --years 2020 --source earth-search => up to 255
build --store new.zarr --sites {LONG}.geojson --years 2020 --source earth-search => up to 255
build --store new.zarr --sites 'Nix_*' --years 2020 --source earth-search => unknown site 'Nix_*'
build --store new.zarr --sites Austria_1 --years 2020 --source earth-search => no area of interest
build --store new.zarr --sites {{d}}/nothere.geojson --years 2020 --source earth-search => no such file
build --store new.zarr --sites {{d}}/junk.geojson --years 2020 --source earth-search => cannot be read as sites
build --store new.zarr --sites {{d}}/junk.parquet --years 2020 --source earth-search => cannot be read as sites
build --store new.zarr --sites {{d}}/junk.gpkg --years 2020 --source earth-search => cannot be read as sites
build --store new.zarr --sites {{d}}/junk.shp --years 2020 --source earth-search => cannot be read as sites
build --store new.zarr --sites {{d}}/points.geojson --years 2020 --source earth-search => a polygon
build --store new.zarr --sites {{d}}/folder.geojson --years 2020 --source earth-search => cannot be read as sites
build --store new.zarr --sites {{d}}/long_id.geojson --years 2020 --source earth-search => up to 100 characters, found 5,000
build --store new.zarr --sites {{d}}/twin_ids.geojson --years 2020 --source earth-search => would both have the id 'a_b'
build --store new.zarr --sites demo_1 --years 1850 --source earth-search => 1850
build --store new.zarr --sites demo_1 --years 9999 --source earth-search => 9999
build --store new.zarr --sites demo_1 --years 0000-9999 --source earth-search => year 0
build --store new.zarr --sites demo_1 --years 2022-2020 --source earth-search => expected years such as
build --store new.zarr --sites demo_1 --years nan --source earth-search => expected years such as
build --store new.zarr --sites demo_1 --years 2020 --source nope => unknown source
build --store new.zarr --sites demo_1 --years 2020 --source earth-search,earth-search => once
build --store new.zarr => Missing option
build --store => requires an argument
build --nope => No such option
sites --sites 'Nix*' => unknown site
sites --sites {LONG} => up to 255
sites --sites {{d}}/junk.geojson => cannot be read as sites
sites --sites {{d}}/null_year.geojson => field 'years': expected whole years
sites --sites {{d}}/zarr_id.geojson => another name than zarr.json
sites extra => unexpected extra argument
simulate --sites demo_1 --out {{d}}/file.txt => file.txt
simulate --sites demo_1 --out {{d}}/file.txt/x => file.txt
simulate --sites demo_1 --out new --dates 0 => at least 1
simulate --sites demo_1 --out new --dates nan => not a valid integer
simulate --sites demo_1 --out new --dates 99999999999999999999 => at most
simulate --sites demo_1 --out new --seed -1 => range
simulate --sites demo_1 --out new --seed 99999999999999999999 => range
simulate --sites demo_1 --out new --years 9999 => 9999
search --sites demo_1 --years 1850 --source earth-search => 1850
search {BUILD} --out {{d}}/file.txt => is a file
search {BUILD} --out {{d}}/file.txt/x => file.txt
audit {BUILD} --out {{d}}/file.txt => is a file
audit {BUILD} --out new --recipe nope => unknown recipe
plan {BUILD} --store gopher://x/y => s3://, gs://, az://
plan {BUILD} --store {{d}}/file.txt => is a file
plan {BUILD} --store new.zarr --prices {{d}}/nothere.yaml => does not exist
plan {BUILD} --store new.zarr --prices {{d}}/open/recipes.yaml => cannot be read as prices: line 2
plan {BUILD} --store new.zarr --prices {{d}}/deep/recipes.yaml => cannot be read as prices: it is nested too deeply
plan {BUILD} --store new.zarr --prices {{d}}/nan.yaml => expected a number
plan {BUILD} --store new.zarr --prices {{d}}/junk.yaml => cannot be read as prices
release nope => No such command
release import => Missing argument
release import {{d}}/nothere.zip --out new => nothere.zip
release import {{d}}/junk.zip --out new => expected a zip archive
release import {{d}}/empty.zip --out new => without a file
publish --store {{w}}/cubes.zarr --icechunk nothere --diff a b => no Icechunk repository
release import {{d}}/other.zip --out new => readme.txt
release import {{d}}/other.zip --out new --release nope => unknown release
release import s3:// --out new => with a host or bucket, found 's3://'
release import ftp:// --out new => with a host or bucket, found 'ftp://'
release import ftp://host.example/a.zip?secret --out new => with a host or bucket, found 'ftp://host.example/a.zip'
release import http://[::1/a.zip --out new => with a host or bucket, found 'http://[::1/a.zip'
release import http:///a.zip --out new --download => with a host or bucket
release audit {{d}} --pixels file:///a.zip => with a host or bucket
models --catalog {{d}}/long => field 'id': expected up to 100 characters, found 101
release audit {{d}} => no finished import
release export {STORE} --out {{d}}/file.txt => is a file
release export {STORE} --import {{d}} --out new => no finished import
polygons => Missing argument
polygons {{d}}/nothere.gpkg => cannot be read
polygons {{d}}/junk.gpkg => cannot be read
polygons {{d}}/junk.shp => cannot be read
polygons {{d}} => cannot be read
polygons {{d}}/table.parquet => cannot be read
polygons {{d}}/points.geojson => expected polygons
polygons {{w}}/mine.parquet --min-width nan => finite
polygons {{w}}/mine.parquet --min-width inf => finite
polygons {{w}}/mine.parquet --min-width -1 => range
polygons {{w}}/mine.parquet --compare nope => nope
polygons {{w}}/mine.parquet --compare {{d}}/junk.gpkg => cannot be read
polygons {{w}}/mine.parquet --out x.txt => .parquet or .gpkg
polygons {{w}}/mine.parquet --out {{d}}/folder.gpkg => is a directory
polygons {{w}}/mine.parquet --out {{d}}/file.txt/a.gpkg => file.txt
polygons {{w}}/mine.parquet --json {{d}} => is a directory
polygons {{w}}/mine.parquet --json {{d}}/file.txt/a.json => file.txt
label --store nothere.zarr --polygons {{w}}/mine.parquet => no store
label --store {{d}}/damaged.zarr --polygons {{w}}/mine.parquet => damaged.zarr
label --store {{d}}/foreign.zarr --polygons {{w}}/mine.parquet => has no site
label --store {{d}}/array.zarr --polygons {{w}}/mine.parquet => array.zarr
label {STORE} --polygons {{d}}/junk.gpkg => cannot be read
label {STORE} --polygons {{d}} => cannot be read
label {STORE} --sites nope --polygons {{w}}/mine.parquet => unknown site 'nope'
models nope => No such command
models --catalog {{d}}/open => models.yaml: cannot be read as a catalogue: line 2
models show nope => unknown model 'nope'
models show {LONG} => up to 255
models show {{d}}/junk.pt => not a model
train --store nothere --out m.pt => no store
train {STORE} --out {{d}} => is a directory
train {STORE} --out {{d}}/file.txt/m.pt => file.txt
train {STORE} --out nofolder/m.pt => folder is not there
train {STORE} --out m.pt --model nope => unknown model
train {STORE} --out m.pt --preset nope => unknown preset
train {STORE} --out m.pt --epochs 0 => range
train {STORE} --out m.pt --epochs nan => not a valid integer
train {STORE} --out m.pt --seed 99999999999999999999 => range
train {STORE} --out m.pt --workers 100000000 => range
train {STORE} --out m.pt --device gpu => gpu
train {STORE} --out m.pt --device cuda:7 => cuda:7
train {STORE} --out m.pt --device meta => is not there
train {STORE} --out m.pt --device xpu => is not there
train {STORE} --out m.pt --device vulkan => is not there
train {STORE} --out m.pt --valid nope => unknown site
train {STORE} --out m.pt --valid '*' => no site is left
train {STORE} --out {{d}}/state.pt --resume => is not the state
predict --store nothere --model {{w}}/model.pt => no store
predict {STORE} --model {{d}}/junk.pt => not a model
predict {STORE} --model {{d}} => neither
predict {STORE} --model {LONG} => up to 255
predict {STORE} --model {{w}}/model.pt --name zarr.json => another name than zarr.json
predict {STORE} --model {{w}}/model.pt --name {"n" * 101} => up to 100 characters, found 101
predict {STORE} --model unet-small => no trained weights
predict {STORE} --model {{w}}/model.pt --device mps => is not there
predict {STORE} --model {{w}}/model.pt --precision fp8 => fp8
predict {STORE} --model {{w}}/model.pt --pairs -1 => expected gaps
predict {STORE} --model {{w}}/model.pt --pairs 2022-2020 => pairs
predict {STORE} --model {{w}}/model.pt --scheduler nonsense => no Dask scheduler
predict {STORE} --model {{w}}/model.pt --sites nope => unknown site
tracks {STORE} --out {{d}}/file.txt => is a file
tracks {STORE} --out {{d}}/file.txt/x => file.txt
tracks {STORE} --out new --model nope => nope
tracks {STORE} --out new --model unet-small+hmm => name the map without +hmm
tracks {STORE} --out new --model +hmm => name the map without +hmm
tracks {STORE} --out new --rates 0.1 => two chances
tracks {STORE} --out new --temper nan => finite
tracks {STORE} --out new --temper 0 => range
score --store {{d}}/damaged.zarr => damaged.zarr
score --store {{d}}/deep.zarr => nested too deeply
score --store {{d}}/junk.zip => junk.zip
score {STORE} --model nope => nope
score {STORE} --model {LONG} => up to 255
score {STORE} --model unet-small,unet-small => once
score {STORE} --join {{d}}/junk.json => counts.json
score {STORE} --join {{d}}/deep.json => deep.json: expected counts.json
score {STORE} --join {{d}}/list.json => counts.json
score {STORE} --join {{d}}/nothere.json => does not exist
score {STORE} --json {{d}} => is a directory
score {STORE} --json {{d}}/file.txt/x.json => file.txt
score {STORE} --out {{d}}/file.txt => is a file
score {STORE} --sites '[*' => unknown site
{SPLIT} --out new --valid a => several times
{SPLIT} --out {{d}}/deep_bench => bench.json: is not what
bench {STORE} --train a --valid a --test c --out new => one part
bench {STORE} --train a --valid nope --test c --out new => unknown site
bench {STORE} --train a --valid b --out new => Missing option
{SPLIT} --out new --models nope => unknown model
{SPLIT} --out new --preset nope => unknown preset
{SPLIT} --out new --seed -1 => range
{SPLIT} --out new --seed 99999999999999999999 => range
{SPLIT} --out new --device gpu => gpu
{SPLIT} --out {{d}}/file.txt => is a file
{SPLIT} --out {{d}}/bench => bench.json
export {STORE} --out {{d}}/file.txt => is a file
export {STORE} --out new --model nope => nope
export {STORE} --out new --format tiff => tiff
export {STORE} --out new --format croissant => croissant
export {STORE} --out new --min-area nan => finite
export {STORE} --out new --min-area -1 => range
publish {STORE} --icechunk ftp://x --tag v1 => ftp
publish {STORE} --icechunk new --tag a --rollback b => one of them
publish --store nothere --icechunk new --tag v1 => no store
verify --store nothere => no store
verify --store {{d}}/file.txt => is a file
verify {STORE} --json {{d}} => is a directory
verify {STORE} --json {{d}}/file.txt/x.json => file.txt
verify {STORE} --workers 0 => range
verify {STORE} --sites nope => unknown site
pack {STORE} --out x.tar => .zip
pack {STORE} --out {{d}}/folder.zip => is a directory
pack --store nothere --out x.zip => no store
demo --out {{d}}/file.txt => is a file
demo --out {{w}} => not empty
demo --out new --epochs 0 => range
demo --out new --seed nan => not a valid integer
nope => No such command
--nope => No such option
"""

# What is outside the command line fails: exit code 1.
FAILURES = f"""
build {BUILD} --store s3://bucket/x => the object store does not answer
plan {BUILD} --store s3://bucket/x => the object store does not answer
score --store s3://bucket/x => the object store does not answer
pack --store s3://bucket/x --out x.zip => the object store does not answer
score --store az://container/x => needs keys
search {DEAD} => cannot be reached
build {DEAD} --store new.zarr => cannot be reached
plan {DEAD} --store new.zarr => cannot be reached
search {DEAD}-file => cannot be reached
release import http://127.0.0.1:9/a.zip --out new => cannot be reached
predict {STORE} --catalog {{d}}/dead --model far => cannot be downloaded
"""

# One process imports everything once. A child of it per command line has an empty folder, and files as standard streams.
LAUNCHER = """
import json, os, signal, sys, time
from importlib import import_module
from pathlib import Path
from minecube.cli import COMMANDS, main
import distributed, torch
for name in COMMANDS:
    import_module(f"minecube.cli.{name}")
lines, runs = json.load(sys.stdin), Path(sys.argv[1])
running, begun = {}, {}

def begin(number):
    folder = runs / str(number)
    (folder / "cwd").mkdir(parents=True)
    begun[number] = time.monotonic()
    child = os.fork()
    if child:
        running[child] = number
        return
    os.chdir(folder / "cwd")
    os.setsid()
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_CREAT | os.O_WRONLY), descriptor)
    try:
        main(lines[number])
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

left = list(range(len(lines)))
while left or running:
    while left and len(running) < 2:
        begin(left.pop(0))
    child, status = os.waitpid(-1, os.WNOHANG)
    if child:
        number = running.pop(child)
        seconds = time.monotonic() - begun[number]
        print(json.dumps([number, os.waitstatus_to_exitcode(status), seconds]), flush=True)
        continue
    for child, number in running.items():
        if time.monotonic() - begun[number] > 20:
            os.killpg(child, signal.SIGKILL)
    time.sleep(0.01)
"""


def lines_of(text):
    return [line.split(" => ") for line in text.strip().splitlines()]


def environment(**more):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "AZURE_", "GOOGLE_"))}
    return kept | more


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A built and labelled store of three sites, a model that nobody trained, and the archive."""
    folder = tmp_path_factory.mktemp("world")
    site = site_of("a", 360000, 5600040, 48, 48)
    simulate_archive(
        [site],
        folder / "archive",
        World(years=(2020, 2022), dates_per_year=4, winter_dates=1, styles=("earth-search",)),
    )
    gpd.GeoDataFrame({"id": ["a"], "margin": [0]}, geometry=[site.geometry], crs=4326).to_file(
        folder / "sites.geojson"
    )
    shutil.copy(folder / "archive" / "truth_footprints.parquet", folder / "mine.parquet")
    given = [
        "--sites",
        "sites.geojson",
        "--catalog",
        "archive",
        "--source",
        "sim-earth-search",
        "--years",
        "2020,2022",
    ]
    given = [str(folder / word) if (folder / word).exists() else word for word in given]
    store = str(folder / "cubes.zarr")
    assert CliRunner().invoke(cli, ["build", *given, "--store", store]).exit_code == 0
    done = CliRunner().invoke(
        cli, ["label", "--store", store, "--polygons", str(folder / "mine.parquet")]
    )
    assert done.exit_code == 0, done.output
    for name in "bc":
        shutil.copytree(folder / "cubes.zarr" / "a", folder / "cubes.zarr" / name)
    card = load_models()["unet-small"]
    bands = len(card.bands)
    trained = models.TrainedModel(
        card=card, network=models.build(card), mean=(1.0,) * bands, std=(1.0,) * bands, sites=("a",)
    )
    models.save(trained, folder / "model.pt")
    return folder


@pytest.fixture(scope="module")
def damaged(world, tmp_path_factory):
    """Files and folders that are not what they seem."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "file.txt").write_text("hello\n")
    junk = bytes(range(256)) * 8
    for suffix in ("geojson", "parquet", "gpkg", "shp", "pt", "yaml", "json", "zip"):
        (folder / f"junk.{suffix}").write_bytes(junk)
    zipfile.ZipFile(folder / "empty.zip", "w").close()
    (folder / "state.pt.ckpt").write_bytes(junk)
    for name in ("folder.geojson", "folder.gpkg", "folder.zip"):
        (folder / name).mkdir()
    gpd.GeoDataFrame({"id": ["p"]}, geometry=[Point(10, 50)], crs=4326).to_file(
        folder / "points.geojson"
    )
    site = gpd.read_file(world / "sites.geojson").geometry[0]
    for name, ids in (
        ("long_id", ["L" * 5000]),
        ("one_id", ["a"]),
        ("twin_ids", ["a/b", "a b"]),
        ("zarr_id", ["zarr.json"]),
    ):
        gpd.GeoDataFrame({"id": ids}, geometry=[site] * len(ids), crs=4326).to_file(
            folder / f"{name}.geojson"
        )
    pd.DataFrame({"a": [1]}).to_parquet(folder / "table.parquet")
    catalogs = {
        "open": b"a: [1, 2\nb: {c\n",
        "tab": b"a:\n\t- b\n",
        "tag": b"a: !odd x\n",
        "twice": b"a: {title: t}\n\na: {title: u}\n",
        "alias": b"a: *nothere\n",
        "key": b"? [a, b]\n: c\n",
        "deep": b"[" * 20_000,
        "long": b"a" * 101 + b": {title: t, architecture: unet}",
        "list": b"- a\n- b\n",
        "junk": junk,
    }
    for name, content in catalogs.items():
        (folder / name).mkdir()
        for file in ("recipes.yaml", "models.yaml"):
            (folder / name / file).write_bytes(content)
    (folder / "dead").mkdir()
    source = "{title: t, kind: %s, href: 'http://127.0.0.1:9/%s', collection: c}"
    api, file = source % ("stac-api", "v1"), source % ("stac-geoparquet", "items.parquet")
    (folder / "dead" / "sources.yaml").write_text(f"dead: {api}\ndead-file: {file}\n")
    weights = f"{{href: 'http://127.0.0.1:9/w.pt', sha256: '{'0' * 64}'}}"
    (folder / "dead" / "models.yaml").write_text(
        f"far: {{title: t, architecture: unet, weights: {weights}}}\n"
    )
    (folder / "nan.yaml").write_text("latency_s: .nan\n")
    (folder / "list.json").write_text("[1]")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "deep.zarr").mkdir()
    (folder / "deep.zarr" / "zarr.json").write_text("[" * 100_000)
    (folder / "deep_bench").mkdir()
    (folder / "deep_bench" / "bench.json").write_text("[" * 100_000)
    feature = json.loads((folder / "one_id.geojson").read_text())
    feature["features"][0]["properties"]["years"] = [None, True]
    (folder / "null_year.geojson").write_text(json.dumps(feature))
    (folder / "bench").mkdir()
    (folder / "bench" / "bench.json").write_text("{")
    with zipfile.ZipFile(folder / "other.zip", "w") as other:
        other.writestr("readme.txt", "hello")
    zarr.open_group(folder / "foreign.zarr", mode="w").create_array("x", data=np.arange(5))
    zarr.save_array(folder / "array.zarr", np.arange(5))
    shutil.copytree(world / "cubes.zarr", folder / "damaged.zarr")
    (folder / "damaged.zarr" / "zarr.json").write_text('{"a": ')
    return folder


def listing(*folders):
    return {p: p.stat().st_mtime_ns for folder in folders for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def answers(world, damaged, tmp_path_factory):
    """What every line came to: exit code, seconds, standard error, and what it left in its folder; and all files before it."""
    before = listing(world, damaged)
    runs = tmp_path_factory.mktemp("runs")
    lines = [line for line, _ in (*lines_of(BAD_USE), *lines_of(FAILURES))]
    words = [[word.format(w=world, d=damaged) for word in shlex.split(line)] for line in lines]
    # An endpoint at which nobody listens.
    dead = environment(
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ALLOW_HTTP="true",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
    )
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, str(runs)],
        input=json.dumps(words),
        env=dead,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = {}
    for number, code, seconds in map(json.loads, done.stdout.splitlines()):
        err = (runs / str(number) / "err").read_text()
        found[lines[number]] = (
            code,
            seconds,
            err,
            [p.name for p in (runs / str(number) / "cwd").rglob("*")],
        )
    return found, before


def check(answer, code, said):
    found, seconds, err, left = answer
    assert "Traceback" not in err, err
    assert found == code, (found, err)
    told = [line for line in err.splitlines() if line.strip()]
    assert len(told) <= 4, err
    (sentence,) = [line for line in told if line.startswith(("error: ", "Error: "))]
    assert said in sentence
    assert len(sentence) < 600
    assert left == []
    assert seconds < 10


@pytest.mark.parametrize(("line", "said"), lines_of(BAD_USE), ids=lambda text: text[:60])
def test_bad_use(answers, line, said):
    check(answers[0][line], 2, said)


@pytest.mark.parametrize(("line", "said"), lines_of(FAILURES), ids=lambda text: text[:60])
def test_what_is_outside_fails(answers, line, said):
    check(answers[0][line], 1, said)


def test_no_bad_line_writes_anything_it_names(answers, world, damaged):
    assert listing(world, damaged) == answers[1]


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
    with pytest.raises(CubeError, match=r"AWS_ENDPOINT_URL is 's3.example.org'; expected the URL"):
        cube.Store("s3://bucket/x").client()
    cube.Store("gs://bucket/x").client()


def test_errors_that_are_explained():
    """By classes of the libraries themselves."""
    killed = KilledWorker("build_year-1", None, 3)
    assert (
        "a worker died on it 4 times, most often for lack of memory; give each worker more memory"
        in explain(killed)
    )
    assert "the Dask scheduler is gone; committed site-years are safe" in explain(CancelledError())
    dump = "Generic S3 error: Error performing GET http://h/x in 1.7s, after 9 retries, max_retries: 9, retry_timeout: 9s  - no"
    said = explain(
        obstore.exceptions.GenericError(dump + "\n\nDebug source:\nGeneric {\n    store: 1\n}")
    )
    assert "(Generic S3 error: Error performing GET http://h/x - no)" in said
    assert explain(OSError(28, "No space left on device", "/x")).startswith(
        "/x: No space left on device; "
    )
    assert explain(FieldError("field 'href': expected a URL")) == "field 'href': expected a URL"
    assert exit_code_of(FieldError()) == exit_code_of(RecursionError()) == 2
    assert exit_code_of(OSError(28, "No space left on device")) == exit_code_of(MemoryError()) == 1
    assert explain(BrokenPipeError(32, "Broken pipe")) is None
    for ours in (KeyError("x"), AssertionError(), click.UsageError("x"), RuntimeError("x")):
        assert explain(ours) is None


BUG = """
import sys
import time
from minecube import cli
from minecube.cli import options
def wrong(*_):
    raise ZeroDivisionError("nobody expects this")
options.choose_sites = wrong
cli.main(sys.argv[1:])
"""


def test_a_bug_of_ours_is_one_sentence_and_a_traceback_when_asked():
    plain, loud = (
        subprocess.run([sys.executable, "-c", BUG, *more, "sites"], capture_output=True, text=True)
        for more in ([], ["-v"])
    )
    (line,) = plain.stderr.splitlines()
    assert line.startswith(
        "internal error: ZeroDivisionError: nobody expects this; please report it"
    )
    assert "Traceback" in loud.stderr
    assert line in loud.stderr
    assert plain.returncode == loud.returncode == 70


def test_callers_in_python_see_the_error_itself(monkeypatch):
    def wrong(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("minecube.cli.options.choose_sites", wrong)
    with pytest.raises(ZeroDivisionError):
        cli.main(["sites"], standalone_mode=False)


LOGS = """
import logging, sys, warnings
from minecube import cli
from minecube.cli import options
def noisy(*_):
    for name in ("urllib3", "distributed.client", "rasterio._env", "botocore", "pystac", "asyncio"):
        logging.getLogger(name).error("noise of %s", name)
    warnings.warn("noise of a library")
    logging.getLogger("minecube.scenes").warning("our warning")
    logging.getLogger("minecube.scenes").info("our news")
    return []
options.choose_sites = noisy
cli.main(sys.argv[1:])
"""


def test_only_our_log_is_shown():
    plain, loud = (
        subprocess.run([sys.executable, "-c", LOGS, *more, "sites"], capture_output=True, text=True)
        for more in ([], ["-v"])
    )
    assert plain.stderr.splitlines() == ["WARNING our warning"]
    assert loud.stderr.splitlines() == ["WARNING our warning", "INFO our news"]


# The command says on standard error that all is imported, so that the signal meets the command at work.
INTERRUPTED = """
import sys
import time
from importlib import import_module
from minecube.cli import main
import_module(f"minecube.cli.{sys.argv[1]}")
print("ready", file=sys.stderr, flush=True)
main()
"""


@pytest.mark.parametrize(
    ("line", "seconds", "said"),
    [
        (f"tracks {STORE} --model m --out new", 0.3, "interrupted; run the same command again"),
        ("simulate --sites demo_1 --out new", 2, "interrupted; run the same command again"),
        (
            f"train {STORE} --epochs 500 --out m.pt",
            3,
            "finished epochs are safe; run the same command again with --resume",
        ),
        ("demo --out new", 2, "remove the folder of --out"),
    ],
    ids=lambda value: str(value).split(" ")[0],
)
def test_an_interrupt_is_one_sentence(world, tmp_path, line, seconds, said):
    words = [word.format(w=world) for word in shlex.split(line)]
    if words[0] == "tracks":
        words[2] = _with_a_map(world, tmp_path)
    command = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert command.stderr.readline() == "ready\n"
        time.sleep(seconds)
        command.send_signal(signal.SIGINT)
        _, err = command.communicate(timeout=30)
    finally:
        command.kill()
        command.communicate()
    (sentence,) = [
        text for text in err.splitlines() if not text.endswith(" ...")
    ]  # the demo names what it is at
    assert said in sentence
    assert command.returncode == 130
    assert not (tmp_path / "m.pt").exists()


def _with_a_map(world, folder):
    """Copy the store, and put a map by model `m` into the copy."""
    store = str(folder / "mapped.zarr")
    shutil.copytree(world / "cubes.zarr", store)
    for site in "abc":
        footprint = cube.open_committed(cube.Store(store), site)["footprint"].load()
        cube.write_probability(cube.Store(store), site, "m", footprint * np.uint8(250), {"id": "m"})
    return store


def test_a_scheduler_that_dies_is_one_sentence(world, tmp_path):
    """It has no worker, so the build waits for it; without it, the same command builds."""
    pytest.importorskip("distributed")
    address = tmp_path / "scheduler.json"
    start = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--no-dashboard",
    ]
    scheduler = subprocess.Popen(
        [*start, "--scheduler-file", str(address)], stderr=subprocess.DEVNULL
    )
    words = [word.format(w=world) for word in shlex.split(f"build {BUILD} --store new.zarr")]
    command = [sys.executable, "-c", "from minecube.cli import main; main()", *words]
    build = None
    try:
        _wait_for(address)
        given = ["--scheduler", json.loads(address.read_text())["address"]]
        build = subprocess.Popen(
            [*command, *given],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        _wait_for(tmp_path / "new.zarr" / "a")
        time.sleep(2)
        scheduler.kill()
        out, err = build.communicate(timeout=40)
    finally:
        for process in filter(None, (scheduler, build)):
            process.kill()
            process.wait()
    told = "error: the Dask scheduler is gone; committed site-years are safe, so start it and run the same command again\n"
    assert (build.returncode, out, err) == (1, "", told)
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "built" in again.stdout


def _wait_for(path):
    until = time.monotonic() + 40
    while not path.exists() or (path.suffix == ".json" and not path.read_text().endswith("}")):
        assert time.monotonic() < until
        time.sleep(0.1)
