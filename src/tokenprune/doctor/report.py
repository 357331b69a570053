"""Report of the doctor, as data."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import torch

from .._version import __version__
from ..versions import LIBRARIES, Library

Outcome: TypeAlias = Literal["ok", "failed", "refused", "unclear", "not installed", "no trial"]


@dataclass(frozen=True)
class Comparison:
    """Comparison of an attached model with a vanilla run.

    Attributes:
        model: name of the trial.
        where: words for the place of the stage.
        outcome: ``"refused"`` where `attach` says that it cannot serve the model, ``"unclear"``
            where rounding may hide a wrong plan: both are failures, too; ``"not installed"`` and
            ``"no trial"`` are none.
        spec: what was attached.
        gap: largest difference of any logit; None where nothing could be compared.
        tolerance: largest gap that is allowed.
        sensitivity: largest difference that a plan makes which is shifted by one patch.
        reason: one line on what went wrong.
        traceback: traceback of the error, where there was one.
    """

    model: str
    where: str
    outcome: Outcome
    spec: str = ""
    gap: float | None = None
    tolerance: float | None = None
    sensitivity: float | None = None
    reason: str = ""
    traceback: str = ""


@dataclass(frozen=True)
class Version:
    """Version of a library that was found, beside the tested ones.

    Attributes:
        name: name of the distribution.
        found: None where it is not installed.
        tested: range that was tested.
        note: ``"newer than tested"``, ``"older than supported"``, ``"not installed"`` or nothing.
        requirement: what to ask pip for to get a tested one.
    """

    name: str
    found: str | None
    tested: str
    note: str
    requirement: str

    @classmethod
    def of(cls, library: Library) -> Version:
        """What is installed of `library`."""
        note = "not installed" if library.found is None else ""
        note = "newer than tested" if library.is_newer else note
        note = "older than supported" if library.is_older else note
        return cls(library.name, library.found, library.span, note, library.requirement)


@dataclass(frozen=True)
class Examination:
    """Findings of the doctor.

    Attributes:
        tokenprune: its version.
        platform: operating system and processor.
        device: what the models ran on.
        dtype: what they ran in.
        checkpoint: the one that was compared; empty for tiny random models.
        versions: versions of everything in the table of tested versions.
        comparisons: comparisons in the order in which they were made.
    """

    tokenprune: str
    platform: str
    device: str
    dtype: str
    checkpoint: str
    versions: tuple[Version, ...]
    comparisons: tuple[Comparison, ...]

    @classmethod
    def of(
        cls,
        device: torch.device,
        dtype: torch.dtype,
        comparisons: tuple[Comparison, ...],
        checkpoint: str = "",
    ) -> Examination:
        """Findings on this machine."""
        name = str(device)
        if device.type == "cuda":
            name += f" ({torch.cuda.get_device_name(device)})"
        versions = tuple(map(Version.of, LIBRARIES))
        return cls(
            *(__version__, platform.platform(), name, str(dtype).removeprefix("torch.")),
            *(checkpoint, versions, comparisons),
        )

    @property
    def failed(self) -> tuple[Comparison, ...]:
        """Comparisons that were made, or tried, and do not agree."""
        fine = ("ok", "not installed", "no trial")
        return tuple(each for each in self.comparisons if each.outcome not in fine)

    @property
    def untested(self) -> tuple[Version, ...]:
        """Libraries that are newer than tested, or older than supported."""
        return tuple(each for each in self.versions if each.found and each.note)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {"ok": not self.failed, **asdict(self)}
