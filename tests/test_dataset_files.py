"""A dataset.yaml: what it may hold, and which line of it is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from minecube.catalog import load_dataset
from minecube.catalog.dataset import TEMPLATE
from minecube.cli import cli
from minecube.errors import CatalogError

MINIMAL = """\
id: my-mines
sites: mines.geojson
years: 2019-2021
sources: [earth-search]
store: cubes.zarr
"""
MODELS = """\
models:
  - file: unet.pt
    name: unet
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "dataset.yaml"
    path.write_text(text)
    return path


def test_a_short_file_has_the_documented_defaults(tmp_path: Path) -> None:
    dataset = load_dataset(write(tmp_path, MINIMAL))
    assert dataset.years == (2019, 2020, 2021)
    assert dataset.sources == ("earth-search",)
    assert dataset.recipe == "annual-median"
    assert dataset.engine == "local"
    assert (dataset.labels, dataset.models, dataset.export) == (None, (), None)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    labels = "labels: {file: ../mines.gpkg}\nresults: s3://bucket/results\n"
    dataset = load_dataset(write(tmp_path, MINIMAL + labels + MODELS))
    assert dataset.store == str(tmp_path / "cubes.zarr")
    assert dataset.sites == str(tmp_path / "mines.geojson")
    assert dataset.results == "s3://bucket/results"
    assert dataset.labels is not None
    assert Path(dataset.labels.file) == tmp_path / "../mines.gpkg"
    assert dataset.models[0].file == str(tmp_path / "unet.pt")


def test_names_of_the_catalogue_stay_names(tmp_path: Path) -> None:
    text = MINIMAL.replace("mines.geojson", "Germany_*") + MODELS.replace("unet.pt", "unet")
    dataset = load_dataset(write(tmp_path, text))
    assert dataset.sites == "Germany_*"
    assert dataset.models[0].file == "unet"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        (MINIMAL + "recipes: summer-bap\n", 6, "recipes"),  # a typo
        (MINIMAL + "workers: two\n", 6, "workers"),  # a wrong type
        (MINIMAL + "workers: 0\n", 6, "1 or more"),
        (MINIMAL.replace("2019-2021", "2021-2019"), 3, "years"),
        (MINIMAL.replace("2019-2021", "1999"), 3, "years from 2015"),
        (MINIMAL.replace("[earth-search]", "[a, a]"), 4, "each once"),
        (MINIMAL + "min_read_completeness: 2\n", 6, "0..1"),
        (MINIMAL + "on_offset_conflict: ignore\n", 6, "drop, warn, fix, fail"),
        (MINIMAL + "labels:\n  files: mines.gpkg\n", 7, "files"),
        (MINIMAL + "labels: mines.gpkg\n", 6, "expected keys"),
        (MINIMAL + MODELS + "    devise: cuda\n", 9, "devise"),
        (MINIMAL + "tracks: {}\n", 6, "an entry in `models`"),
        (MINIMAL + MODELS + "tracks: {rates: guessed}\n", 9, "learned, labels"),
        (MINIMAL + MODELS + "score: {}\n", 9, "`labels`"),
        (MINIMAL + "export: {formats: [jpeg]}\n", 6, "cog, netcdf"),
        # Contradictions between keys
        (MINIMAL + MODELS + "export: {model: other}\n", 9, "found 'other'"),
        (MINIMAL + MODELS + "export: {model: unet+hmm}\n", 9, "found 'unet+hmm'"),
        (MINIMAL + MODELS + "  - {file: b.pt, name: unet}\n", 6, "names that differ"),
        (MINIMAL + "publish: https://example.org/r\n", 6, "a folder or s3://bucket/prefix"),
        (MINIMAL + "notify: {stall_minutes: 5}\n", 6, "a command or a webhook"),
    ],
)
def test_errors_name_the_line_and_what_was_expected(
    tmp_path: Path, text: str, line: int, message: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(CatalogError) as caught:
        load_dataset(path)
    assert f"{path}, line {line}: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "store: other.zarr\n", "line 6"),  # a repeated key
        ("id: [unfinished\n", "line"),
        ("- a list\n", "expected keys such as sites and years, found list"),
        ("", "found NoneType"),
        (MINIMAL.replace("store: cubes.zarr\n", ""), "store"),
    ],
)
def test_files_that_are_no_dataset(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        load_dataset(write(tmp_path, text))


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match=r"no\.yaml: .*--init"):
        load_dataset(tmp_path / "no.yaml")


def test_the_template_is_valid_with_all_its_comments_removed() -> None:
    """Each commented key is one that a dataset may have."""
    lines = [line.removeprefix("#") for line in TEMPLATE.splitlines() if not line.startswith("# ")]
    content = yaml.safe_load("\n".join(lines))
    assert {"labels", "models", "tracks", "score", "export", "notify"} <= content.keys()


def test_init_writes_a_file_that_loads_and_replaces_none(tmp_path: Path) -> None:
    path = tmp_path / "dataset.yaml"
    assert CliRunner().invoke(cli, ["run", "--init", str(path)]).exit_code == 0
    assert load_dataset(path).id == "my-mines"
    path.write_text(MINIMAL)
    again = CliRunner().invoke(cli, ["run", "--init", str(path)])
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    assert path.read_text() == MINIMAL


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "biuld"], "expected steps of search"),
        (["--only", "predict"], "the dataset has no such step"),
        (["--shard", "4/3"], "expected i/n such as 3/20"),
        (["--shard", "0/3"], "expected i/n such as 3/20"),
        (["--years", "2030"], "the dataset has"),
        (["--sites", "atlantis"], "atlantis"),
        (["--engine", "tcp://127.0.0.1:1"], "no Dask scheduler answers"),
    ],
)
def test_wrong_options_exit_with_2_and_write_nothing(
    tmp_path: Path, run_world: Path, options: list[str], message: str
) -> None:
    from known_runs import write_dataset  # loads torch

    steps = dict.fromkeys(("labels", "models", "tracks", "score", "export"))
    path = write_dataset(tmp_path, run_world, **steps)
    done = CliRunner().invoke(cli, ["run", str(path), *options])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_of_a_later_step_is_found_before_any_work(
    tmp_path: Path, run_world: Path
) -> None:
    from known_runs import write_dataset

    for key, value in (
        ("labels", {"file": "no_such.gpkg"}),
        ("models", [{"file": "no_such.pt", "name": "net"}]),
        ("sites", "no_such.geojson"),
        ("sources", ["no-such-source"]),
        ("recipe", "no-such-recipe"),
        ("catalog", "no_such_folder"),
        ("prices", "no_such_prices.yaml"),
    ):
        path = write_dataset(tmp_path, run_world, **{key: value})
        done = CliRunner().invoke(cli, ["run", str(path)])
        assert done.exit_code == 2, (key, done.output)
        assert "no_such" in done.stderr or "no-such" in done.stderr
        lines = path.read_text().splitlines()
        number = next(n for n, line in enumerate(lines, 1) if line.startswith(f"{key}:"))
        number += key == "models"  # the line of the model itself
        assert f"error: {path}, line {number}: " in done.stderr
        assert list(tmp_path.iterdir()) == [path]
