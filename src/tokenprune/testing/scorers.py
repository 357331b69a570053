"""S1 to S10: what every scorer promises."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ..signals import Signals
from .cases import ScorerCase
from .generators import inputs_for
from .inputs import Inputs, same_bits
from .probes import (
    AwkwardTies,
    ignores_others,
    in_float32,
    on_devices,
    reads_only,
    rounded,
    seeded,
    untouched,
    works_elsewhere,
)
from .promises import for_all, promise, require

ENOUGH = 10
"""Batches that tell a scorer which rounds from one to which digits hardly matter."""


def _score(case: ScorerCase, inputs: Inputs) -> Tensor:
    return case.scorer.score(inputs.tokens, inputs.signals)


def _close(case: ScorerCase, got: Tensor, expected: Tensor, what: str) -> None:
    # Matrix products may round differently in other shapes; a broken promise is far beyond that.
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    require(
        torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * scale, equal_nan=True),
        f"{case.name}: {what}: {got.tolist()} is not {expected.tolist()}",
    )


@promise(ScorerCase)
def check_s1_scores_are_finite_float32(case: ScorerCase) -> None:
    """Scores have the axes (batch tokens), are float32, and are finite on every real token."""

    @for_all(inputs_for(case.scorer))
    def holds(inputs: Inputs) -> None:
        scores, mask = _score(case, inputs), inputs.tokens.mask
        require(
            scores.shape == mask.shape and scores.dtype == torch.float32,
            f"{case.name} must return float32 {tuple(mask.shape)}, got {scores.dtype} "
            f"{tuple(scores.shape)}",
        )
        finite = bool(scores[mask].isfinite().all())
        require(finite, f"{case.name} must be finite on real tokens, got {scores.tolist()}")


@promise(ScorerCase)
def check_s2_same_input_gives_same_scores(case: ScorerCase) -> None:
    """The same input gives the same scores; global random generators are neither read nor moved."""

    @for_all(inputs_for(case.scorer))
    def holds(inputs: Inputs) -> None:
        with seeded(1):
            first = _score(case, inputs)
        with seeded(2):
            second = _score(case, inputs)
        require(same_bits(first, second), f"{case.name} gave {first} and then {second}")


@promise(ScorerCase)
def check_s3_row_ignores_its_batch_mates(case: ScorerCase) -> None:
    """The scores of a row do not depend on the other rows of the batch."""

    @for_all(inputs_for(case.scorer, min_batch=2))
    def holds(inputs: Inputs) -> None:
        together = _score(case, inputs)
        for row in inputs.rows:
            real = inputs.tokens.mask[row]
            alone = _score(case, inputs.row(row))[0]
            _close(case, together[row, real], alone[real], f"row {row} in a batch and alone")


@promise(ScorerCase)
def check_s4_padding_changes_nothing(case: ScorerCase) -> None:
    """Padding does not change the scores of real tokens, wherever it is and whatever it holds."""

    @for_all(inputs_for(case.scorer))
    def holds(inputs: Inputs) -> None:
        padded = _score(case, inputs)
        for row in inputs.rows:
            alone = _score(case, inputs.row(row).alone(0))[0]
            _close(case, padded[row, inputs.real(row)], alone, f"row {row} padded and not")


@promise(ScorerCase)
def check_s5_permuting_tokens_permutes_scores(case: ScorerCase) -> None:
    """Permuting the tokens of a row permutes its scores."""

    @for_all(_permuted(case))
    def holds(drawn: tuple[Inputs, Tensor]) -> None:
        inputs, order = drawn
        expected = _score(case, inputs)[:, order]
        got = _score(case, inputs.at(inputs.rows, order))
        mask = inputs.tokens.mask[:, order]
        _close(case, got[mask], expected[mask], f"tokens in the order {order.tolist()}")


@promise(ScorerCase)
def check_s6_inputs_are_untouched(case: ScorerCase) -> None:
    """Inputs keep their bits, and scores are on their device, without a graph of their own."""

    @for_all(inputs_for(case.scorer))
    def holds(inputs: Inputs) -> None:
        untouched(case.name, inputs, lambda given: _score(case, given))
        for there in on_devices(inputs):
            expected, got = there.tokens.features.device, _score(case, there).device
            require(got == expected, f"{case.name} moved scores from {expected} to {got}")
        graph = _score(case, inputs).requires_grad
        require(not graph, f"{case.name} returned scores that require a gradient")


@promise(ScorerCase)
def check_s7_reads_only_declared_signals(case: ScorerCase) -> None:
    """Only declared signals are read, and signals that others asked for change nothing."""

    @for_all(inputs_for(case.scorer))
    def holds(inputs: Inputs) -> None:
        reads_only(case.name, case.scorer.signals, inputs, lambda given: _score(case, given))
        ignores_others(case.name, inputs, lambda given: _score(case, given), same_bits)


@promise(ScorerCase)
def check_s8_scores_are_computed_in_float32(case: ScorerCase) -> None:
    """Scores are computed in float32: the model's dtype rounds its numbers, and nothing more."""

    @for_all(inputs_for(case.scorer))
    def holds(inputs: Inputs) -> None:
        mask, same = inputs.tokens.mask, in_float32(inputs)
        got, expected = _score(case, inputs)[mask], _score(case, same)[mask]
        _close(case, got, expected, "the same numbers in half precision and in float32")

    cut: dict[torch.dtype, list[bool]] = {torch.float16: [], torch.bfloat16: []}

    @for_all(_with_digits(case), most=3 * ENOUGH)
    def keeps_digits(inputs: Inputs) -> None:
        scores, mask = _score(case, inputs), inputs.tokens.mask
        far = _score(case, rounded(inputs, torch.float8_e5m2))
        for dtype, same in cut.items():
            if not same_bits(scores[mask], far[mask]):  # else numbers hardly matter to it
                near = _score(case, rounded(inputs, dtype))
                same.append(same_bits(scores[mask], near[mask]))

    for dtype, same in cut.items():
        require(
            len(same) < ENOUGH or not all(same),
            f"{case.name} gives the same scores for numbers rounded to {dtype}, {len(same)} times "
            "of as many: it rounds them itself; compute with .float()",
        )


