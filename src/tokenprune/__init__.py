"""tokenprune: training-free visual-token compression for multimodal LLMs.

VisualTokens + Signals --Scorer--> scores --Reducer--> Plan --apply--> VisualTokens
"""

from ._version import __version__ as __version__
from .adapter import ModelAdapter, TowerAdapter
from .attach import Attachment, attach, observe, watch
from .budget import Budgeted, Keep, KeepLike, Per
from .errors import (
    AttachError,
    BudgetError,
    MissingSignalError,
    PlanError,
    PluginError,
    ScoreError,
    ShapeError,
    SpecError,
    TokenpruneError,
    UnknownNameError,
    UnsupportedError,
)
from .hooks import Removable
from .kept_patches import Kept, Origin
from .memberships import Memberships
from .observation import Attended, Observation
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
from .reducers import (
    Diverse,
    DominantContextual,
    Evict,
    ImportantDiverse,
    KMeans,
    Pool,
    PruMerge,
    PruMergePlus,
    ToMe,
)
from .report import ImageReport, Record, Report
from .scorers import (
    ClsAttentionScorer,
    FastVScorer,
    FoPruScorer,
    PoolAttentionScorer,
    RandomScorer,
    ReceivedAttentionScorer,
    RelevanceScorer,
    SimilarityScorer,
    UniformScorer,
)
from .signals import (
    AlignedFeatures,
    ClsAttention,
    GivenAttention,
    JointClsAttention,
    Keys,
    LastQueryAttention,
    Layers,
    PoolAttention,
    ReceivedAttention,
    Signal,
    Signals,
    TextFeatures,
    TextQueryAttention,
    resolve_layers,
)
from .spec import parse, parse_schedule, spec_of
from .spec_file import from_pretrained, save_pretrained
from .strategy import Reducer, Reduction, Scorer, Stage, Strategy
from .tokens import VisualTokens

__all__ = [
    "AfterLayer",
    "AlignedFeatures",
    "AttachError",
    "Attachment",
    "Attended",
    "BeforeLLM",
    "BudgetError",
    "Budgeted",
    "ClsAttention",
    "ClsAttentionScorer",
    "Diverse",
    "DominantContextual",
    "Evict",
    "FastVScorer",
    "FoPruScorer",
    "GivenAttention",
    "ImageReport",
    "ImportantDiverse",
    "JointClsAttention",
    "KMeans",
    "Keep",
    "KeepLike",
    "Kept",
    "Keys",
    "LastQueryAttention",
    "Layers",
    "Memberships",
    "MissingSignalError",
    "ModelAdapter",
    "ModelPlugin",
    "Observation",
    "Origin",
    "Per",
    "Placement",
    "Plan",
    "PlanError",
    "PluginError",
    "Pool",
    "PoolAttention",
    "PoolAttentionScorer",
    "PruMerge",
    "PruMergePlus",
    "RandomScorer",
    "ReceivedAttention",
    "ReceivedAttentionScorer",
    "RecipePlugin",
    "Record",
    "Reducer",
    "ReducerPlugin",
    "Reduction",
    "RelevanceScorer",
    "Removable",
    "Report",
    "ScoreError",
    "Scorer",
    "ScorerPlugin",
    "ShapeError",
    "Signal",
    "Signals",
    "SimilarityScorer",
    "SpecError",
    "Stage",
    "Strategy",
    "TextFeatures",
    "TextQueryAttention",
    "ToMe",
    "TokenpruneError",
    "TowerAdapter",
    "TowerPlugin",
    "UniformScorer",
    "UnknownNameError",
    "UnsupportedError",
    "VisualTokens",
    "attach",
    "from_pretrained",
    "hookimpl",
    "observe",
    "parse",
    "parse_schedule",
    "resolve_layers",
    "save_pretrained",
    "spec_of",
    "watch",
]
