"""The steps of a run on site-years: search and build. The steps on sites are in `site_steps.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from minecube import cube
from minecube.catalog import Source
from minecube.errors import MinecubeError
from minecube.grid import grid_of
from minecube.jobs.build import build_year
from minecube.jobs.runs.inputs import Inputs
from minecube.jobs.runs.states import needs_search
from minecube.jobs.runs.units import Unit
from minecube.jobs.scene_lists import load_or_save, search_and_save

_COUNTED = ("bytes", "requests", "retried", "lost")


@dataclass(frozen=True)
class Limits:
    """Limits of one attempt on a worker, and its run."""

    run: str = ""
    """Random id of the run. Workers load the inputs again for each run."""

    threads: int = 1
    """Threads that compute blocks of a composite."""
    block_fraction: float = 1.0
    """Share of the usual memory of a block, smaller after a lack of memory."""
    workers: int = 1
    """Workers of the run and of its other shards, which divide the rate of searches among them."""
    connections: int | None = None
    """Most simultaneous requests for pixels of this worker; None: those of the source."""
    overwrite: bool = False
    """Whether to replace stale site-years, and maps of other models."""


@dataclass(frozen=True)
class Finding:
    """What a unit of work found out, for its event."""

    state: str = "done"
    """done, or gaps: committed, but with lost reads."""
    reads: Mapping[str, float] = field(default_factory=dict)
    """Bytes, requests, retried and lost reads."""


class BuildFailedError(MinecubeError):
    """A site-year that the build job has reported as failed."""

    def __init__(self, message: str, error_class: str) -> None:
        super().__init__(message)
        self.error_class = error_class
        """As from `failures.classify`."""


def share_searches(sources: Iterable[Source], workers: int) -> tuple[Source, ...]:
    """Divide the rate of searches of each source among workers."""
    return tuple(
        replace(source, searches_per_s=source.searches_per_s / workers) for source in sources
    )


def search_scenes(inputs: Inputs, unit: Unit, limits: Limits) -> Finding:
    """Search the scenes of a site-year, and save their list, unless another run just did."""
    sources = share_searches(inputs.job.sources, limits.workers)
    if needs_search(inputs, unit.site, unit.year):
        search_and_save(inputs.sites[unit.site], unit.year, sources, inputs.job.snapshots)
    return Finding()


def build_site_year(inputs: Inputs, unit: Unit, limits: Limits) -> Finding:
    """Build and commit a site-year.

    A site without any scenes leaves no group in the store.

    Raises:
        BuildFailedError: the build failed.
        SceneError, CubeError: it could not begin.
    """
    site = inputs.sites[unit.site]
    job = replace(
        inputs.job,
        sources=share_searches(inputs.job.sources, limits.workers),
        overwrite=limits.overwrite,
        block_fraction=limits.block_fraction,
    )
    load_or_save(site, unit.year, job.sources, job.snapshots)
    cube.create_site(job.store, site, grid_of(site), inputs.dataset.years, job.recipe)
    outcome = build_year(job, site, unit.year, limits.threads)
    if outcome.state in ("failed", "stale"):
        raise BuildFailedError(outcome.message, outcome.error_class)
    reads = {name: outcome.reads.get(name, 0) + outcome.looks.get(name, 0) for name in _COUNTED}
    if outcome.reads.get("lost"):
        return Finding("gaps", reads)
    return Finding("done", reads)