@promise(ScorerCase)
def check_s9_scores_are_made_where_the_inputs_are(case: ScorerCase) -> None:
    """Tensors are made where the inputs are, and none is brought to the host."""

    @for_all(inputs_for(case.scorer))
    def holds(inputs: Inputs) -> None:
        expected = _score(case, inputs)
        got = works_elsewhere(case.name, lambda: _score(case, inputs))
        require(
            got.device == expected.device and same_bits(got, expected),
            f"{case.name} gives other scores on an accelerator: {got} is not {expected}",
        )


@promise(ScorerCase)
def check_s10_ties_are_decided(case: ScorerCase) -> None:
    """No score hangs on an order that torch leaves open: equal values in an unstable sort."""

    @for_all(inputs_for(case.scorer))
    def holds(inputs: Inputs) -> None:
        expected = _score(case, inputs)
        with AwkwardTies():
            got = _score(case, inputs)
        mask = inputs.tokens.mask
        require(
            same_bits(got[mask], expected[mask]),
            f"{case.name}: ties decide: {got.tolist()} or {expected.tolist()}; sort with "
            "stable=True",
        )


def _with_digits(case: ScorerCase) -> SearchStrategy[Inputs]:
    """Float32 inputs with digits that half precision loses."""

    def drawn_anew(inputs: Inputs) -> Inputs:
        generator = torch.Generator().manual_seed(len(inputs.tensors()))

        def drawn(x: Tensor) -> Tensor:
            return torch.rand(x.shape, generator=generator) / max(x.shape[-1], 1)

        tokens = replace(inputs.tokens, features=drawn(inputs.tokens.features))
        answers = {signal: drawn(answer) for signal, answer in inputs.signals.items()}
        return replace(inputs, tokens=tokens, signals=Signals(answers))

    return inputs_for(case.scorer, dtypes=(torch.float32,)).map(drawn_anew)


@st.composite
def _permutations(draw: st.DrawFn, inputs: SearchStrategy[Inputs]) -> tuple[Inputs, Tensor]:
    drawn = draw(inputs)
    order = draw(st.permutations(range(drawn.tokens.mask.shape[1])))
    return drawn, torch.tensor(order)


def _permuted(case: ScorerCase) -> SearchStrategy[tuple[Inputs, Tensor]]:
    return _permutations(inputs_for(case.scorer))
