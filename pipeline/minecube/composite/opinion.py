"""A second opinion on clouds: omnicloudmask (an extra) with the user's own weights."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Sequence

import numpy as np
import omnicloudmask
import torch

from minecube.arrays import UInt8, UInt16
from minecube.errors import ModelError

_LOAD_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    KeyError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


class OmniCloudMask:
    """Cloud classifier of a date: 0 clear, 1 thick cloud, 2 thin cloud, 3 shadow.

    The input is red, green and near infrared. The class of a pixel depends slightly on the rest of
    the block, so blocks may differ at their seams.

    Args:
        weights: Files of exported networks (torch.export.save), [n, 3, y, x] -> [n, 4, y, x]. Their
            votes are averaged.
        device: For instance cuda.

    Raises:
        ModelError: A file is missing, or is not an exported network.
    """

    def __init__(self, weights: Sequence[str], device: str = "cpu") -> None:
        self.weights = tuple(weights)
        self.device = device
        self._models = [_load(path) for path in self.weights]

    def __call__(self, image: UInt16) -> UInt8:
        """Classify B03, B04 and B08: uint8 [y, x].

        The input is uint16 [3, y, x], reflectance x 10000, 0 = no data.
        """
        if not image.any():
            return np.zeros(image.shape[1:], dtype=np.uint8)
        green, red, nir = image.astype(np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # blocks smaller than its default patch are intended
            classes = omnicloudmask.predict_from_array(
                np.stack([red, green, nir]),
                custom_models=list(self._models),
                inference_device=self.device,
            )
        return np.asarray(classes, dtype=np.uint8).reshape(image.shape[1:])

    def __reduce__(self) -> tuple[type[OmniCloudMask], tuple[tuple[str, ...], str]]:
        return OmniCloudMask, (self.weights, self.device)


def _load(path: str) -> torch.nn.Module:
    try:
        return torch.export.load(path).module()
    except _LOAD_ERRORS as error:
        raise ModelError(
            f"{path}: expected a network for clouds saved by torch.export.save, "
            f"found a file that cannot be loaded ({error}); check second_opinion.weights of the recipe"
        ) from error
