"""`tokenprune picture`: what several methods keep of a picture, or how they score it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..analysis.sheet import Panel, sheet, stacked
from ..attachment import attach
from ..errors import SpecError, UnsupportedError
from ..loading import Loaded
from ..pictures import read_picture
from ..placement import BeforeLLM
from ..reducers import Evict
from ..shipped_adapters import feature_layer, pocket_model
from ..signals import ClsAttention, Signal, Signals
from ..spec import parse_schedule, spec_of
from ..strategy import Reduction, Scorer, Stage, Strategy
from ..tokens import VisualTokens
from .answer import Answer, answer
from .bench import POCKET, longest, model_named
from .console import console
from .drawing import picture_file, write_picture
from .errors import CommandError
from .seen import Seen

KEPT = ("vtc-cls(keep=0.22)", "random(keep=0.22)", "tome(keep=0.22)")
SCORED = ("cls-attention", "received-attention(layers=1)", "similarity", "fastv @ after-layer(2)")
"""What is drawn where nothing is asked for: of 64 patches, 14; with `--heat`, these scores."""

QUESTION = "Describe this picture."


@dataclass(frozen=True, eq=False)
class _Witness(Scorer):
    """Scorer that keeps what it is shown, and finds everything equally important.

    Attributes:
        asked: the signal to keep.
        shown: its answers, one for each pass.
    """

    asked: Signal
    shown: list[Tensor] = field(default_factory=list, repr=False)

    @property
    def signals(self) -> frozenset[Signal]:
        return frozenset({self.asked})

    def score(self, tokens: VisualTokens, signals: Signals) -> Tensor:
        self.shown.append(signals[self.asked])
        return torch.zeros(tokens.mask.shape, device=tokens.mask.device)


def run_picture(
    model: str,
    image: Path | None,
    prompt: str | None,
    prune: tuple[str, ...],
    out: Path,
    heat: bool,
    seed: int,
    size: int,
    columns: int,
    max_new_tokens: int | None,
    device: str,
    dtype: str,
) -> Image.Image:
    """Ask once for each method, draw, and write."""
    out = picture_file(out, "scores.png" if heat else "kept.png")
    schedules: dict[str, tuple[Stage, ...]]
    if heat:
        schedules = {spec: (scoring(spec),) for spec in prune or SCORED}
    else:
        schedules = {spec: parse_schedule(spec) for spec in prune or KEPT}
    loaded = model_named(model, device, dtype)
    picture, question, truth = _asked(model, image, prompt, seed)
    inputs = loaded.inputs(picture, loaded.text(question))
    seen = Seen.of(loaded, inputs)
    scale = seen.scale(size)
    longest_answer = longest(model, max_new_tokens)

    said = {
        spec: answer(loaded, inputs, "; ".join(map(spec_of, stages)), longest_answer)
        for spec, stages in schedules.items()
    }
    screen = console()
    unchanged = Panel(seen.plain(scale), "what the model sees")
    if heat:
        scored = [_scored(seen, spec, said[spec], scale) for spec in schedules]
        rows = {f"Scores; asked: {question}": [unchanged, *scored]}
        by_layer = [_layer(seen, n, *each, scale) for n, each in _layers(loaded, inputs).items()]
        if by_layer:
            rows["[CLS] attention in the vision tower, mean over heads"] = by_layer
        else:
            screen.print("this model has no [CLS] attention: no panels by layer", markup=False)
    else:
        vanilla = answer(loaded, inputs, None, longest_answer)
        whole = f"{seen.patches * len(seen.crops)} patches\n{_says(vanilla, truth)}"
        kept = [_kept(seen, spec, said[spec], truth, scale) for spec in schedules]
        rows = {question: [replace(unchanged, caption=whole), *kept]}
    drawn = stacked([sheet(each, heading, columns) for heading, each in rows.items()])
    write_picture(drawn, out, _described(rows))
    for spec, stages in schedules.items():
        screen.print(f"{spec}: {'; '.join(map(spec_of, stages))}", markup=False, soft_wrap=True)
    screen.print(f"wrote {out}", markup=False, soft_wrap=True)
    return drawn


def _asked(
    model: str, image: Path | None, prompt: str | None, seed: int
) -> tuple[Image.Image, str, str | None]:
    """The picture, what to ask about it, and the answer where it is known."""
    if image is not None:
        return read_picture(image), prompt or QUESTION, None
    pocket = pocket_model()
    scene = pocket.draw(seed)
    if prompt is not None:
        return scene.picture, prompt, None
    if model != POCKET:
        return scene.picture, QUESTION, None
    question = pocket.questions(scene)[0]
    return scene.picture, question.text, question.answer


def _described(rows: Mapping[str, Sequence[Panel]]) -> str:
    """A picture in words, for those who cannot see it."""
    lines = (
        f"{heading}: {'; '.join(' '.join(f'{p.title} {p.caption}'.split()) for p in panels)}."
        for heading, panels in rows.items()
    )
    return " ".join(lines)


def _says(given: Answer, truth: str | None) -> str:
    mark = "" if truth is None else " (right)" if given.text == truth else f" (wrong: {truth})"
    text = " ".join(given.text.split())
    return f"answer: {text if len(text) < 90 else text[:87] + '...'}{mark}"


def _kept(seen: Seen, spec: str, given: Answer, truth: str | None, scale: int) -> Panel:
    """What one method left of the picture."""
    reduction, report = given.reduction, given.report
    assert reduction is not None
    assert report is not None
    before, after = (
        sum(getattr(one, when) for one in report.images) for when in ("before", "after")
    )
    counts = f"{after} of {before} visual tokens"
    if len(parse_schedule(spec)) > 1:
        # The last of several stages does not know what the others discarded.
        drawn = seen.kept(report.kept, scale)
    else:
        drawn = seen.reduced(reduction, scale)
        merged = _merged(reduction)
        counts += f", {merged} of them merged" if merged else ""
    return Panel(drawn, spec, f"{counts}\n{_says(given, truth)}")


def _merged(reduction: Reduction) -> int:
    """How many kept tokens are made of several."""
    return int((reduction.plan.counts() > 1).sum())


def scoring(spec: str) -> Stage:
    """The stage of `spec`, which may be a scorer alone; it reduces, but only scores are drawn.

    >>> spec_of(scoring("fastv @ after-layer(3)"))
    'fastv | evict(0.5) @ after-layer(layers=3)'
    """
    scorer, at, place = spec.partition("@")
    try:
        stages = parse_schedule(spec)
    except SpecError:
        stages = parse_schedule(f"{scorer} | evict(0.5) {at} {place}")
    if len(stages) > 1 or not isinstance(stages[0].strategy.steps[0], Scorer):
        raise CommandError(
            f"{spec!r} does not start with a scorer, so it has no scores to draw; write e.g. "
            "cls-attention"
        )
    return stages[0]


def _scored(seen: Seen, spec: str, given: Answer, scale: int) -> Panel:
    """The scores of one method's scorer."""
    reduction = given.reduction
    assert reduction is not None
    assert reduction.scores is not None
    return Panel(seen.heat(reduction.scores, reduction, scale), spec)


def _layers(loaded: Loaded, inputs: Mapping[str, Tensor]) -> dict[int, tuple[Tensor, Reduction]]:
    """[CLS] attention, mean over heads, of each vision layer up to the one that gives features."""
    last = feature_layer(loaded.model.config)
    witness = _Witness(ClsAttention(tuple(range(last + 1))))
    stage = Strategy(witness, Evict(1.0)).at(BeforeLLM())
    try:
        with attach(loaded.model, stage) as attached, torch.inference_mode():
            loaded.model.generate(**inputs, max_new_tokens=1, do_sample=False)
    except UnsupportedError:
        return {}
    rows = witness.shown[0].float().mean(2)
    return {layer: (rows[:, layer], attached.last) for layer in range(last + 1)}


def _layer(seen: Seen, number: int, scores: Tensor, reduction: Reduction, scale: int) -> Panel:
    return Panel(seen.heat(scores, reduction, scale), f"layer {number}")
