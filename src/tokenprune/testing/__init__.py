"""The contract kit: the promises of strategies and adapters as tests that anybody can run.

Needs the extra `testing` (pytest and hypothesis).
"""

from .cases import ModelCase, Prompt, ReducerCase, ScorerCase, TowerCase
from .generators import (
    attention_rows,
    budgets,
    inputs_for,
    plans,
    real_numbers,
    register_signal,
    scores_for,
    signals_for,
    values,
    visual_tokens,
)
from .inputs import Inputs
from .kit import checks_for, parameters, parametrize_with_checks, run_check
from .promises import CHECKS, OPTIONAL, Check

__all__ = [
    "CHECKS",
    "OPTIONAL",
    "Check",
    "Inputs",
    "ModelCase",
    "Prompt",
    "ReducerCase",
    "ScorerCase",
    "TowerCase",
    "attention_rows",
    "budgets",
    "checks_for",
    "inputs_for",
    "parameters",
    "parametrize_with_checks",
    "plans",
    "real_numbers",
    "register_signal",
    "run_check",
    "scores_for",
    "signals_for",
    "values",
    "visual_tokens",
]
