"""Draw cubes, maps, scores and scene coverage as PNG files.

strips.py    true-colour images of years, with outlines
areas.py     mine area by year of a site, with gain and loss
overview.py  mine area by year of many sites
coverage.py  usable dates by month
scores.py    scores by year and gap, precision and recall, reliability
style.py     colours, axes and files of all pictures
"""

from minecube.report.areas import draw_areas
from minecube.report.coverage import MISSING, NONE_USABLE, TOO_FEW, draw_coverage
from minecube.report.overview import draw_area_overview
from minecube.report.strips import OUTLINES, draw_comparison, draw_strip

__all__ = [
    "MISSING",
    "NONE_USABLE",
    "OUTLINES",
    "TOO_FEW",
    "draw_area_overview",
    "draw_areas",
    "draw_comparison",
    "draw_coverage",
    "draw_strip",
]
