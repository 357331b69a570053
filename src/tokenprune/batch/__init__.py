"""Batch work: rows of pictures and prompts to rows with answers, on one machine or on many.

    read_rows -> Rows -> Job (what decides the answers)
                  |        |
                  v        v
               opened -> Parts.pending -> Engine (here, processes, Ray) -> Parts.add -> Parts.join
                                            |
                                            +-- Answerer: one batch of rows, bad pictures reported

`Answerer` alone is what `ray.data.Dataset.map_batches` wants; the rest is `tokenprune batch`.
Importing this package imports neither transformers nor pyarrow nor Ray.
"""

from __future__ import annotations

from .answerer import Answerer
from .errors import InputError, PictureError, ResumeError, WorkerError

__all__ = ["Answerer", "InputError", "PictureError", "ResumeError", "WorkerError"]
