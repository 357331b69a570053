"""Scripts of this repository that are no package, as modules."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from .markdown import ROOT


def script(path: str) -> ModuleType:
    """The module at `path`, from the root of the repository."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_")[:-3], ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
