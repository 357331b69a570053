"""Doctor that compares what tokenprune attaches with vanilla runs, pieced together by hand.

>>> from tokenprune.doctor import examine
>>> examine(only=()).failed
()
"""

from .examination import examine, examine_model
from .report import Comparison, Examination, Version

__all__ = [
    "Comparison",
    "Examination",
    "Version",
    "examine",
    "examine_model",
]
