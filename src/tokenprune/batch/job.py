"""Job: all that decides the answers, so that parts of other work are never mixed in."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .._version import __version__
from .answerer import Answerer
from .rows import Rows


@dataclass(frozen=True)
class Job:
    """Settings that the answers depend on, and nothing about where they are computed.

    Attributes:
        model: name on the hub, or absolute folder of a checkpoint.
        checkpoint: changes when files of that folder do; empty for a name.
        prune, prompt, max_new_tokens, dtype: as in `Answerer`.
        input: changes when the rows do.
        root: folder that their pictures are relative to: one name in two folders is two pictures.
        version: version of tokenprune.
    """

    model: str
    checkpoint: str
    prune: str | None
    prompt: str | None
    max_new_tokens: int
    dtype: str
    input: str
    root: str
    version: str

    @staticmethod
    def of(answerer: Answerer, rows: Rows) -> Job:
        """The work of answering `rows`."""
        folder = Path(answerer.model).expanduser()
        local = folder.is_dir()
        return Job(
            str(folder.resolve()) if local else answerer.model,
            _stamp(folder) if local else "",
            answerer.prune,
            answerer.prompt,
            answerer.max_new_tokens,
            answerer.dtype,
            rows.stamp,
            rows.root,
            __version__,
        )

    @staticmethod
    def read(text: str) -> Job:
        """The job that `written` wrote."""
        return Job(**json.loads(text))

    @property
    def written(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self), indent=1)

    @property
    def fingerprint(self) -> str:
        """The same for the same job."""
        return hashlib.sha256(self.written.encode()).hexdigest()

    def unlike(self, other: Job) -> str:
        """What differs from `other`, for messages; empty if nothing does."""
        pairs = [(f.name, getattr(other, f.name), getattr(self, f.name)) for f in fields(self)]
        changed = [pair for pair in pairs if pair[1] != pair[2]]
        return ", ".join(f"{name} was {was!r} and is {now!r}" for name, was, now in changed)


def _stamp(folder: Path) -> str:
    """Of names, sizes and times of a checkpoint's files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            about = path.stat()
            digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
