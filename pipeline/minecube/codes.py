"""Stored values of labels, fractions and probabilities, shared by all stages.

A footprint holds MINE, BACKGROUND or UNKNOWN. A fraction or a probability p is stored as
round(p * FULL), in uint8, or as UNKNOWN.
"""

BACKGROUND = 0
"""Footprint of ground outside mines."""
MINE = 1
"""Footprint of a mine."""
UNKNOWN = 255
"""No label, no map, or no observation."""
FULL = 250
"""Stored level of probability or fraction 1."""
HALF = 125
"""Stored level of probability 0.5. A pixel from this level on counts as mine."""
