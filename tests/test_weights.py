"""Weights of a card are read or downloaded whole, with the right hash, and found by name."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from known_weights import CARD, MEAN, STD, Evil, same, trained, with_weights
from minecube.catalog import ModelCard, load_models
from minecube.errors import CatalogError, ModelError
from minecube.models import fetch, find_model, save


@dataclass
class Server:
    url: str
    folder: Path
    asked: list[str] = field(default_factory=list)
    cut: int = 0
    """Answers that stop after this many bytes, if it is not 0."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked.append(self.path)
            path = here.folder / self.path.partition("?")[0].lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: here.cut] if here.cut else content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        here = Server(f"http://127.0.0.1:{httpd.server_port}", tmp_path / "served")
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield here
        httpd.shutdown()


# Getting


def test_weights_are_downloaded_once(server: Server, tmp_path: Path) -> None:
    save(trained(), server.folder / "mine.pt")
    card, cache = (
        with_weights(server.folder / "mine.pt", f"{server.url}/mine.pt"),
        tmp_path / "cache",
    )
    found = fetch(card, cache)
    assert same(found.network, trained().network)
    assert not found.network.training
    assert (found.card, found.mean, found.std, found.sites) == (card, MEAN, STD, ("a", "b"))
    assert [p.name for p in cache.iterdir()] == [f"{card.weights.sha256}.pt"]
    assert same(fetch(card, cache).network, found.network)
    assert server.asked == ["/mine.pt"]


def test_a_copy_that_was_damaged_is_got_again(server: Server, tmp_path: Path) -> None:
    save(trained(), server.folder / "mine.pt")
    card, cache = (
        with_weights(server.folder / "mine.pt", f"{server.url}/mine.pt"),
        tmp_path / "cache",
    )
    cache.mkdir()
    (cache / f"{card.weights.sha256}.pt").write_bytes(b"half a fi")
    assert same(fetch(card, cache).network, trained().network)
    assert len(server.asked) == 1


