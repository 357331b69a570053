"""Make the results page from what `measure.py` wrote.

    python docs/results/page.py out/results/0 out/results/1 out/results/2

The first folder is the shipped model's. Averages over models and all comparisons are kept in
`docs/reference/results.json`; the page and its plots say nothing that is not in there. Without
folders the page is written anew from that file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from tokenprune.bench.scoring import balanced, f1, mean
from tokenprune.figures import COLOURS, MARKS, figure

DOCS = Path(__file__).parents[1]
DATA = DOCS / "reference" / "results.json"
PAGE = DOCS / "reference" / "results.md"
PLOTS = DOCS / "images"
PUBLISHED = Path(__file__).with_name("published.json")

NAMES = {
    "vtc-cls": "VTC-CLS",
    "vtc-cls(layers=1)": "[CLS], K = 1 (FasterVLM)",
    "prumerge-plus": "PruMerge+",
    "prumerge": "PruMerge",
    "visionzip": "VisionZip",
    "vispruner": "VisPruner",
    "divprune": "DivPrune",
    "tome": "ToMe",
    "kmeans": "KMeans",
    "fastv": "FastV (after layer 2)",
    "vtc-cls-in-llm": "VTC-CLS after layer 2",
    "random @ after-layer": "random after layer 2",
    "uniform @ after-layer": "uniform after layer 2",
    "pool @ after-layer": "pool after layer 2",
    "oracle @ after-layer": "oracle after layer 2",
    "inverted @ after-layer": "[CLS] inverted after layer 2",
    "inverted": "[CLS] inverted",
    "oracle": "oracle (object mask)",
}

CLAIMS = (
    ("table 1", "vtc-cls", "fastv", (28, 14, 7), {28: 1.2, 14: 3.9, 7: 13.1}),
    ("table 1", "vtc-cls", "prumerge-plus", (28, 14, 7), {28: 1.1, 14: 1.9, 7: 2.1}),
    ("table 3", "vtc-cls", "random", (28, 14, 7), {14: 2.0}),
    ("table 3", "vtc-cls", "tome", (28, 14, 7), {14: 1.0}),
    ("table 3", "vtc-cls", "kmeans", (28, 14, 7), {14: 1.0}),
    ("table 4", "vtc-cls", "vtc-cls(layers=1)", (28, 14, 7), {14: 1.0}),
    ("table 4", "vtc-cls", "vtc-cls(layers=2)", (14,), {14: 0.5}),
    ("table 4", "vtc-cls", "vtc-cls(layers=4)", (14,), {14: 0.2}),
    ("table 4", "vtc-cls", "vtc-cls(layers=5)", (14,), {14: 0.5}),
    ("table 5", "vtc-cls", "vtc-cls(ensemble='max')", (14,), {14: 0.6}),
    ("table 5", "vtc-cls", "vtc-cls(ensemble='min')", (14,), {14: 0.2}),
    ("table 6", "vtc-cls-in-llm", "fastv", (28, 14, 7), {14: 6.5}),
    ("floors", "vtc-cls", "uniform", (28, 14, 7), {}),
    ("floors", "vtc-cls", "pool", (28, 14, 7), {}),
    ("floors", "tome", "pool", (28, 14, 7), {}),
    ("floors", "fastv", "random @ after-layer", (28, 14, 7), {}),
    ("floors", "vtc-cls-in-llm", "random @ after-layer", (28, 14, 7), {}),
    ("controls", "oracle", "vtc-cls", (28, 14, 7), {}),
    ("controls", "random", "inverted", (28, 14, 7), {}),
)
"""Where, one method, another, budgets, and by how many points the paper's averages differ."""


