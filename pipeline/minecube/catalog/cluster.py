"""Where the steps of a dataset run: an entry of `clusters.yaml`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from minecube.catalog.fields import check_field, need, need_name

KINDS = ("local", "dask", "slurm", "kubernetes")
_STARTED = ("slurm", "kubernetes")
"""Kinds whose workers minecube starts as jobs or pods."""
_OWN_FIELDS = {
    "workers": ("local", *_STARTED),
    "memory_gb": _STARTED,
    "temporary": ("local", *_STARTED),
    "lifetime_minutes": _STARTED,
    "address": ("dask",),
    "slurm": ("slurm",),
    "kubernetes": ("kubernetes",),
}
"""Field -> kinds that use it."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """The job of each worker, beyond its cores and memory."""

    queue: str | None = None
    """Partition."""
    account: str | None = None
    walltime: str = "04:00:00"
    """Time limit of the job."""
    directives: tuple[str, ...] = ()
    """More lines for `#SBATCH`, such as `--gres=gpu:1`."""
    setup: tuple[str, ...] = ()
    """Shell lines before the worker starts, such as `module load gdal`."""
    interface: str | None = None
    """Network interface that workers and scheduler share, such as ib0."""
    logs: str | None = None
    """Folder of the workers' logs; by default SLURM's own."""


@dataclass(frozen=True, kw_only=True)
class WorkerPod:
    """The pod of each worker, beyond its cores and memory."""

    image: str
    """Container image with minecube, and with `minecube[models]` to map."""
    namespace: str = "default"
    secret: str | None = None
    """Secret whose keys become environment variables: those of the object store."""
    volume_claim: str | None = None
    """PersistentVolumeClaim with the files of the dataset, mounted at `mount`."""
    mount: str = "/data"
    limits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """More limits of the container, such as `nvidia.com/gpu: "1"`."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Workers that take the steps of a dataset."""

    id: str
    title: str
    kind: str
    """local: processes of this machine. dask: workers of a running scheduler.

    slurm, kubernetes: workers that minecube starts, and ends with the run.
    """
    workers: int | None = None
    """local: processes, by default one per core. slurm, kubernetes: jobs or pods."""
    threads: int | None = None
    """Threads of each worker for blocks of a composite.

    By default 1; local: the cores divided by the workers.
    """
    memory_gb: float | None = None
    """Memory limit of each worker."""
    lifetime_minutes: float | None = None
    """Age at which a worker ends and another replaces it. Longer than the longest step of a site."""
    stagger_minutes: float = 0.0
    """Random part of the lifetime, so that workers do not end together."""
    temporary: str | None = None
    """Folder of temporary files on the machine of each worker."""
    connections: int | None = None
    """Most simultaneous requests for pixels of all workers together.

    By default, each worker has the `connections` of the source.
    """
    resources: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Step -> resource -> amount that a worker must have. slurm, kubernetes: workers have it."""
    wait_minutes: float = 10.0
    """Longest time without any worker. The run then ends."""
    address: str | None = None
    """dask: address of the scheduler."""
    slurm: SlurmJob = SlurmJob()
    kubernetes: WorkerPod | None = None

    def __post_init__(self) -> None:
        need_name(self.id)
        check_field(self.kind in KINDS, self, "kind", f"one of {', '.join(KINDS)}")
        self._check_use()
        for name in ("workers", "threads", "connections"):
            number = getattr(self, name)
            check_field(number is None or number >= 1, self, name, "1 or more")
        for name in ("memory_gb", "lifetime_minutes"):
            number = getattr(self, name)
            check_field(number is None or number > 0, self, name, "a number above 0")
        longest = self.lifetime_minutes or 0
        fits = self.stagger_minutes == 0 or 0 < self.stagger_minutes < longest
        check_field(fits, self, "stagger_minutes", "0, or less than lifetime_minutes")
        check_field(self.wait_minutes > 0, self, "wait_minutes", "a number above 0")
        amounts = [amount for needed in self.resources.values() for amount in needed.values()]
        check_field(all(amount > 0 for amount in amounts), self, "resources", "amounts above 0")

    def _check_use(self) -> None:
        """Check that the fields belong to the kind, and that it has those it cannot do without."""
        for field in dataclasses.fields(self):
            is_set = getattr(self, field.name) != field.default
            kinds = _OWN_FIELDS.get(field.name, KINDS)
            fits = self.kind in kinds or not is_set
            need(fits, field.name, f"kind {' or '.join(kinds)} for this field, found {self.kind!r}")
        is_local = self.kind == "local"
        need(not (is_local and self.resources), "resources", "a cluster, found kind 'local'")
        if self.kind in _STARTED:
            need(self.workers, "workers", "the number of workers to start, found none")
            need(self.memory_gb, "memory_gb", "the memory of each worker, found none")
        if self.kind == "kubernetes":
            need(self.kubernetes, "kubernetes", "the image of the pods, found none")
        if self.kind == "dask":
            is_address = re.fullmatch(r"[a-z]+://.+:\d+", self.address or "")
            check_field(is_address, self, "address", "an address such as tcp://host:8786")

    def offered_resources(self) -> dict[str, float]:
        """Return the resources that workers need for all steps together."""
        offered: dict[str, float] = {}
        for needed in self.resources.values():
            for name, amount in needed.items():
                offered[name] = max(amount, offered.get(name, 0))
        return offered