def test_the_cache_is_torchs_by_default(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    save(trained(), server.folder / "mine.pt")
    card = with_weights(server.folder / "mine.pt", f"{server.url}/mine.pt")
    fetch(card)
    assert [p.name for p in (tmp_path / "torch").rglob("*.pt")] == [f"{card.weights.sha256}.pt"]


def test_another_hash_is_refused_before_anything_is_opened(server: Server, tmp_path: Path) -> None:
    save(trained(seed=0), tmp_path / "right.pt")
    save(trained(seed=1), server.folder / "mine.pt")
    # Were this one opened first, the error would be that it is no model.
    (server.folder / "text.pt").write_text("no model")
    right = hashlib.sha256((tmp_path / "right.pt").read_bytes()).hexdigest()
    for path in server.folder.iterdir():
        wrong = hashlib.sha256(path.read_bytes()).hexdigest()
        for href in (f"{server.url}/{path.name}", str(path)):
            with pytest.raises(
                ModelError,
                match=f"{path.name}: expected a file of sha256 {right}.*found {wrong}.*not opened.*again",
            ):
                fetch(with_weights(tmp_path / "right.pt", href), tmp_path / "cache")
    assert len(server.asked) == 2
    assert list((tmp_path / "cache").iterdir()) == []


def test_nothing_in_a_file_is_run_although_its_hash_is_right(tmp_path: Path) -> None:
    torch.save(Evil(tmp_path / "written"), tmp_path / "evil.pt")
    with pytest.raises(ModelError, match="is not a model that minecube wrote"):
        fetch(with_weights(tmp_path / "evil.pt"), tmp_path / "cache")
    assert not (tmp_path / "written").exists()


def test_what_cannot_be_downloaded_leaves_nothing(server: Server, tmp_path: Path) -> None:
    save(trained(), server.folder / "mine.pt")
    good, cache = with_weights(server.folder / "mine.pt"), tmp_path / "cache"

    def at(href: str) -> ModelCard:
        return dataclasses.replace(good, weights=dataclasses.replace(good.weights, href=href))

    with pytest.raises(
        ModelError, match=r"gone.pt: the weights cannot be downloaded to .*404"
    ) as caught:
        fetch(at(f"{server.url}/gone.pt?signature=secret"), cache)
    assert "secret" not in str(caught.value)
    server.cut = 1000
    with pytest.raises(ModelError, match=r"cannot be downloaded.*IncompleteRead"):
        fetch(at(f"{server.url}/mine.pt"), cache)
    with pytest.raises(ModelError, match="cannot be downloaded"):
        fetch(at("http://127.0.0.1:1/mine.pt"), cache)
    with pytest.raises(ModelError, match=r"expected weights at http\(s\)://, or a path"):
        fetch(at("s3://bucket/mine.pt"), cache)
    with pytest.raises(ModelError, match=r"nowhere.pt: the weights cannot be read"):
        fetch(at(str(tmp_path / "nowhere.pt")), cache)
    assert list(cache.iterdir()) == []
    (tmp_path / "file").write_text("no folder")
    server.cut = 0
    with pytest.raises(ModelError, match="cannot be downloaded to"):
        fetch(at(f"{server.url}/mine.pt"), tmp_path / "file")


# Finding


def test_a_model_is_found_by_file_or_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(trained(seed=0), tmp_path / "mine.pt")
    save(trained(seed=1), tmp_path / "own.pt")
    cards = {
        "mine-net": with_weights(tmp_path / "mine.pt"),
        "untrained": dataclasses.replace(CARD, id="untrained"),
    }
    assert same(find_model("mine-net", cards).network, trained(seed=0).network)
    assert same(find_model(str(tmp_path / "own.pt"), cards).network, trained(seed=1).network)
    with pytest.raises(
        ModelError,
        match="model untrained: its card names no trained weights; train it with `minecube train",
    ):
        find_model("untrained", cards)
    with pytest.raises(
        ModelError,
        match="mine-nett: is neither the file of a trained model nor a model of the catalogue",
    ):
        find_model("mine-nett", cards)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine-net").mkdir()  # a folder of that name is no file
    assert same(find_model("mine-net", cards).network, trained(seed=0).network)


# The card


def test_weights_in_a_catalogue_lie_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    save(trained(), tmp_path / "own" / "mine.pt")
    digest = hashlib.sha256((tmp_path / "own" / "mine.pt").read_bytes()).hexdigest()
    (tmp_path / "own" / "models.yaml").write_text(
        "mine-net:\n  title: ours\n  architecture: unet\n  bands: [B04, B08]\n  options: {width: 4, depth: 2}\n"
        f"  window_px: 16\n  multiple_px: 4\n  weights: {{href: mine.pt, sha256: {digest}}}\n"
        "elsewhere:\n  title: ours\n  architecture: unet\n"
        f"  weights: {{href: 'https://example.org/mine.pt', sha256: {digest}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    cards = load_models(Path("own/models.yaml"))
    monkeypatch.chdir("/")
    assert same(find_model("mine-net", cards).network, trained().network)
    assert cards["elsewhere"].weights.href == "https://example.org/mine.pt"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ("{href: a, sha256: 12ab}", "sha256.*64 hexadecimal digits"),
        (f"{{href: a, sha256: '{'0' * 64}', mean: [1]}}", "as many numbers as mean"),
        (f"{{href: a, sha256: '{'0' * 64}', mean: [1, 2], std: [1, 0]}}", "above 0"),
        (
            f"{{href: a, sha256: '{'0' * 64}', mean: [1, 2], std: [1, 2]}}",
            "a number for each of 10 bands, found 2",
        ),
    ],
)
def test_wrong_weights_in_a_card_are_named(tmp_path: Path, fields: str, words: str) -> None:
    path = tmp_path / "models.yaml"
    path.write_text(f"net:\n  title: t\n  architecture: unet\n  weights: {fields}\n")
    with pytest.raises(CatalogError, match=f"entry 'net'.*{words}"):
        load_models(path)
