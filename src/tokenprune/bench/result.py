"""Result of a bench as data: rows for tables, and files that others can read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..budget import Keep
from ..jsonable import jsonable
from .data import Sample
from .entrants import Entrant
from .match import credit, plain
from .rounds import Record
from .scoring import Mean, balanced, f1, mean

FORMAT = 1


@dataclass(frozen=True)
class Row:
    """Results of one entrant.

    Attributes:
        label: the method's name.
        spec: what was attached, exactly; None for nothing.
        kind: "vanilla", "method", "floor" or "control".
        keep: the fraction of visual tokens that was asked for; 1.0 for vanilla.
        accuracy: the mean over types of question, each of the same weight.
        error: its standard error, clustered by picture.
        types: accuracy of each type.
        f1: of yes over all yes-or-no questions of type "existence"; None where there are none.
        agreement: how often the reply is vanilla's.
        agreement_error: its standard error, clustered by picture.
        tokens: (LLM layer, visual tokens of a picture from that layer on), in order.
        kv_bytes: KV cache of a prompt after its prefill, on average; None if unknown.
        kv_bytes_vanilla: the same of the unpruned model.
        selector_ms: scoring and reducing, a question.
        first_token_ms: until the first token, a question.
        total_ms: until the answer is complete, a question.
        beats_floors: for methods: better than every floor of the same budget and placement, by
            more than two paired standard errors; None where no floor ran, or where one held fewer
            tokens than the method, as beside a schedule that takes its budget in a later stage.
    """

    label: str
    spec: str | None
    kind: str
    keep: float
    accuracy: float
    error: float
    types: dict[str, Mean]
    f1: float | None
    agreement: float
    agreement_error: float
    tokens: tuple[tuple[int, float], ...]
    kv_bytes: float | None
    kv_bytes_vanilla: float | None
    selector_ms: float
    first_token_ms: float
    total_ms: float
    beats_floors: bool | None


@dataclass(frozen=True)
class Bench:
    """Bench: what was asked of whom, where, and what came out.

    Attributes:
        model: its name or folder.
        data: name, and numbers of questions and pictures.
        device: device of the model.
        dtype: dtype of the model.
        batch: questions in one `generate`; times depend on it.
        versions: versions of tokenprune, torch and transformers.
        rows: one for each entrant; the first is vanilla.
        answers: one record for each row and question, for `answers.jsonl`.
    """

    model: str
    data: dict[str, Any]
    device: str
    dtype: str
    batch: int
    versions: dict[str, str]
    rows: tuple[Row, ...]
    answers: tuple[dict[str, Any], ...]

    def write(self, folder: Path) -> None:
        """Write `bench.json`, and `answers.jsonl` with every reply, into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        fields = asdict(self)
        del fields["answers"]
        for row in fields["rows"]:
            for one in row["types"].values():
                one["accuracy"] = one.pop("value")
        text = json.dumps(jsonable({"format": FORMAT, **fields}), indent=1)
        (folder / "bench.json").write_text(text + "\n")
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as lines:
            for answer in self.answers:
                lines.write(json.dumps({**answer, "versions": self.versions}) + "\n")


