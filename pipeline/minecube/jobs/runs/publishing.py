"""Publish a whole dataset as a version in Icechunk, once all of it is done."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from minecube.catalog import Dataset
from minecube.errors import CatalogError
from minecube.jobs.runs.driver import make_plan
from minecube.jobs.runs.summary import RunOptions

_PUBLISHED = ("build", "label", "predict", "tracks")
"""Steps that write into the store."""


@dataclass(frozen=True)
class Publishing:
    """Outcome of publishing."""

    is_good: bool
    text: str
    """What was published, or why nothing was."""


def check_publishing(dataset: Dataset, tag: str) -> None:
    """Check before the work that a version can be published.

    Raises:
        CatalogError: the dataset names no repository, or Icechunk is missing.
        CubeError: the tag is invalid.
    """
    if dataset.publish is None:
        raise CatalogError(
            f"{dataset.id} has no `publish`; add `publish: releases`, the folder or URL of an "
            "Icechunk repository, to its file"
        )
    if importlib.util.find_spec("icechunk") is None:
        raise CatalogError("--publish needs Icechunk: pip install 'minecube[publish]'")
    from minecube.export.publish import check_tag  # loads Icechunk

    check_tag(tag)


def publish_dataset(dataset: Dataset, tag: str) -> Publishing:
    """Publish all sites of a dataset if no step in the store is unfinished or stale.

    Raises:
        CubeError: the tag holds another state, or the store changes meanwhile.
    """
    from minecube.jobs.publish import publish_sites  # loads Icechunk

    plan = make_plan(dataset, RunOptions(overwrite=True))
    unfinished = {
        step: count for step, (count, _) in plan.preview().items() if step in _PUBLISHED and count
    }
    if unfinished:
        text = ", ".join(f"{count} of {step}" for step, count in unfinished.items())
        return Publishing(False, f"{tag} is not published: unfinished are {text}; run again")
    place = str(dataset.publish)
    published = publish_sites(plan.inputs.store, plan.sites, dataset.id, place, tag)
    return Publishing(True, f"{place}: {tag} holds {published.site_years} site-years")