def combine(folders: list[Path]) -> dict[str, Any]:
    """Averages over models, with errors clustered by picture over the models' mean answer."""
    benches = [json.loads((folder / "bench.json").read_text()) for folder in folders]
    answers = [Replies(folder / "answers.jsonl") for folder in folders]
    rows = []
    for place, row in enumerate(benches[0]["rows"]):
        key = row["label"], answers[0].keeps[place]
        credits = [model.credits[key] for model in answers]
        average = [statistics.fmean(each) for each in zip(*credits, strict=True)]
        types, groups = answers[0].types, answers[0].groups
        accuracy = balanced(average, types, groups)
        by_type = {}
        for name in dict.fromkeys(types):
            chosen = [place for place, one in enumerate(types) if one == name]
            one = mean([average[p] for p in chosen], [groups[p] for p in chosen])
            by_type[name] = [one.value, one.error]
        rows.append(
            {
                "label": row["label"],
                "spec": row["spec"],
                "kind": row["kind"],
                "keep": key[1],
                "accuracy": accuracy.value,
                "error": accuracy.error,
                "models": [balanced(each, types, groups).value for each in credits],
                "types": by_type,
                "f1": statistics.fmean(model.f1(key) for model in answers),
                "agreement": statistics.fmean(b["rows"][place]["agreement"] for b in benches),
                "tokens": row["tokens"],
                "kv_bytes": row["kv_bytes"],
                "selector_ms": row["selector_ms"],
                "total_ms": row["total_ms"],
            }
        )
    first = benches[0]
    return {
        "data": first["data"],
        "batch": first["batch"],
        "device": first["device"],
        "versions": first["versions"],
        "models": len(folders),
        "seeds": [_seed(bench["model"]) for bench in benches],
        "unpruned": [_by_type(model) for model in answers],
        "rows": rows,
        "comparisons": _compare(answers),
    }


def _seed(checkpoint: str) -> int:
    """The training seed of a model, from its own results."""
    from tokenprune_adapters.pocket import CHECKPOINT

    folder = CHECKPOINT if checkpoint == "pocket" else Path(checkpoint)
    seed: int = json.loads((folder / "results.json").read_text())["training"]["seed"]
    return seed


def _by_type(model: Replies) -> dict[str, float]:
    """Accuracy of a model without compression, by type of question."""
    found: dict[str, list[float]] = defaultdict(list)
    for name, credit in zip(model.types, model.credits["vanilla", 1.0], strict=True):
        found[name].append(credit)
    return {name: statistics.fmean(credits) for name, credits in found.items()}


class Replies:
    """The replies of one model, by label and budget."""

    def __init__(self, path: Path) -> None:
        self.credits: dict[tuple[str, Any], list[float]] = defaultdict(list)
        self.yes: dict[tuple[str, Any], list[tuple[bool, bool]]] = defaultdict(list)
        self.types: list[str] = []
        self.groups: list[str] = []
        self.keeps: list[Any] = []
        for line in path.read_text().splitlines():
            row = json.loads(line)
            key = row["label"], row["keep"]
            if key not in self.credits:
                self.keeps.append(row["keep"])
            self.credits[key].append(row["credit"])
            if row["type"] == "existence":
                self.yes[key].append((row["reply"] == "yes", "yes" in row["answers"]))
            if len(self.credits) == 1:
                self.types.append(row["type"])
                self.groups.append(row["group"])

    def f1(self, key: tuple[str, Any]) -> float:
        """F1 of yes over questions of existence."""
        return f1([reply for reply, _ in self.yes[key]], [truth for _, truth in self.yes[key]])


def _compare(answers: list[Replies]) -> list[dict[str, Any]]:
    """Paired differences for every claim, for the mean of the models and for each."""
    found = []
    types, groups = answers[0].types, answers[0].groups
    for where, one, other, budgets, published in CLAIMS:
        for keep in budgets:
            gains = [
                [a - b for a, b in zip(m.credits[one, keep], m.credits[other, keep], strict=True)]
                for m in answers
            ]
            average = [statistics.fmean(each) for each in zip(*gains, strict=True)]
            gain = balanced(average, types, groups)
            found.append(
                {
                    "where": where,
                    "one": one,
                    "other": other,
                    "keep": keep,
                    "difference": gain.value,
                    "error": gain.error,
                    "models": [balanced(each, types, groups).value for each in gains],
                    "published": published.get(keep),
                }
            )
    return found


def verdict(row: dict[str, Any]) -> str:
    """Better or worse only beyond two errors, and with the same sign in every model."""
    signs = {value > 0 for value in row["models"]}
    if abs(row["difference"]) <= 2 * row["error"] or len(signs) > 1:
        return "no difference beyond the errors"
    return "better" if row["difference"] > 0 else "**worse**"


