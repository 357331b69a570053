"""Deliberately wrong strategies, towers and adapters, each with the promise that it breaks.

Most are faults of released research code. A fault is kept as small as it can be: everything else
about the class is right, so that only the check which names the fault has a reason to fail.
"""

from . import models, scorers, towers
from .fault import FAULTS, Fault
from .reducers import KeepsTheLowest

__all__ = ["FAULTS", "Fault", "KeepsTheLowest", "models", "scorers", "towers"]
