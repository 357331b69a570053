"""tokenprune: training-free visual-token compression for multimodal LLMs.

VisualTokens + Signals --Scorer--> scores --Reducer--> Plan --apply--> VisualTokens
"""

from .adapter import ModelAdapter, Observation, Removable, TowerAdapter
from .attach import Attachment, attach, observe
from .budget import Budgeted, Keep
from .errors import (
    AttachError,
    BudgetError,
    MissingSignalError,
    PluginError,
    ScoreError,
    ShapeError,
    SpecError,
    TokenpruneError,
    UnknownNameError,
    UnsupportedError,
)
from .placement import AfterLayer, BeforeLLM, Placement
from .plan import Plan
from .plugins import (
    ModelPlugin,
    RecipePlugin,
    ReducerPlugin,
    ScorerPlugin,
    TowerPlugin,
    hookimpl,
)
from .reducers import Evict
from .report import ImageReport, Record, Report
from .scorers import ClsAttentionScorer, RandomScorer, UniformScorer
from .signals import ClsAttention, Keys, LastQueryAttention, Signal, Signals
from .spec import parse, parse_schedule, spec_of
from .strategy import Reducer, Reduction, Scorer, Stage, Strategy
from .tokens import VisualTokens

__version__ = "0.1.0"

__all__ = [
    "AfterLayer",
    "AttachError",
    "Attachment",
    "BeforeLLM",
    "BudgetError",
    "Budgeted",
    "ClsAttention",
    "ClsAttentionScorer",
    "Evict",
    "ImageReport",
    "Keep",
    "Keys",
    "LastQueryAttention",
    "MissingSignalError",
    "ModelAdapter",
    "ModelPlugin",
    "Observation",
    "Placement",
    "Plan",
    "PluginError",
    "RandomScorer",
    "RecipePlugin",
    "Record",
    "Reducer",
    "ReducerPlugin",
    "Reduction",
    "Removable",
    "Report",
    "ScoreError",
    "Scorer",
    "ScorerPlugin",
    "ShapeError",
    "Signal",
    "Signals",
    "SpecError",
    "Stage",
    "Strategy",
    "TokenpruneError",
    "TowerAdapter",
    "TowerPlugin",
    "UniformScorer",
    "UnknownNameError",
    "UnsupportedError",
    "VisualTokens",
    "attach",
    "hookimpl",
    "observe",
    "parse",
    "parse_schedule",
    "spec_of",
]