def page(data: dict[str, Any], training: dict[str, Any]) -> str:
    """The results page."""
    rows = {(row["label"], row["keep"]): row for row in data["rows"]}
    types = list(data["rows"][0]["types"])
    parts = [_HEAD.format(**_facts(data, training))]
    parts += ["## Methods and budgets (table 1)", "", _budget_table(rows, _TABLE_1), ""]
    parts += ["![accuracy against kept tokens](../images/results-accuracy.png)", ""]
    parts += ["### By type of question, at 14 of 64 tokens", "", _types(rows, types, _BY_TYPE), ""]
    parts += ["## [CLS] against random, ToMe, KMeans (table 3)", "", _claims(data, "table 3"), ""]
    parts += ["## How many layers (table 4)", "", _plain(rows, _TABLE_4), ""]
    parts += [_claims(data, "table 4"), ""]
    parts += ["## Which ensemble (table 5)", "", _plain(rows, _TABLE_5), ""]
    parts += [_claims(data, "table 5"), ""]
    parts += ["## Inside the LLM (table 6)", "", _budget_table(rows, _TABLE_6), ""]
    parts += ["![accuracy after layer 2](../images/results-inside.png)", ""]
    parts += [_claims(data, "table 6"), "", "## Time (table 2)", "", _times(rows), "", _TIME, ""]
    parts += ["## Floors and controls", "", _claims(data, "floors", "controls"), ""]
    parts += ["## Where the miniature agrees with the paper", "", _agreement(data), ""]
    parts += [_training(training, data), "", _published(json.loads(PUBLISHED.read_text()))]
    return "\n".join(parts) + "\n"


_TABLE_1 = (
    *("vtc-cls", "vtc-cls(layers=1)", "prumerge-plus", "prumerge", "fastv", "visionzip"),
    *("vispruner", "divprune", "tome", "kmeans", "random", "uniform", "pool", "oracle"),
    "inverted",
)
_BY_TYPE = (
    *("vanilla", "blind", "vtc-cls", "vtc-cls(layers=1)", "prumerge-plus", "visionzip"),
    *("vispruner", "divprune", "tome", "kmeans", "fastv", "vtc-cls-in-llm"),
    *("random", "uniform", "pool", "oracle", "inverted"),
)
_TABLE_4 = {
    "K = 1": "vtc-cls(layers=1)",
    "K = 2": "vtc-cls(layers=2)",
    "K = 3": "vtc-cls",
    "K = 4": "vtc-cls(layers=4)",
    "K = 5": "vtc-cls(layers=5)",
}
_TABLE_5 = {
    "none (K = 1)": "vtc-cls(layers=1)",
    "avg": "vtc-cls",
    "max": "vtc-cls(ensemble='max')",
    "min": "vtc-cls(ensemble='min')",
}
_TABLE_6 = (
    *("fastv", "vtc-cls-in-llm", "random @ after-layer", "uniform @ after-layer"),
    *("pool @ after-layer", "oracle @ after-layer", "inverted @ after-layer"),
)

_HEAD = """\
# Results in miniature

The tables of the VTC-CLS paper, measured on the shipped miniature model. **A ranking of methods on
a model of {millions} million parameters is no evidence for their ranking on a real one**: its
pictures are sparse, and its tower was trained on the very facts that most questions ask for, which
favours [CLS]. So does its training with copies of some visual tokens: models trained without them
lost `count` wherever only salient tokens stay, the oracle's included. Nothing here was tuned to
agree with a paper. What the miniature is good for: it is a model that can really answer, on which
every method, budget and placement runs in a minute.

Written by `make results` from {models} of the same recipe ({seeds}; only the first is
shipped, the better of seeds 0 and 1 without compression), {questions:,} questions about {pictures}
pictures, tokenprune {tokenprune}, torch {torch}, transformers {transformers}.
Nothing on this page is typed in, but the published figures at its end.

- **Accuracy** in percent is the mean over nine types of question, each of the same weight, averaged
  over the models. **±** is its standard error, clustered by picture. In brackets: the lowest and
  highest of the models.
- **Budgets** of 28, 14 and 7 of 64 visual tokens are the shares that 256, 128 and 64 are of 576.
- **Comparisons** are paired: the same questions, the same models. "Better" needs two standard
  errors and the same sign in every model.
- Unpruned: {vanilla}. Blind (a gray picture): {blind}.
"""

_TIME = (
    "One core, {}. A model this small spends its time on overhead, so that ratios here understate "
    "what a large model gains: see [what was measured](measured.md) for prefill against the "
    "arithmetic."
).format("medians over batches of the shipped model alone, all rows in turns")


