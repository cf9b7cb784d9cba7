"""The paper's tables and figures, measured again: its numbers beside ours.

"Neighbourhood Distillation: On the benefits of non end-to-end distillation", ICLR 2021 submission. `__main__.py` tells
how to run them, `scales.py` how long they take, `lab.py` makes one cell, `tables.py` puts cells into tables, and
`figures.py` draws.
"""
