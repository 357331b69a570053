"""Tables of a bench."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..bench.result import Bench, Row
from .blocks import Section, bar, facts, row, table
from .markup import Html, join, tag
from .numbers import NONE, count, milliseconds, percent, size, with_error

_KINDS = {
    "floor": "a method must beat it to be worth its name",
    "control": "not a method: bounds what a result can mean",
}


def bench_sections(bench: Bench) -> list[Section]:
    """Everything that is known of a bench in numbers."""
    return [
        Section("accuracy", "Accuracy", join([*_summary(bench), _by_budget(bench)])),
        Section("types", "By type of question", _by_type(bench)),
        Section("rows", "Every spec and budget", join([_accuracies(bench), _costs(bench)])),
    ]


def bench_facts(bench: Bench) -> Html:
    """What was asked of whom, and where."""
    return facts(
        [
            ("Model", bench.model),
            ("Data", str(bench.data.get("name") or NONE)),
            ("Questions", f"{bench.data['questions']:,}"),
            ("Pictures", f"{bench.data['pictures']:,}"),
            ("Device", f"{bench.device}, {bench.dtype}, batch {bench.batch}"),
            *((name, version) for name, version in bench.versions.items()),
        ]
    )


def explained(bench: Bench) -> list[Html]:
    """How to read the numbers."""
    return [
        tag(
            "p",
            "Accuracy is the mean over types of question, each of the same weight; ± is one "
            "standard error, clustered by picture, since questions about one picture share its "
            "luck. It says nothing about other training seeds of the model.",
        ),
        tag(
            "p",
            tag("b", "Floors"),
            " (random, uniform, pool) cost nothing to think of, so every method stands beside "
            "them. ✓: better than every floor of its budget and placement by more than two paired "
            "standard errors. ✗: not. ",
            tag("b", "Controls"),
            " bound what a result can mean: an oracle that knows the objects, inverted scores, "
            "no picture at all (blind).",
        ),
        tag(
            "p",
            f"Times are of one question at batch {bench.batch} on {bench.device}, without the "
            "image processor. KV bytes are those of a prompt after its prefill.",
        ),
    ]


def _summary(bench: Bench) -> Iterator[Html]:
    """Best of the methods and best of the floors at every budget and placement."""
    lines = []
    places = dict.fromkeys(_place(one) for one in bench.rows if one.kind == "method")
    for keep in _keeps(bench):
        for place in places:
            rows = [one for one in bench.rows if one.keep == keep and _place(one) == place]
            methods = [one for one in rows if one.kind == "method"]
            floors = [one for one in rows if one.kind == "floor"]
            if not methods or not floors:
                continue
            best, floor = (max(group, key=lambda one: one.accuracy) for group in (methods, floors))
            verdict = {True: "yes", False: "no", None: NONE}[best.beats_floors]
            lines.append(
                row(
                    _share(bench, keep),
                    tag("td", place, class_="left"),
                    f"{best.label}: {with_error(best.accuracy, best.error)}",
                    f"{floor.label}: {with_error(floor.accuracy, floor.error)}",
                    _marked(verdict, best.beats_floors),
                )
            )
    if lines:
        vanilla = bench.rows[0]
        yield table(
            f"The best method and the best floor at every budget; all {_whole(bench)} tokens: "
            f"{with_error(vanilla.accuracy, vanilla.error)} %",
            ["kept", "placement<", "best method, %", "best floor, %", "beats every floor"],
            lines,
            "The best of several is a little better than it would be on new questions.",
        )


def _place(one: Row) -> str:
    """Where it reduces first, as its spec says; floors stand beside methods of their place."""
    return (one.spec or "").partition(";")[0].rpartition("@")[2].strip()


def _by_budget(bench: Bench) -> Html:
    """Methods, floors and controls down, budgets across."""
    keeps = _keeps(bench)
    lines = []
    for label in dict.fromkeys(one.label for one in bench.rows):
        of_label = {one.keep: one for one in bench.rows if one.label == label}
        kind = next(iter(of_label.values())).kind
        cells = [
            _accuracy(of_label[keep]) if keep in of_label else tag("td", "")
            for keep in (1.0, *keeps)
        ]
        lines.append(row(_named(label, kind), *cells, kind=kind))
    return table(
        "Accuracy in %, ± standard error",
        ["method", f"all {_whole(bench)} tokens", *(_share(bench, keep) for keep in keeps)],
        lines,
    )


def _by_type(bench: Bench) -> Html:
    types = list(bench.rows[0].types)
    f1 = any(one.f1 is not None for one in bench.rows)
    lines = []
    for number, one in enumerate(bench.rows):
        cells = [
            bar(with_error(mean.value, mean.error), mean.value)
            if (mean := one.types.get(name)) is not None
            else tag("td", NONE)
            for name in types
        ]
        if f1:
            cells.append(tag("td", percent(one.f1)))
        named, kept = _named(one.label, one.kind), _kept(bench, one)
        lines.append(row(named, kept, *cells, kind=_kind(bench, number)))
    asked = [f"{name} ({bench.rows[0].types[name].questions})" for name in types]
    return table(
        "Accuracy in % by type of question, ± standard error",
        ["method", "kept", *asked, *(["F1 of existence"] if f1 else [])],
        lines,
        "In brackets: how many questions. F1: of yes among yes-or-no questions, as in POPE."
        if f1
        else "In brackets: how many questions.",
    )


def _accuracies(bench: Bench) -> Html:
    lines = [
        row(
            _named(one.label, one.kind),
            _kept(bench, one),
            _accuracy(one),
            tag("td", with_error(one.agreement, one.agreement_error)),
            tag("td", tag("code", one.spec) if one.spec else "nothing attached", class_="spec"),
            kind=_kind(bench, number),
        )
        for number, one in enumerate(bench.rows)
    ]
    return table(
        "Exact specs, accuracy, and agreement with the unpruned model, in %",
        ["method", "kept", "accuracy", "agreement", "spec<"],
        lines,
    )


def _costs(bench: Bench) -> Html:
    lines = []
    for number, one in enumerate(bench.rows):
        stored = size(one.kv_bytes)
        if one.kv_bytes and one.kv_bytes_vanilla:
            stored += f" ({percent(one.kv_bytes / one.kv_bytes_vanilla, 0)} %)"
        lines.append(
            row(
                _named(one.label, one.kind),
                tag("td", _layers(one), class_="left"),
                stored,
                milliseconds(one.selector_ms),
                milliseconds(one.first_token_ms),
                milliseconds(one.total_ms),
                kind=_kind(bench, number),
            )
        )
    return table(
        "Costs of a question; times in milliseconds",
        ["method", "visual tokens by LLM layer<", "KV cache", "selector", "first token", "answer"],
        lines,
    )


def _accuracy(one: Row) -> Html:
    text = with_error(one.accuracy, one.error)
    mark = {True: "✓", False: "✗", None: ""}[one.beats_floors]
    return bar(text, one.accuracy, _marked(mark, one.beats_floors) if mark else Html(""))


def _marked(text: str, beats: bool | None) -> Html:
    """With a meaning that does not need colours or the sign."""
    if beats is None:
        return join([text])
    title = "beats every floor" if beats else "does not beat every floor"
    return tag("abbr", text, title=title, class_="yes" if beats else "no")


def _named(label: str, kind: str) -> Html:
    if kind not in _KINDS:
        return join([label])
    return join([label, " ", tag("abbr", kind, title=_KINDS[kind], class_="kind")])


def _kind(bench: Bench, number: int) -> str:
    """Classes of a row; where another budget begins, there is a rule above it."""
    one = bench.rows[number]
    begins = number > 0 and bench.rows[number - 1].keep != one.keep
    return f"{one.kind} begins" if begins else one.kind


def _keeps(bench: Bench) -> Sequence[float]:
    return sorted({one.keep for one in bench.rows if one.keep < 1}, reverse=True)


def _share(bench: Bench, keep: float) -> str:
    """A budget in percent, and in tokens where all rows that were cut at once agree."""
    kept = {round(one.tokens[-1][1], 1) for one in bench.rows if one.keep == keep}
    most = max(kept)
    return f"{percent(keep)} %, {count(most)} tokens" if len(kept) == 1 else f"{percent(keep)} %"


def _kept(bench: Bench, one: Row) -> str:
    return f"{count(one.tokens[-1][1])} of {_whole(bench)}"


def _whole(bench: Bench) -> str:
    return count(bench.rows[0].tokens[-1][1])


def _layers(one: Row) -> str:
    return ", ".join(
        count(tokens) if layer == 0 else f"{count(tokens)} from layer {layer}"
        for layer, tokens in one.tokens
    )
