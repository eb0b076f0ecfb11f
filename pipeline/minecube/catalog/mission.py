"""Bands of Sentinel-2 and its first year."""

BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")
"""Bands of the cube, in its order, without B01, B09 and B10, as in EuroMineNet."""
SCL = "SCL"
"""Asset name of the Level-2A scene classification."""
NATIVE_M = dict.fromkeys((*BANDS, SCL), 20) | {"B02": 10, "B03": 10, "B04": 10, "B08": 10}
"""The mission's pixel sizes in metres."""
FIRST_YEAR = 2015
"""Sentinel-2A was launched in June 2015."""
