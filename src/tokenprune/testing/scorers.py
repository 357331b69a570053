"""S1 to S7: what every scorer promises."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from .cases import ScorerCase
from .generators import inputs_for
from .inputs import Inputs, same_bits
from .probes import ignores_others, on_devices, reads_only, seeded, untouched
from .promises import for_all, promise, require


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


@st.composite
def _permutations(draw: st.DrawFn, inputs: SearchStrategy[Inputs]) -> tuple[Inputs, Tensor]:
    drawn = draw(inputs)
    order = draw(st.permutations(range(drawn.tokens.mask.shape[1])))
    return drawn, torch.tensor(order)


def _permuted(case: ScorerCase) -> SearchStrategy[tuple[Inputs, Tensor]]:
    return _permutations(inputs_for(case.scorer))
