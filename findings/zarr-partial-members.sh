#!/usr/bin/env bash
# zarr 3.1.6, LocalStore: each write goes to NAME.<hex>.partial first and is renamed. Whoever lists the group meanwhile, as
# xarray.open_zarr does, gets that file as a member, and a warning for each. Where warnings are errors, reading fails.
# A writer of any array causes it in all groups above, since zarr writes their metadata again, too.
# Seen: "members: ['a']; warned: Object at zarr.0123.partial is not recognized as a component of a Zarr hierarchy."
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "zarr==3.1.6"
cd "$work"
venv/bin/python - <<'PY'
import inspect
import warnings
from pathlib import Path

import zarr
from zarr.storage import _local

root = zarr.create_group("cubes.zarr")
root.create_array("a", shape=(1,), dtype="u1")
# As a writer has it for a moment.
assert ".partial" in inspect.getsource(_local)
Path("cubes.zarr/zarr.0123.partial").write_bytes(Path("cubes.zarr/zarr.json").read_bytes())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    members = sorted(name for name, _ in zarr.open_group("cubes.zarr", mode="r").members())
(warning,) = caught
print(f"members: {members}; warned: {warning.message}")
assert members == ["a"]
assert "zarr.0123.partial" in str(warning.message)
PY