def _facts(data: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    rows = {row["label"]: row for row in data["rows"]}
    count = data["models"]
    return {
        "millions": f"{training['training']['parameters'] / 1e6:.1f}",
        "models": f"{count} models" if count > 1 else "one model",
        "seeds": f"training seeds {', '.join(map(str, data['seeds']))}",
        "questions": data["data"]["questions"],
        "pictures": data["data"]["pictures"],
        "vanilla": _cell(rows["vanilla"]),
        "blind": _cell(rows["blind"]),
        **data["versions"],
    }


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    low, high = min(row["models"]), max(row["models"])
    spread = f" [{100 * low:.1f}, {100 * high:.1f}]" if len(row["models"]) > 1 else ""
    return f"{100 * row['accuracy']:.1f} ± {100 * row['error']:.1f}{spread}"


def _table(headings: list[str], rows: list[list[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _name(label: str) -> str:
    return NAMES.get(label, label)


def _budget_table(rows: dict[Any, Any], labels: tuple[str, ...]) -> str:
    keeps = (28, 14, 7)
    body = []
    for label in labels:
        best = {keep: _is_best(rows, labels, label, keep) for keep in keeps}
        cells = [_cell(rows.get((label, keep))) for keep in keeps]
        marked = [f"**{c}**" if best[k] else c for c, k in zip(cells, keeps, strict=True)]
        body.append([_name(label), *marked])
    return _table(["accuracy, %", "28 of 64", "14", "7"], body)


def _is_best(rows: dict[Any, Any], labels: tuple[str, ...], label: str, keep: int) -> bool:
    methods = [rows[one, keep] for one in labels if rows[one, keep]["kind"] != "control"]
    return max(methods, key=lambda row: row["accuracy"]) is rows[label, keep]


def _types(rows: dict[Any, Any], types: list[str], labels: tuple[str, ...]) -> str:
    body = []
    for label in labels:
        row = rows.get((label, 14)) or rows[label, 1.0]
        cells = [f"{100 * row['types'][name][0]:.1f}" for name in types]
        body.append([_name(label), *cells, f"{100 * row['f1']:.1f}"])
    errors = [rows["vtc-cls", 14]["types"][name][1] for name in types]
    body.append(["*± (of VTC-CLS)*", *(f"{100 * error:.1f}" for error in errors), ""])
    return _table(["%", *types, "F1 of existence"], body)


def _plain(rows: dict[Any, Any], labels: dict[str, str]) -> str:
    body = [[name, _cell(rows[label, 14])] for name, label in labels.items()]
    return _table(["", "accuracy at 14 of 64, %"], body)


def _claims(data: dict[str, Any], *where: str) -> str:
    body = [
        [
            f"{_name(row['one'])} against {_name(row['other'])}",
            str(row["keep"]),
            _difference(row),
            verdict(row),
        ]
        for row in data["comparisons"]
        if row["where"] in where
    ]
    return _table(["", "tokens", "difference, points", ""], body)


def _difference(row: dict[str, Any]) -> str:
    each = ", ".join(f"{100 * value:+.1f}" for value in row["models"])
    return f"{100 * row['difference']:+.1f} ± {100 * row['error']:.1f} ({each})"


def _agreement(data: dict[str, Any]) -> str:
    body = []
    for row in data["comparisons"]:
        if row["published"] is None:
            continue
        here = verdict(row)
        said = {"better": "agrees", "**worse**": "**disagrees**"}.get(here, "cannot tell")
        body.append(
            [
                row["where"],
                f"{_name(row['one'])} over {_name(row['other'])}",
                str(row["keep"]),
                f"{row['published']:+.1f}",
                f"{100 * row['difference']:+.1f} ± {100 * row['error']:.1f}",
                said,
            ]
        )
    return _table(["paper", "claim", "tokens", "paper, points", "here, points", ""], body)


def _times(rows: dict[Any, Any]) -> str:
    vanilla = rows["vanilla", 1.0]
    body = []
    for label, keep in (
        ("vanilla", 1.0),
        *((label, keep) for label in ("vtc-cls", "vtc-cls-in-llm") for keep in (28, 14, 7)),
    ):
        row = rows[label, keep]
        body.append(
            [
                _name(label),
                "64" if label == "vanilla" else str(keep),
                f"{row['total_ms'] / vanilla['total_ms']:.2f}",
                f"{row['kv_bytes'] / vanilla['kv_bytes']:.2f}",
                f"{row['selector_ms'] / row['total_ms']:.3f}" if row["spec"] else "",
                f"{100 * row['accuracy']:.1f}",
            ]
        )
    return _table(
        ["", "tokens", "time, ratio", "KV bytes, ratio", "selector's share", "accuracy, %"], body
    )


def _training(training: dict[str, Any], data: dict[str, Any]) -> str:
    facts = training["training"]
    types = list(data["rows"][0]["types"])
    models = [
        [str(seed), *(f"{100 * model[name]:.1f}" for name in types)]
        for seed, model in zip(data["seeds"], data["unpruned"], strict=True)
    ]
    return f"""\
## How the models were trained

`make train` (the shipped one, seed {facts["seed"]}) or `make train SEED=1`: {facts["cpu_minutes"]}
minutes of one CPU core. The log is in the checkpoint's `results.json`; the model card says which
losses. Seeds differ in what they learn, and none was left out. Without compression, in percent:

{_table(["seed", *types], models)}

![training curves](../images/results-training.png)"""


def _published(published: dict[str, Any]) -> str:
    parts = [
        "## Published figures for LLaVA-1.5-7B",
        "",
        f"From {published['source']}; POPE is F1. The column *measured* is for averages measured "
        "with this library; it is empty until someone measures "
        "([how to](../how-to/lmms-eval.md)), and nothing is filled in by hand.",
    ]
    for table in published["tables"]:
        body = [
            [name, str(tokens), *map(str, values), ""] for name, tokens, values in table["rows"]
        ]
        headings = ["", "tokens", *table["columns"], "measured"]
        parts += ["", f"### {table['title']}", "", _table(headings, body)]
    return "\n".join(parts)


def plots(data: dict[str, Any], training: dict[str, Any]) -> None:
    """The pictures of the page."""
    rows = data["rows"]
    before = ("vtc-cls", "prumerge-plus", "visionzip", "divprune", "tome", "kmeans")
    floors = ("random", "uniform", "pool", "oracle", "inverted")
    _curves(rows, before, floors, "before the LLM").savefig(PLOTS / "results-accuracy.png")
    inside = tuple(f"{name} @ after-layer" for name in floors)
    _curves(rows, ("fastv", "vtc-cls-in-llm"), inside, "after layer 2 of 8").savefig(
        PLOTS / "results-inside.png"
    )
    canvas = figure(7.2, 3.2)
    for axes, (stage, curve) in zip(canvas.subplots(1, 2), training["curve"].items(), strict=True):
        steps = [point[0] for point in curve]
        axes.plot(steps, [point[1] for point in curve], color=COLOURS[0], label="loss")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_yscale("log")
        right = axes.twinx()
        right.plot(steps, [100 * point[2] for point in curve], color=COLOURS[1])
        right.set_ylabel("accuracy in training, %", color=COLOURS[1])
        right.set_ylim(0, 100)
        axes.set_title(stage, fontsize=10, loc="left")
        axes.yaxis.label.set_color(COLOURS[0])
    canvas.savefig(PLOTS / "results-training.png")


def _curves(
    rows: list[dict[str, Any]], methods: tuple[str, ...], others: tuple[str, ...], title: str
) -> Any:
    canvas = figure(7.2, 4.4)
    axes = canvas.subplots()
    lines = {"random": "--", "uniform": "-.", "pool": ":", "oracle": "-", "inverted": "--"}
    for place, label in enumerate((*methods, *others)):
        found = sorted((row for row in rows if row["label"] == label), key=lambda r: r["keep"])
        style: dict[str, Any] = {"linewidth": 2}
        if label in methods:
            style |= {"color": COLOURS[place], "marker": MARKS[place], "markersize": 5}
        else:
            name = label.partition(" ")[0]
            gray = {"oracle": "#b8a04a", "inverted": "#b8a04a", "pool": "#aaaaaa"}
            style = {"color": gray.get(name, "#555555"), "linestyle": lines[name], "marker": "."}
        axes.errorbar(
            [row["keep"] for row in found],
            [100 * row["accuracy"] for row in found],
            yerr=[100 * row["error"] for row in found],
            capsize=2,
            label=_name(label),
            **style,
        )
    for label, line in (("vanilla", "-"), ("blind", ":")):
        value = next(row["accuracy"] for row in rows if row["label"] == label)
        axes.axhline(100 * value, color="black", linewidth=1, linestyle=line, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([7, 14, 28], ["7", "14", "28"])
    axes.minorticks_off()
    axes.set_xlabel("visual tokens kept of 64")
    axes.set_ylabel("accuracy in %, mean over question types")
    axes.set_title(f"{title}; bars: ± 1 standard error", fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, bbox_to_anchor=(1, 1), loc="upper left")
    return canvas


def main() -> None:
    """Read the command line and write."""
    from tokenprune_adapters.pocket import CHECKPOINT

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path)
    options = parser.parse_args()
    if options.folders:
        DATA.write_text(json.dumps(rounded(combine(options.folders)), indent=1) + "\n")
    data, training = (
        json.loads(DATA.read_text()),
        json.loads((CHECKPOINT / "results.json").read_text()),
    )
    PAGE.write_text(page(data, training))
    plots(data, training)


def rounded(value: Any) -> Any:
    """Six digits after the point are enough."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return value


if __name__ == "__main__":
    main()
