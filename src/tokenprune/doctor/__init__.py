"""Doctor: compares what tokenprune attaches with vanilla runs, pieced together by hand.

>>> from tokenprune.doctor import examine
>>> examine(only=()).failed
()
"""

from .examination import examine, examine_model
from .report import Comparison, Examination, Version
from .trial import Answer, Cut, Questions, Trial

__all__ = [
    "Answer",
    "Comparison",
    "Cut",
    "Examination",
    "Questions",
    "Trial",
    "Version",
    "examine",
    "examine_model",
]