def rows(
    samples: Sequence[Sample], entrants: Sequence[Entrant], records: Sequence[Record]
) -> tuple[Row, ...]:
    """One row for each entrant; the first entrant must be vanilla."""
    credits = [_credits(samples, record) for record in records]
    questions = len(samples)
    before = max(record.before for record in records) / questions or math.nan
    found = []
    for place, (entrant, record) in enumerate(zip(entrants, records, strict=True)):
        groups = [sample.group for sample in samples]
        types = [sample.type for sample in samples]
        accuracy = balanced(credits[place], types, groups)
        vanilla = records[0].replies
        same = [float(plain(a) == plain(b)) for a, b in zip(record.replies, vanilla, strict=True)]
        agreement = mean(same, groups)
        tokens = tuple((layer, n / questions) for layer, n in sorted(record.layers.items()))
        budgeted = record.before / record.pictures if record.pictures else before
        vanilla_bytes = max(one.kv_bytes_vanilla for one in records) / questions or None
        found.append(
            Row(
                label=entrant.label,
                spec=entrant.spec,
                kind=entrant.kind,
                keep=_fraction(entrant.keep, budgeted),
                accuracy=accuracy.value,
                error=accuracy.error,
                types=_types(credits[place], types, groups),
                f1=_f1(samples, record),
                agreement=agreement.value,
                agreement_error=agreement.error,
                tokens=tokens or ((0, before),),
                kv_bytes=(record.kv_bytes / questions or None) if entrant.stages else vanilla_bytes,
                kv_bytes_vanilla=vanilla_bytes,
                selector_ms=record.selector_ms,
                first_token_ms=record.first_token_ms,
                total_ms=record.total_ms,
                beats_floors=_beats(place, entrants, records, credits, types, groups),
            )
        )
    return tuple(found)


def answers(
    samples: Sequence[Sample], entrants: Sequence[Entrant], records: Sequence[Record]
) -> tuple[dict[str, Any], ...]:
    """Every reply, with what was attached."""
    return tuple(
        {
            "label": entrant.label,
            "spec": entrant.spec,
            "kind": entrant.kind,
            "keep": entrant.keep,
            "id": sample.id,
            "group": sample.group,
            "type": sample.type,
            "question": sample.question,
            "answers": list(sample.answers),
            "reply": reply.strip(),
            "credit": credit(reply, sample.answers),
        }
        for entrant, record in zip(entrants, records, strict=True)
        for sample, reply in zip(samples, record.replies, strict=True)
    )


def _credits(samples: Sequence[Sample], record: Record) -> list[float]:
    return [credit(r, sample.answers) for sample, r in zip(samples, record.replies, strict=True)]


def _types(
    credits: Sequence[float], types: Sequence[str], groups: Sequence[str]
) -> dict[str, Mean]:
    found = {}
    for name in dict.fromkeys(types):
        chosen = [place for place, one in enumerate(types) if one == name]
        found[name] = mean([credits[p] for p in chosen], [groups[p] for p in chosen])
    return found


def _f1(samples: Sequence[Sample], record: Record) -> float | None:
    pairs = [
        (plain(reply) == "yes", "yes" in map(plain, sample.answers))
        for sample, reply in zip(samples, record.replies, strict=True)
        if sample.type == "existence"
    ]
    return f1([reply for reply, _ in pairs], [truth for _, truth in pairs]) if pairs else None


def _fraction(keep: int | float, before: float) -> float:
    if isinstance(keep, float) or math.isnan(before):
        return float(keep)
    return Keep(keep).count(round(before)) / before


def _beats(
    place: int,
    entrants: Sequence[Entrant],
    records: Sequence[Record],
    credits: Sequence[Sequence[float]],
    types: Sequence[str],
    groups: Sequence[str],
) -> bool | None:
    """Whether a method is better than all floors beside it; pairs of answers are compared."""
    entrant = entrants[place]
    floors = [
        index
        for index, other in enumerate(entrants)
        if other.kind == "floor"
        and (other.keep, other.per, other.place) == (entrant.keep, entrant.per, entrant.place)
    ]
    if entrant.kind != "method" or not floors:
        return None
    if any(_held_fewer(records[index], records[place]) for index in floors):
        return None
    for index in floors:
        gains = [a - b for a, b in zip(credits[place], credits[index], strict=True)]
        gain = balanced(gains, types, groups)
        if not gain.value > 2 * gain.error:
            return False
    return True


def _held_fewer(record: Record, other: Record) -> bool:
    """Whether `record` had fewer visual tokens than `other` in some layer of the LLM."""
    layers = {*record.layers, *other.layers}
    return any(_held(record, layer) < _held(other, layer) for layer in layers)


def _held(record: Record, layer: int) -> float:
    """Visual tokens in a layer; infinitely many where nothing was reduced."""
    return next((n for since, n in sorted(record.layers.items())[::-1] if since <= layer), math.inf)
