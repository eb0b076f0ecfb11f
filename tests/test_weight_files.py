"""Files with the weights of a card are opened safely, others refused by one sentence."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from known_weights import CARD, MEAN, STD, Evil, same, trained, with_weights
from minecube import models
from minecube.errors import ModelError
from minecube.models import fetch, save


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bands": ("B03", "B08")}, r"bands \('B03', 'B08'\), found \('B04', 'B08'\)"),
        ({"bands": ("B04", "B08", "B11")}, "bands"),
        ({"task": "change", "classes": ("changed",)}, "task change, found mapping"),
        ({"options": {"width": 8, "depth": 2}}, "options .*8.*, found .*4"),
        ({"architecture": "pspnet"}, "architecture pspnet, found unet"),
    ],
)
def test_weights_of_another_card_are_refused(
    tmp_path: Path, changes: dict[str, object], words: str
) -> None:
    save(trained(), tmp_path / "mine.pt")
    card = with_weights(tmp_path / "mine.pt", card=dataclasses.replace(CARD, **changes))
    with pytest.raises(
        ModelError, match=f"expected weights of model mine-net with {words}.*correct the card"
    ):
        fetch(card)


def test_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    transition = dataclasses.replace(CARD, task="change", classes=("removed", "new"))
    save(trained(transition), tmp_path / "mine.pt")
    turned = dataclasses.replace(transition, classes=("new", "removed"))
    with pytest.raises(ModelError, match="classes"):
        fetch(with_weights(tmp_path / "mine.pt", card=turned))


def test_another_mean_than_the_files_is_refused(tmp_path: Path) -> None:
    save(trained(), tmp_path / "mine.pt")
    assert fetch(with_weights(tmp_path / "mine.pt", mean=MEAN, std=STD)).mean == MEAN
    with pytest.raises(
        ModelError,
        match=r"expected mean \(1\.0, 2100\.0\), as the card says, found \(900\.0, 2100\.0\)",
    ):
        fetch(with_weights(tmp_path / "mine.pt", mean=(1.0, 2100.0), std=STD))


def test_a_plain_state_dict_is_taken_with_mean_and_deviation_of_the_card(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(trained().network.state_dict(), path)
    card = dataclasses.replace(CARD, trained_on="Germany_1, Austria_2")
    found = fetch(with_weights(path, card=card, mean=MEAN, std=STD))
    assert same(found.network, trained().network)
    assert (found.mean, found.std, found.sites) == (MEAN, STD, ("Germany_1", "Austria_2"))
    with pytest.raises(ModelError, match="does not say by which mean and deviation"):
        fetch(with_weights(path))
    wide = dataclasses.replace(CARD, options={"width": 8, "depth": 2})
    with pytest.raises(ModelError, match="weights are not those of its card"):
        fetch(with_weights(path, card=wide, mean=MEAN, std=STD))
    for content in ({}, [1, 2], {"weights": 3}, {"model": {"a": torch.zeros(1)}}):
        torch.save(content, path)
        with pytest.raises(
            ModelError, match="expected a model that minecube wrote, or a state_dict"
        ):
            fetch(with_weights(path, mean=MEAN, std=STD))


def taken(path: Path, content: object) -> torch.nn.Module:
    """The network of a card whose weights are a file with that content."""
    torch.save(content, path)
    return fetch(with_weights(path, mean=MEAN, std=STD)).network


def prefixed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in trained().network.state_dict().items()}


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.module."],
)
def test_prefixes_of_wrappers_are_taken_off(tmp_path: Path, prefix: str) -> None:
    assert same(taken(tmp_path / "w.pt", prefixed(prefix)), trained().network)
    assert same(
        taken(tmp_path / "w.pt", {"epoch": 3, "state_dict": prefixed(prefix)}), trained().network
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of torch.jit
def test_what_torch_itself_wraps_is_taken(tmp_path: Path) -> None:
    network = trained().network
    path = tmp_path / "w.pt"
    assert same(taken(path, torch.nn.DataParallel(network).state_dict()), network)
    assert same(taken(path, torch.compile(network).state_dict()), network)
    network.head = torch.compile(network.head)  # a part of it: the prefix stands within the names
    assert "head._orig_mod.weight" in network.state_dict()
    assert same(taken(path, network.state_dict()), trained().network)


def test_a_checkpoint_of_lightning_is_taken_and_what_is_left_out_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = trained().network
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": {**prefixed("model."), "criterion.pos_weight": torch.ones(1)},
        "optimizer_states": [torch.optim.Adam(network.parameters()).state_dict()],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.3)}},
        "hyper_parameters": {
            "lr": np.float64(1e-3),
            "where": Path("a"),
            "loss": torch.nn.BCELoss(),
            "f1": np.ones(3),
        },
    }
    assert same(taken(tmp_path / "w.ckpt", content), network)
    assert [
        r.getMessage().partition(": ")[2] for r in caplog.records if r.levelname == "WARNING"
    ] == ["left out criterion.pos_weight, which are no weights of unet"]


def test_numpy_scalars_do_not_hinder(tmp_path: Path) -> None:
    scalars = {
        "f1": np.float64(0.9),
        "loss": np.float32(0.1),
        "epoch": np.int64(3),
        "done": np.bool_(True),
    }
    assert same(taken(tmp_path / "w.pt", {**prefixed(""), **scalars}), trained().network)
    assert same(
        taken(tmp_path / "w.pt", {"model_state_dict": prefixed(""), **scalars}), trained().network
    )


def test_numpy_scalars_in_a_model_of_ours_are_numbers(tmp_path: Path) -> None:
    content = {"mean": np.float32(MEAN), "std": np.float64(STD)}
    save(
        dataclasses.replace(trained(), mean=tuple(content["mean"]), std=tuple(content["std"])),
        tmp_path / "mine.pt",
    )
    assert {type(v) for v in torch.load(tmp_path / "mine.pt", weights_only=True)["mean"]} == {float}
    written = torch.load(tmp_path / "mine.pt", weights_only=True)
    written |= {name: list(values) for name, values in content.items()}
    written["training"] = {
        "f1": np.float64(0.9),
        "epoch": np.int16(-3),
        "turned": np.array([2.5], ">f4")[0],
    }
    torch.save(written, tmp_path / "mine.pt")
    found = models.load(tmp_path / "mine.pt")
    assert (found.mean, found.std) == (MEAN, STD)
    assert found.training == {"f1": 0.9, "epoch": -3, "turned": 2.5}
    assert same(fetch(with_weights(tmp_path / "mine.pt")).network, trained().network)


def test_weights_that_are_there_twice_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"holds the weights of unet 2 times \(model; ema\).*save those that are"
    ):
        taken(tmp_path / "w.pt", {"model": prefixed(""), "ema": prefixed("")})
    with pytest.raises(
        ModelError,
        match=r"2 times \(prefix 'student.' in state_dict; prefix 'teacher.' in state_dict\)",
    ):
        taken(tmp_path / "w.pt", {"state_dict": prefixed("student.") | prefixed("teacher.")})


def test_weights_twice_without_a_prefix_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"2 times \(without a prefix; prefix 'module.'\)"):
        taken(tmp_path / "w.pt", prefixed("") | prefixed("module."))


def test_tensors_of_a_loss_are_left_out_without_a_prefix_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loss = {"criterion.weight": torch.ones(1), "n_averaged": torch.tensor(3)}
    assert same(taken(tmp_path / "w.pt", prefixed("") | loss), trained().network)
    assert "left out criterion.weight, n_averaged, which are no weights of unet" in caplog.text
    with pytest.raises(ModelError, match=r"\(1 not expected, such as head.more\)"):
        taken(tmp_path / "w.pt", prefixed("") | {"head.more": torch.ones(1)})


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (lambda v: v * float("nan"), "NaN or infinity in head.weight"),
        (lambda v: v / 0, "NaN or infinity in head.weight"),
        (lambda v: v.double() + 1e300, "NaN or infinity in head.weight"),  # infinite as float32
        (lambda v: v.to(torch.int8), "int8 in head.weight"),
        (lambda v: v > 0, "bool in head.weight"),
        (lambda v: v.to(torch.complex64), "complex64 in head.weight"),
        (lambda v: v.to_sparse(), "sparse_coo in head.weight"),
        (lambda v: v.to("meta"), r"no values \(device meta\) in head.weight"),
    ],
)
def test_tensors_that_are_no_finite_floats_are_refused(tmp_path: Path, changed, words: str) -> None:
    path = tmp_path / "w.pt"
    state = prefixed("")
    state["head.weight"] = changed(state["head.weight"])
    with pytest.raises(
        ModelError, match=f"w.pt: expected dense tensors of finite floats, found {words}; save"
    ) as caught:
        taken(path, state)
    assert "\n" not in str(caught.value)
    save(trained(), path)
    torch.save(torch.load(path, weights_only=True) | {"weights": state}, path)
    with pytest.raises(
        ModelError, match=f"expected dense tensors of finite floats, found {words}; save"
    ):
        models.load(path)


def test_floats_of_other_widths_are_taken(tmp_path: Path) -> None:
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        state = {
            name: v.to(kind) if v.is_floating_point() else v for name, v in prefixed("").items()
        }
        found = taken(tmp_path / "w.pt", state).state_dict()
        assert torch.equal(found["head.weight"], state["head.weight"].float())


def test_tensors_that_differ_alike_are_counted(tmp_path: Path) -> None:
    state = {
        name: v * float("nan") if name.startswith("head.") else v
        for name, v in prefixed("").items()
    }
    assert [name for name in state if name.startswith("head.")] == ["head.weight", "head.bias"]
    with pytest.raises(ModelError, match=r"NaN or infinity in head\.weight and 1 more;"):
        taken(tmp_path / "w.pt", state)


def test_weights_that_do_not_fit_are_told_by_the_tensors_that_differ(tmp_path: Path) -> None:
    path, names = tmp_path / "w.pt", list(prefixed(""))
    with pytest.raises(
        ModelError,
        match=rf"{len(names)} missing, such as {names[0]}; 1 not expected, such as a.weight",
    ):
        taken(path, {"a.weight": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"\(1 not expected, such as more\)"):
        taken(path, prefixed("module.") | {"module.more": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"\(1 of another shape, such as head.bias\)"):
        taken(path, prefixed("module.") | {"module.head.bias": torch.zeros(9)})
    with pytest.raises(
        ModelError, match=f"with tensors such as {names[0]}; found a.weight in state_dict"
    ):
        taken(path, {"state_dict": {"a.weight": torch.zeros(1)}})


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_files_of_other_programs_are_named(tmp_path: Path) -> None:
    path, network = tmp_path / "w.pt", trained().network
    with pytest.raises(
        ModelError, match=r"found a pickled minecube.models.unet.UNet, whose code is not run; save"
    ):
        taken(path, network)
    with pytest.raises(
        ModelError, match=r"a dictionary of numpy\._core\.multiarray\._reconstruct \(a\)"
    ):
        taken(path, {"a": np.ones(3)})
    torch.save(network, path)
    with pytest.raises(
        ModelError, match=r"looks like a file with objects of minecube.models.unet.UNet, "
    ):
        models.load(path)
    torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"a file of torch.save before torch 1\.6"):
        models.load(path)
    torch.jit.save(torch.jit.trace(network, torch.zeros(1, 2, 16, 16)), path)
    with pytest.raises(ModelError, match="a TorchScript archive"):
        fetch(with_weights(path, mean=MEAN, std=STD))
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    others = {
        len(header).to_bytes(8, "little") + header + bytes(4): "a safetensors file",
        b"\x89HDF\r\n\x1a\n": "an HDF5 file",
        b"version https://git-lfs.github.com/spec/v1\n": "a pointer of Git LFS",
        b"\n<!DOCTYPE html>": "a page of HTML",
        b"\x08\x07\x12\x07pytorch": "an ONNX model",
        pickle.dumps({"a": 1}): "a pickle that torch.save did not write",
    }
    for content, kind in others.items():
        path.write_bytes(content)
        with pytest.raises(
            ModelError, match=f"is not a model that minecube wrote.*looks like {kind}"
        ):
            fetch(with_weights(path))


class Opener(Evil):
    """Unpickled, it would write a file by a function that is called by its name."""

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_nothing_runs_wherever_it_stands_in_a_checkpoint(tmp_path: Path) -> None:
    evil = Opener(tmp_path / "written")
    assert same(
        taken(tmp_path / "w.pt", {"state_dict": prefixed(""), "hyper_parameters": {"a": evil}}),
        trained().network,
    )
    for content in ({**prefixed(""), "head.bias": evil}, {"state_dict": evil}, [evil]):
        with pytest.raises(ModelError):
            taken(tmp_path / "w.pt", content)
    save(trained(), tmp_path / "mine.pt")
    torch.save(
        torch.load(tmp_path / "mine.pt", weights_only=True) | {"training": {"a": evil}},
        tmp_path / "mine.pt",
    )
    with pytest.raises(ModelError, match="is not a model that minecube wrote"):
        models.load(tmp_path / "mine.pt")
    with pytest.raises(ModelError, match="is not a model that minecube wrote"):
        fetch(with_weights(tmp_path / "mine.pt"))
    assert not (tmp_path / "written").exists()


def test_files_of_other_versions_and_with_missing_parts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    save(trained(), path)
    content = torch.load(path, weights_only=True)
    cases = [
        ({"format": "minecube-model-1"}, "expected minecube-model-2, found minecube-model-1"),
        ({"card": None}, "lacks card"),
        ({"weights": [1]}, "lacks weights"),
        ({"mean": [1.0]}, "expected mean and deviation of 2 bands"),
        ({"std": [1.0, 0.0]}, "expected mean and deviation of 2 bands"),
    ]
    for changes, words in cases:
        torch.save({**content, **changes}, path)
        with pytest.raises(ModelError, match=words):
            models.load(path)
    for part in ("card", "mean", "std", "sites", "weights"):
        torch.save({name: value for name, value in content.items() if name != part}, path)
        with pytest.raises(ModelError, match=f"lacks {part}"):
            models.load(path)


def test_a_file_cut_anywhere_or_with_a_flipped_bit_is_never_another_model(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    save(trained(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError):
            models.load(path)
    for at in range(0, len(whole), max(1, len(whole) // 150)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = models.load(path)
        except ModelError:
            continue
        assert same(found.network, trained().network)
        assert (found.mean, found.std, found.card) == (MEAN, STD, CARD)
