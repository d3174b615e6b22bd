"""The run's page: report.html, one file that opens from a disk, and a page that puts runs side by side.

saving.py           makes them: `write`, `compare`, and `while_training`, which never fails
folder.py           what is in a run folder, read as a stranger's: bounded, nothing executed
metrics.py          metrics.jsonl;  pictures.py  the sample grids;  about.py  versions and data of each session
run_page.py         the sections of one run's page;  recipe.py  quality.py  memory.py  cost.py  the larger ones of them
comparison.py       the page of several runs
charts.py           curves as SVG;  words.py  numbers
templates/          HTML, style sheet, and the script of the slider
"""

from lowvram.pages.saving import compare, while_training, write

__all__ = ["compare", "while_training", "write"]
