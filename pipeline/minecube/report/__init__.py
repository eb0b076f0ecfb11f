"""Draw cubes, maps, scores and scene coverage as PNG files.

strips.py    true-colour images of years, with outlines
areas.py     mine area by year of a site, with gain and loss
overview.py  mine area by year of many sites
coverage.py  usable dates by month
scores.py    scores by year and gap, precision and recall, reliability
style.py     colours, axes and files of all pictures

Matplotlib is loaded with the first picture: workers and schedulers start without it.
"""

from __future__ import annotations

from minecube.lazy import load_lazily

_NAMES = {
    "areas": ("draw_areas",),
    "coverage": ("MISSING", "NONE_USABLE", "TOO_FEW", "draw_coverage"),
    "overview": ("draw_area_overview",),
    "scores": ("draw_precision_recall", "draw_reliability", "draw_scores"),
    "strips": ("OUTLINES", "draw_comparison", "draw_strip"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_HOME)
__getattr__ = load_lazily(__name__, _HOME)
