"""A bad command line is answered in one sentence, in seconds, and leaves no file."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys

import pytest

from known_bad_inputs import BUILD, STORE, make_damaged, make_world

LONG = "x" * 5000


DEMO = "build --store new.zarr --sites demo_1 --years 2020 --source earth-search"


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
versions nothere --compare a b => no Icechunk repository
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
publish {STORE} --icechunk new => Missing option
versions new --compare a b --back-to a => give one
versions nothere => no Icechunk repository
retry nothere.yaml => cannot be read as a dataset
retry nothere.yaml --class cpu => cpu
retry nothere.yaml --failed-since yesterday => yesterday
retry nothere.yaml --attempts 0 => range
update nothere.yaml => cannot be read as a dataset
update nothere.yaml --year soon => years such as
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
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def damaged(world, tmp_path_factory):
    return make_damaged(tmp_path_factory.mktemp("damaged"), world)


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
