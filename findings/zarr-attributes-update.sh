#!/usr/bin/env bash
# zarr 3.1.6: `attrs.update({...})` of three keys writes zarr.json three times. A process that is killed in between leaves an
# array with some of the new attributes and some of the old ones, such as a checksum that belongs to other values.
# `attrs.put` writes once.
# Seen: "update: 3 writes, put: 1 write; after a kill: {'origin': 'new', 'sha256': 'old'}"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "zarr==3.1.6"
"$work/venv/bin/python" - <<'PY'
import zarr
from zarr.storage import MemoryStore, WrapperStore


class Killed(Exception):
    pass


class Counting(WrapperStore):
    writes = 0
    last = None

    def _with_store(self, store):
        return type(self)(store)

    async def set(self, key, value):
        if Counting.last is not None and Counting.writes >= Counting.last:
            raise Killed
        Counting.writes += 1
        await super().set(key, value)


def array():
    Counting.last = None
    made = zarr.create_array(Counting(MemoryStore()), shape=(1,), dtype="u1", attributes={"origin": "old", "sha256": "old"})
    Counting.writes = 0
    return made


new = {"origin": "new", "checksums": {}, "sha256": "new"}
updated = array()
updated.attrs.update(new)
by_update = Counting.writes
put = array()
put.attrs.put(new)
by_put = Counting.writes
killed = array()
Counting.last = 1
try:
    killed.attrs.update(new)
except Killed:
    pass
left = dict(zarr.open_array(killed.store, mode="r").attrs)
print(f"update: {by_update} writes, put: {by_put} write; after a kill: {left}")
assert (by_update, by_put) == (3, 1)
assert left == {"origin": "new", "sha256": "old"}
PY
