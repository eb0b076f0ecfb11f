#!/usr/bin/env bash
# stac-geoparquet 0.8.3, pyarrow 26.0.1: a column of timestamps in another zone than UTC, which Arrow and Parquet keep, becomes
# local time with a Z. The item is hours off; at the end of a month or year a search by time lists it in the wrong one.
# Seen: "column 2020-12-31 23:30:00+00:00 (Europe/Berlin); item 2021-01-01T00:30:00.000000Z"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "stac-geoparquet==0.8.3" "pyarrow==26.0.1"
cd "$work"
venv/bin/python - <<'PY'
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import stac_geoparquet.arrow

item = {
    "type": "Feature",
    "stac_version": "1.0.0",
    "id": "scene",
    "geometry": {"type": "Point", "coordinates": [14.0, 51.0]},
    "bbox": [14.0, 51.0, 14.0, 51.0],
    "properties": {"datetime": "2020-12-31T23:30:00Z"},
    "links": [],
    "assets": {"B04": {"href": "B04.tif"}},
}
table = pa.table(stac_geoparquet.arrow.parse_stac_items_to_arrow([item]))
local = table.column("datetime").cast(pa.timestamp("us", tz="Europe/Berlin"))
table = table.set_column(table.column_names.index("datetime"), "datetime", local)
pq.write_table(table, "items.parquet")

read = pq.read_table("items.parquet")
assert read.schema.field("datetime").type.tz == "Europe/Berlin"
instant = read.column("datetime")[0].as_py()
assert instant == datetime(2020, 12, 31, 23, 30, tzinfo=UTC)
(found,) = stac_geoparquet.arrow.stac_table_to_items(read)
text = found["properties"]["datetime"]
print(f"column {instant.astimezone(UTC)} (Europe/Berlin); item {text}")
assert text == "2021-01-01T00:30:00.000000Z", text
PY
