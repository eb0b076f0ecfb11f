"""The second opinion on clouds: what is handed to omnicloudmask, and what comes back. Its own networks cannot be had here."""

from __future__ import annotations

import importlib
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest

from minecube.errors import ModelError

torch = pytest.importorskip("torch")


class Thick(torch.nn.Module):
    """Calls thick cloud what is bright in the red, the first of its channels."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        bright = (image[:, 0] > 3000).float()
        return torch.stack([1 - bright, bright, 0 * bright, 0 * bright], dim=1)


@pytest.fixture
def opinion(monkeypatch):
    """The module, with a stand-in for the package that runs the models on the whole array, as that does on patches."""
    stand_in = ModuleType("omnicloudmask")

    def predict_from_array(array, custom_models, inference_device):
        assert array.dtype == np.float32
        assert inference_device == "cpu"
        votes = sum(model(torch.from_numpy(array)[None]) for model in custom_models)
        return votes.argmax(dim=1).numpy().astype(np.uint8)

    stand_in.predict_from_array = predict_from_array
    monkeypatch.setitem(sys.modules, "omnicloudmask", stand_in)
    monkeypatch.delitem(sys.modules, "minecube.composite.opinion", raising=False)
    yield importlib.import_module("minecube.composite.opinion")
    sys.modules.pop("minecube.composite.opinion", None)


def test_bands_arrive_as_it_expects_them(opinion, tmp_path):
    """Green, red, near infrared come in the cube's order, and are handed on as red, green, near infrared."""
    side = torch.export.Dim("side", min=2, max=4096), torch.export.Dim("width", min=2, max=4096)
    program = torch.export.export(
        Thick(), (torch.zeros(1, 3, 8, 9),), dynamic_shapes=({2: side[0], 3: side[1]},)
    )
    torch.export.save(program, tmp_path / "net.pt")
    look = opinion.OmniCloudMask([str(tmp_path / "net.pt")])
    image = np.full((3, 6, 8), 500, np.uint16)
    image[1, 2:4, 3:5] = 6000  # red
    image[0, 0, 0] = 6000  # green
    seen = look(image)
    expected = np.zeros((6, 8), np.uint8)
    expected[2:4, 3:5] = 1
    np.testing.assert_array_equal(seen, expected)
    assert seen.dtype == np.uint8
    again = pickle.loads(pickle.dumps(look))  # to a worker
    np.testing.assert_array_equal(again(image), seen)
    assert not look(np.zeros((3, 6, 8), np.uint16)).any()


def test_weights_that_are_none(opinion, tmp_path):
    (tmp_path / "net.pt").write_bytes(b"not a network")
    for name in ("net.pt", "gone.pt"):
        with pytest.raises(ModelError, match=rf"{name}: expected a network for clouds saved by"):
            opinion.OmniCloudMask([str(tmp_path / name)])
