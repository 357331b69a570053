"""What a family of models promises, as checks that anybody can run on a tiny model of it."""

from .case import FamilyCase
from .checks import CHECKS

__all__ = ["CHECKS", "FamilyCase"]
