"""Views, years, bands and devices that do not fit a network are refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import xarray as xr

from known_maps import CHANGE, SERIES, SMALL, YEARS, given_by, reflectance, series_of, untrained
from minecube.errors import ModelError
from minecube.models import Compute, Mapper, list_views, predict

pytestmark = pytest.mark.usefixtures("one_thread")


def test_views() -> None:
    assert list_views(SMALL, [2020, 2019]) == [(2019,), (2020,)]
    assert list_views(SERIES, [2020, 2019]) == [(2019, 2020)]
    assert len(list_views(CHANGE, range(2015, 2025))) == 45
    assert list_views(CHANGE, YEARS, [(2019, 2021), (2019, 2021)]) == [(2019, 2021)]
    with pytest.raises(ModelError, match="change needs 2 years or more, found 2019"):
        list_views(CHANGE, [2019])
    for pairs in ([(2019, 2018)], [(2018, 2020)], [(2018, 2018)]):
        with pytest.raises(
            ModelError, match=f"of the years 2018, 2019, 2021, .* found {pairs[0][0]}-{pairs[0][1]}"
        ):
            list_views(CHANGE, YEARS, pairs)
    with pytest.raises(ModelError, match="pairs of years are for change; its task is mapping"):
        list_views(SMALL, YEARS, [(2018, 2019)])
    with pytest.raises(ModelError, match="year 2030 is not in the cube"):
        list(Mapper(untrained()).map_rows(reflectance(1), [(2030,)]))


def test_a_network_of_so_many_years_takes_no_other_number() -> None:
    model = given_by(series_of, SERIES)
    model.network.years = 3  # type: ignore[assignment]
    assert predict(model, reflectance(1, years=YEARS)).shape == (3, 48, 40)
    with pytest.raises(ModelError, match=r"takes 3 years, found 2 \(2019, 2020\)"):
        predict(model, reflectance(1))


def test_bands_are_taken_by_name() -> None:
    of = reflectance(12)
    three = dataclasses.replace(SMALL, bands=("B03", "B04", "B11"))
    expected = predict(untrained(three), of.sel(band=list(three.bands)))
    xr.testing.assert_identical(predict(untrained(three), of), expected)
    with pytest.raises(ModelError, match="in this order, found B03, B02, B04"):
        predict(untrained(), of.isel(band=[1, 0, *range(2, 10)]))
    with pytest.raises(ModelError, match="found B02, B03, B04"):
        predict(untrained(), of.isel(band=slice(0, 9)))
    with pytest.raises(ModelError, match="no names"):
        predict(untrained(), of.drop_vars("band"))


def test_decoded_reflectance_is_refused() -> None:
    with pytest.raises(ModelError, match=r"uint16.*float"):
        predict(untrained(), reflectance(13) / 10000.0)


def test_ways_to_compute_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ModelError, match=r"'cuda' was asked for, but torch .* sees 0 GPUs"):
        predict(untrained(), reflectance(14), compute=Compute(device="cuda"))
    with pytest.raises(ModelError, match="is for GPUs"):
        predict(untrained(), reflectance(14), compute=Compute(compiled=True))
    with pytest.raises(ModelError, match="'gpu' is not one that torch knows"):
        predict(untrained(), reflectance(14), compute=Compute(device="gpu"))
    for wrong in ({"precision": "fp8"}, {"workers": 0}, {"batch": -1}):
        with pytest.raises(
            ModelError, match="expected a precision of fp32, bf16, workers and batch of 1 or more"
        ):
            Compute(**wrong)  # type: ignore[arg-type]
