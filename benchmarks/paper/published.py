"""The paper's numbers, as far as they are known here: differences from the teacher's accuracy, in points.

They were measured on the paper's own teachers and schedules: what can be compared is the order of size and the order
of the rows, not the digit.
"""

from __future__ import annotations

from collections.abc import Mapping

ND: Mapping[float, float] = {0.75: -4.0, 0.5: -3.4}
"""By multiplier k: students trained apart and spliced, nothing more (table 1)."""
ND_TUNED: Mapping[float, float] = {0.75: 0.1, 0.5: -0.6, 0.4: -1.6}
"""The same with fine-tuning."""
SPEED_UP = 2.3
"""ND over KD from scratch, to equal accuracy."""
SPARSE: Mapping[float, float] = {0.5: -0.9, 0.7: -6.7, 0.8: -26.0}
"""By sparsity, without fine-tuning (table 3)."""
DATA_FREE: Mapping[float, float] = {0.9: -2.8, 0.75: -11.0, 0.5: -38.0}
"""By multiplier, trained on Gaussian noise (table 4)."""
LOOK_AHEAD_GAIN: Mapping[int, float] = {2: 1.4}
"""By look-ahead, at k=0.5 and before fine-tuning: points over none (table 6)."""
