"""HTML page of all results in a folder, which opens from disk without network.

    write_page(Path("tokenprune-bench"))

`tokenprune report` is the command.
"""

from __future__ import annotations

from .document import page_of, write_page
from .result_files import PageError

__all__ = ["PageError", "page_of", "write_page"]
