#!/usr/bin/env bash
# zarr 3.1.6 (numcodecs 0.16.5), Zarr v3 gzip codec: the header of each chunk holds the time of writing. The same array, written again
# with the same codec, has other bytes and another checksum, so that tools which compare checksums copy everything again.
# zstd has no such field.
# Seen: "gzip: chunks differ in bytes [4]; zstd: chunks are equal"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "zarr==3.1.6" "numcodecs==0.16.5"
"$work/venv/bin/python" - <<'PY'
import time

import numpy as np
import zarr
from zarr.codecs import GzipCodec, ZstdCodec


def chunk(codec):
    memory = {}
    array = zarr.create_array(zarr.storage.MemoryStore(memory), shape=(64, 64), dtype="u2", compressors=codec)
    array[:] = np.arange(4096, dtype="u2").reshape(64, 64)
    return memory["c/0/0"].to_bytes()


first = {codec.__class__.__name__: chunk(codec) for codec in (GzipCodec(), ZstdCodec())}
time.sleep(1.2)
second = {codec.__class__.__name__: chunk(codec) for codec in (GzipCodec(), ZstdCodec())}
differ = [n for n, (a, b) in enumerate(zip(first["GzipCodec"], second["GzipCodec"], strict=True)) if a != b]
equal = first["ZstdCodec"] == second["ZstdCodec"]
print(f"gzip: chunks differ in bytes {differ}; zstd: chunks are {'equal' if equal else 'unequal'}")
assert differ
assert set(differ) <= {4, 5, 6, 7}  # MTIME of RFC 1952
assert equal
PY
