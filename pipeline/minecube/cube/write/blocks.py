"""Compute the blocks of a site-year into its staging group."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import dask
import xarray as xr
import zarr

from minecube.arrays import AnyArray
from minecube.cube.locks import Lock
from minecube.cube.write.options import BuildOptions
from minecube.cube.write.staging import Staging, shard_grid
from minecube.errors import CubeError

log = logging.getLogger(__name__)

Block = tuple[int, int]
"""Row and column of a block among the blocks of a site."""


def build_blocks(
    composite: xr.Dataset, staging: Staging, lock: Lock, options: BuildOptions
) -> None:
    """Compute the missing blocks, a few at a time, and note them.

    A block's pixels are written first. Then one note marks it as done and adds its read counts. A
    run killed in between computes the block again and counts some reads twice. Every done block has
    its lost reads counted.

    Raises:
        BusyError: another run has taken over the lock.
        CubeError: the build was stopped.
    """
    site_year = f"{staging.site_id} {staging.year}"
    blocks = shard_grid(staging.arrays["clear_count"])
    finished = staging.blocks
    checksums = staging.checksums
    todo = [block for block in blocks if _name(block) not in finished]
    if len(todo) < len(blocks):
        number = len(blocks) - len(todo) + 1
        log.info("%s: going on with block %d of %d", site_year, number, len(blocks))
    for start in range(0, len(todo), options.workers):
        lock.check()
        if options.stopped():
            raise CubeError(
                f"{site_year}: stopped with {len(todo) - start} of {len(blocks)} blocks to go; the "
                "same build goes on there"
            )
        batch = todo[start : start + options.workers]
        checksums |= _compute_blocks(composite, staging.arrays, batch, options)
        lock.check()
        finished += [_name(block) for block in batch]
        counts = None
        if options.reads is not None:
            counts = options.reads.to_parquet()
        staging.note(finished, checksums, counts)


def _name(block: Block) -> str:
    row, column = block
    return f"{row}/{column}"


def _compute_blocks(
    composite: xr.Dataset,
    arrays: Mapping[str, zarr.Array],
    blocks: Sequence[Block],
    options: BuildOptions,
) -> dict[str, list[Any]]:
    """Compute blocks into staged arrays.

    Returns their shards' checksums as in `ChecksumStore.checksums_below`.
    """
    # Optimising each layer alone would inline the block's task and compute it once per layer.
    layers = [composite[name].data.to_delayed(optimize_graph=False) for name in arrays]
    write = dask.delayed(partial(_write_block, arrays), pure=False)
    tasks = []
    for block in blocks:
        # The chunks of a layer are [row, column], or [band, row, column].
        parts = [chunks[(0,) * (chunks.ndim - 2) + block] for chunks in layers]
        tasks.append(write(block, parts))
    checksums: dict[str, list[Any]] = {}
    for sums in dask.compute(*tasks, scheduler=options.scheduler, num_workers=options.workers):
        checksums |= sums
    return checksums


def _write_block(
    arrays: Mapping[str, zarr.Array], block: Block, parts: Sequence[AnyArray]
) -> dict[str, list[Any]]:
    """Write a block's part of each array. Returns the checksums of its shards."""
    checksums = {}
    for (name, array), part in zip(arrays.items(), parts, strict=True):
        side = array.shards[-1]
        rows, columns = (slice(index * side, (index + 1) * side) for index in block)
        array[(0, ..., rows, columns)] = part
        key = array.metadata.encode_chunk_key((0,) * (array.ndim - 2) + block)
        # The array may have the store of another process. An all-fill block is not stored.
        checksum = array.store.sums.get(f"{array.path}/{key}")
        if checksum is not None:
            checksums[f"{name}/{key}"] = checksum
    return checksums
