"""A vertical of the quality benchmark as a study, with the figures of `make quality`.

    VERTICAL=DELI python -m torchrec_exfm.study benchmarks/quality_study.py --seeds 1

SOURCE, VERTICAL and STUDENT pick it. The teacher is that of seed 0, and runs first if it has not.
A study has one teacher for all seeds, `make quality` one for each, so only seed 0 is the same.
"""

import os
from pathlib import Path

import quality

source = os.environ.get("SOURCE", "promotions")
vertical = os.environ.get("VERTICAL", quality.SOURCES[source].swept[-1])
folder = Path("results/quality")
cell = quality.Cell(source, vertical, os.environ.get("STUDENT", "lean"), "AH", seed=0)
for teacher, feeds in quality.feeds_for(cell).items():
    if not all(teacher.file(folder, feed).exists() for feed in feeds):
        quality.teach(teacher, feeds, folder)
key = str(cell)
globals().update(vars(quality.study_of(cell, folder)[0]))
