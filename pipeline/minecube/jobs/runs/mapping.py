"""Map a site with the networks of a dataset. Loads torch."""

from __future__ import annotations

from minecube import models
from minecube.cube.views import model_digest
from minecube.digests import sha256_of_json
from minecube.jobs.catalogs import load_all_models
from minecube.jobs.predict import MapOptions, map_site
from minecube.jobs.runs.inputs import Inputs, cached_for_run
from minecube.places import Place


@cached_for_run(maxsize=4)
def _load_mapper(model: str, catalog: Place | None, device: str) -> models.Mapper:
    # One thread on a CPU: the last bits of a map depend on the number of threads.
    compute = models.Compute(device=device, workers=1)
    return models.Mapper(models.find_model(model, load_all_models(catalog)), compute)


def map_with_all(inputs: Inputs, site: str, *, replace_models: bool) -> None:
    """Map a site with each network of the dataset.

    With `replace_models`, maps of another model under the same name are replaced.

    Raises as `map_site` does.
    """
    for model in inputs.dataset.models:
        mapper = _load_mapper(model.file, inputs.catalog, model.device)
        stored = model_digest(inputs.store, site, model.name)
        is_other = stored is not None and stored != sha256_of_json(mapper.description)
        options = MapOptions(prediction=model.name, overwrite=replace_models and is_other)
        map_site(inputs.store, site, mapper, options)
