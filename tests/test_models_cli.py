"""`minecube models`: the list and the cards, with and without the libraries that build networks."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from minecube.catalog import as_dict, load_models
from minecube.cli import cli
from minecube.models import network


def run(*arguments: object, ok: int = 0) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == ok, f"exit {done.exit_code}\n{done.output}"
    return done.output


def own_catalog(folder: Path, name: str = "own", architecture: str = "unet") -> Path:
    (folder / "models.yaml").write_text(
        f"{name}:\n  title: Ours\n  architecture: {architecture}\n  options: {{width: 4, depth: 2}}\n  bands: [B04, B08]\n"
        f"  weights: {{href: 'https://example.org/own.pt', sha256: {'a1' * 32}, revision: '3'}}\n"
        "  trained_on: Germany_1, Austria_2\n  scores: {iou: 0.91}\n"
    )
    return folder


def test_every_network_is_listed_once() -> None:
    lines = run("models").splitlines()
    assert lines[0].split() == [
        "name",
        "task",
        "architecture",
        "classes",
        "window",
        "weights",
        "paper",
    ]
    assert [line.split()[0] for line in lines[2:]] == list(load_models())
    (segformer,) = (line for line in lines if line.startswith("segformer-b2 "))
    assert segformer.split("  ", 1)[0] == "segformer-b2"
    assert [cell.strip() for cell in segformer.split("  ") if cell][1:] == [
        "mapping",
        "segformer",
        "mine",
        "160 px",
        "no",
        "Xie et al. 2021, arXiv:2105.15203",
    ]


def test_the_list_as_json_is_the_cards() -> None:
    assert json.loads(run("models", "--json")) == [as_dict(card) for card in load_models().values()]


def test_a_card_is_shown_in_full_with_the_number_of_its_parameters() -> None:
    lines = dict(line.split("  ", 1) for line in run("models", "show", "unet-small").splitlines())
    found = {name.strip(): text.strip() for name, text in lines.items()}
    card = load_models()["unet-small"]
    assert found["title"] == card.title
    assert found["bands"] == "B02 B03 B04 B05 B06 B07 B08 B8A B11 B12"
    assert found["options"] == "width 16, depth 3"
    assert found["paper"] == card.paper
    assert found["weights"] == "none yet: `minecube train`"
    assert "licence" not in found  # of weights that there are not
    assert int(found["parameters"].replace(",", "")) == sum(
        p.numel() for p in network.build(card).parameters()
    )


def test_cards_of_ones_own_with_weights_and_scores(tmp_path: Path) -> None:
    folder = own_catalog(tmp_path)
    (line,) = (
        line for line in run("models", "--catalog", folder).splitlines() if line.startswith("own ")
    )
    assert line.split()[1:] == ["mapping", "unet", "mine", "160", "px", "yes"]
    for arguments in (
        ("models", "show", "own", "--catalog", folder),
        ("models", "--catalog", folder, "show", "own"),
    ):
        out = run(*arguments)
        assert "licence " in out
        for text in (
            "https://example.org/own.pt",
            "a1" * 32,
            "weights: revision  3",
            "Germany_1, Austria_2",
            "score: iou",
        ):
            assert text in out
    for arguments in (("--json", "show", "own"), ("show", "own", "--json")):
        said = json.loads(run("models", "--catalog", folder, *arguments))
        assert said["weights"]["sha256"] == "a1" * 32
        assert said["scores"] == {"iou": 0.91}
        assert said["parameters"] == network.count_parameters(
            load_models(folder / "models.yaml")["own"]
        )


def test_the_file_of_a_trained_network_is_shown_with_how_it_came_to_be(tmp_path: Path) -> None:
    card = load_models()["unet-small"]
    training = {
        "settings": {"id": "cpu", "epochs": 10},
        "seed": 3,
        "epoch": 7,
        "validation F1": 0.875,
    }
    of = network.TrainedModel(
        card=card,
        network=network.build(card),
        mean=(1500.0,) * 10,
        std=(400.0,) * 10,
        sites=("pit", "pond"),
        training=training,
    )
    network.save(of, tmp_path / "model.pt")
    lines = dict(
        line.split("  ", 1) for line in run("models", "show", tmp_path / "model.pt").splitlines()
    )
    found = {name.strip(): text.strip() for name, text in lines.items()}
    assert found["trained on"] == "pit pond"
    assert (found["seed"], found["epoch"], found["validation F1"]) == ("3", "7", "0.875")
    assert found["settings"] == "id cpu, epochs 10"
    assert found["mean"] == " ".join(["1500.0"] * 10)
    assert "weights" not in found
    said = json.loads(run("models", "show", tmp_path / "model.pt", "--json"))
    assert said["trained_on"] == ["pit", "pond"]
    assert said["settings"] == training["settings"]
    (tmp_path / "no.pt").write_bytes(b"no")
    assert "is not a model that minecube wrote" in run("models", "show", tmp_path / "no.pt", ok=2)


def test_unknown_names_and_architectures_are_named(tmp_path: Path) -> None:
    assert "unknown model 'segformer-b7'; there is: " in (
        out := run("models", "show", "segformer-b7", ok=2)
    )
    assert "segformer-b2" in out
    folder = own_catalog(tmp_path, architecture="gpt")
    assert "model own: unknown architecture 'gpt'" in run(
        "models", "show", "own", "--catalog", folder, ok=2
    )
    assert "segformer-b2' is in the shipped catalogue already" in run(
        "models", "--catalog", own_catalog(tmp_path, "segformer-b2"), ok=2
    )


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes a module one that is not installed."""
    real = builtins.__import__

    def hide(hidden: str, loaded: str) -> None:
        def importing(name: str, *arguments: Any, **more: Any) -> Any:
            if name.partition(".")[0] == hidden:
                raise ModuleNotFoundError(f"No module named {hidden!r}", name=hidden)
            return real(name, *arguments, **more)

        monkeypatch.delitem(sys.modules, loaded, raising=False)
        monkeypatch.delitem(sys.modules, hidden, raising=False)
        monkeypatch.setattr(builtins, "__import__", importing)

    return hide


@pytest.mark.parametrize("library", ["segmentation_models_pytorch", "timm", "transformers"])
def test_without_the_libraries_a_card_is_shown_all_the_same(without: Any, library: str) -> None:
    without(library, "minecube.models.libraries")
    out = run("models", "show", "linknet-resnet50")
    assert "not counted: pip install 'minecube[models]'" in out
    assert json.loads(run("models", "show", "linknet-resnet50", "--json"))["parameters"] is None


def test_the_list_needs_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None  # importing it is an error
from minecube.cli import main
main(["models"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "segformer-b2" in done.stdout


def test_a_command_that_needs_a_library_says_how_to_install_it(
    without: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    def train() -> None:
        network.build(load_models()["segformer-b0-small"])

    # Stands in for the real one, which looks for a store first.
    monkeypatch.setitem(sys.modules, "minecube.cli.train", types.SimpleNamespace(train=train))
    without("transformers", "minecube.models.libraries")
    assert "`minecube train` needs transformers: pip install 'minecube[models]'" in run(
        "train", ok=2
    )
