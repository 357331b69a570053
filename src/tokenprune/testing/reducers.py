"""P1 to P19: what every reducer promises, and what follows from it for plans."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from ..budget import Keep
from ..errors import PlanError
from ..plan import Plan
from .cases import ReducerCase
from .generators import budgets, inputs_for, scores_for
from .inputs import Inputs, same_bits
from .probes import (
    AwkwardTies,
    ignores_others,
    on_devices,
    reads_only,
    seeded,
    untouched,
    works_elsewhere,
)
from .promises import for_all, promise, require


def _calls(
    case: ReducerCase, *, min_batch: int = 1, infinite: bool = False
) -> SearchStrategy[tuple[Inputs, int | float]]:
    """Inputs and a budget."""
    inputs = inputs_for(case.reducer, min_batch=min_batch, infinite=infinite)
    return st.tuples(inputs, budgets())


def _kept(plan: Plan, row: int) -> Tensor:
    """`(kept,)` int64 anchors of a row."""
    return plan.anchors[row, plan.mask[row]]


def _weights(plan: Plan, row: int) -> Tensor:
    """`(kept, tokens)` float32 of a row."""
    return plan.dense()[row, plan.mask[row]]


def _near(got: Tensor, expected: Tensor, scale: Tensor | float) -> bool:
    """Equal but for rounding, relative to `scale`; what is not finite must be the same."""
    got, expected = got.double(), expected.double()
    # Below this, float32 has no digits left to compare.
    denormal = 1e-36
    gap = (got - expected).abs() <= torch.as_tensor(scale, dtype=torch.float64) + denormal
    return bool((gap | (got == expected) | (got.isnan() & expected.isnan())).all())


@promise(ReducerCase)
def check_p1_anchors_increase_and_are_real(case: ReducerCase) -> None:
    """Anchors are slots of real tokens, strictly increasing in every row."""

    @for_all(_calls(case, infinite=True))
    def holds(call: tuple[Inputs, int | float]) -> None:
        (inputs, keep), mask = call, call[0].tokens.mask
        try:
            plan = case.plan(inputs, keep)
        except PlanError as error:
            raise AssertionError(f"{case.name}: {error}") from error
        shape = tuple(mask.shape)
        got = (plan.anchors.shape[0], plan.tokens)
        require(got == shape, f"{case.name}: the plan must be for {shape}, got {got}")
        for row in inputs.rows:
            kept = _kept(plan, row)
            inside = bool(((kept >= 0) & (kept < shape[1])).all())
            require(inside, f"{case.name}: no slot of {shape[1]}: {kept.tolist()}")
            ordered = bool((kept[1:] > kept[:-1]).all())
            require(ordered, f"{case.name}: anchors must increase, got {kept.tolist()}")
            padded = kept[~mask[row, kept]].tolist()
            require(not padded, f"{case.name}: row {row} keeps padding at {padded}")


@promise(ReducerCase)
def check_p2_weights_are_shares_of_real_tokens(case: ReducerCase) -> None:
    """Weights are finite, >= 0, never on padding, and every kept token has some of its anchor."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        plan = case.plan(inputs, keep)
        weights = plan.dense()
        sound = bool((weights.isfinite() & (weights >= 0)).all())
        require(sound, f"{case.name}: weights must be finite and >= 0, got {weights.tolist()}")
        for row in inputs.rows:
            on_padding = bool((weights[row][:, ~inputs.tokens.mask[row]] != 0).any())
            require(not on_padding, f"{case.name}: row {row} has weights on padding")
            own = _weights(plan, row).gather(1, _kept(plan, row)[:, None])
            require(bool((own > 0).all()), f"{case.name}: row {row} has an empty group: {weights}")
        require(not bool(weights[~plan.mask].any()), f"{case.name}: a filler has weights")


@promise(ReducerCase)
def check_p3_rows_keep_their_budget(case: ReducerCase) -> None:
    """A row keeps exactly its budget, all it has if that is less, its protected ones if more."""

    @for_all(_calls(case, infinite=True))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        plan, tokens = case.plan(inputs, keep), inputs.tokens
        got = plan.mask.sum(1).tolist()
        expected = [
            max(Keep(keep).count(int(real)), int(protected))
            for real, protected in zip(
                tokens.mask.sum(1), (tokens.protected & tokens.mask).sum(1), strict=True
            )
        ]
        if not case.budgeted:
            require(min(got) >= 1, f"{case.name}: rows keep {got}, none may vanish")
            return
        require(got == expected, f"{case.name}: keep={keep} must leave {expected}, got {got}")
        told = list(plan.lengths)
        require(told == got, f"{case.name}: plan.lengths says {told}, the mask says {got}")


@promise(ReducerCase)
def check_p4_protected_tokens_survive_alone(case: ReducerCase) -> None:
    """Protected tokens are kept, unmerged."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        plan = case.plan(inputs, keep)
        for row in inputs.rows:
            special = (inputs.tokens.protected[row] & inputs.tokens.mask[row]).nonzero().flatten()
            kept, weights = _kept(plan, row), _weights(plan, row)
            for slot in special.tolist():
                where = f"{case.name}: row {row}"
                users = weights[:, slot].nonzero().flatten().tolist()
                require(bool(users), f"{where} lost the protected token {slot}")
                alone = len(users) == 1 and int((weights[users[0]] != 0).sum()) == 1
                own = alone and int(kept[users[0]]) == slot
                require(own, f"{where} merged the protected token {slot}")


@promise(ReducerCase)
def check_p5_keeping_everything_is_identity(case: ReducerCase) -> None:
    """A budget of all tokens or more keeps every real token in its place, bit for bit."""

    @for_all(st.tuples(inputs_for(case.reducer), st.sampled_from((0, 1, 1000, 1.0))))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, more = call
        if not case.budgeted:
            return
        longest = int(inputs.tokens.mask.sum(1).max())
        keep = more if isinstance(more, float) else longest + more
        plan = case.plan(inputs, keep)
        reduced = inputs.tokens.reduce(plan)
        for row in inputs.rows:
            real = inputs.real(row)
            for name in ("features", "patches", "sizes", "protected"):
                got = getattr(reduced, name)[row, reduced.mask[row]]
                expected = getattr(inputs.tokens, name)[row, real]
                require(
                    same_bits(got, expected),
                    f"{case.name}: keep={keep} of {len(real)} changed {name} of row {row}: "
                    f"{got.tolist()} is not {expected.tolist()}",
                )


@promise(ReducerCase)
def check_p6_merging_conserves_sizes(case: ReducerCase) -> None:
    """A merge counts every token once: sizes add up, and so do sizes times features.

    Where protected tokens fill the budget, there is nothing into which the others could merge.
    """

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        plan, tokens = case.plan(inputs, keep), inputs.tokens
        if plan.members is None:
            return
        sizes = tokens.reduce(plan).sizes
        mass = plan(tokens.features.float()).double() * sizes[:, :, None]
        for row in inputs.rows:
            real = inputs.real(row)
            if bool(tokens.protected[row, _kept(plan, row)].all()):
                continue  # the protected tokens fill the budget: there is nothing to merge into
            got, expected = float(sizes[row].sum()), float(tokens.sizes[row, real].sum())
            require(
                abs(got - expected) <= 1e-4 * expected,
                f"{case.name}: row {row} stands for {got} tokens, of {expected}",
            )
            terms = tokens.features[row, real].double() * tokens.sizes[row, real, None]
            same = _near(mass[row].sum(0), terms.sum(0), 1e-4 * terms.abs().sum(0))
            require(
                same,
                f"{case.name}: row {row} is not a mean by sizes: the mass {mass[row].sum(0)} is "
                f"not {terms.sum(0)}",
            )


@promise(ReducerCase)
def check_p7_selections_copy_bits(case: ReducerCase) -> None:
    """A token that is kept unmerged keeps its bits, in every dtype."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        plan = case.plan(inputs, keep)
        features = inputs.tokens.reduce(plan).features
        for row in inputs.rows:
            kept, weights = _kept(plan, row), _weights(plan, row)
            alone = (weights != 0).sum(1) == 1
            got = features[row, plan.mask[row]][alone]
            expected = inputs.tokens.features[row, kept[alone]]
            require(
                same_bits(got, expected),
                f"{case.name}: row {row} keeps {kept[alone].tolist()} unmerged, yet "
                f"{expected.tolist()} became {got.tolist()}",
            )


@promise(ReducerCase)
def check_p8_eviction_keeps_the_highest_scores(case: ReducerCase) -> None:
    """Eviction never keeps a lower score over a higher one; among equals the first one stays."""

    @for_all(_calls(case, infinite=True))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        plan = case.plan(inputs, keep)
        if inputs.scores is None or plan.members is not None:
            return
        for row in inputs.rows:
            kept = set(_kept(plan, row).tolist())
            protected, scores = inputs.tokens.protected[row], inputs.scores[row].tolist()
            rank = {n: (-scores[n], n) for n in inputs.real(row).tolist() if not protected[n]}
            stayed = [n for n in rank if n in kept]
            went = [n for n in rank if n not in kept]
            if stayed and went:
                last, first = max(stayed, key=rank.__getitem__), min(went, key=rank.__getitem__)
                require(
                    rank[last] < rank[first],
                    f"{case.name}: row {row} keeps token {last} with score {scores[last]} and "
                    f"drops token {first} with score {scores[first]}",
                )


@promise(ReducerCase)
def check_p9_row_ignores_batch_and_padding(case: ReducerCase) -> None:
    """A row is reduced in the same way alone, in any batch, and however it is padded."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        together = case.plan(inputs, keep)
        for row in inputs.rows:
            real = inputs.real(row)
            alone = case.plan(inputs.alone(row), keep)
            got, expected = _kept(together, row), real[_kept(alone, 0)]
            require(
                torch.equal(got, expected),
                f"{case.name}: row {row} keeps {got.tolist()} in the batch and "
                f"{expected.tolist()} alone",
            )
            weights = _weights(together, row)[:, real], _weights(alone, 0)
            require(
                torch.allclose(*weights, rtol=1e-4, atol=1e-6),
                f"{case.name}: row {row} merges by {weights[0].tolist()} in the batch and by "
                f"{weights[1].tolist()} alone",
            )


@promise(ReducerCase)
def check_p10_merged_features_lie_among_their_members(case: ReducerCase) -> None:
    """Merged features lie, channel by channel, between the smallest and the largest member."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        plan = case.plan(inputs, keep)
        if plan.members is None:
            return
        features = plan(inputs.tokens.features.float())
        for row in inputs.rows:
            for number, weights in zip(
                plan.mask[row].nonzero().flatten().tolist(), _weights(plan, row), strict=True
            ):
                members = inputs.tokens.features[row, weights != 0].float()
                if not members.numel():
                    raise AssertionError(f"{case.name}: row {row} has a group without members")
                low, high = members.amin(0), members.amax(0)
                slack = 1e-5 * members.abs().amax(0)
                merged = features[row, number]
                require(
                    bool(((merged >= low - slack) & (merged <= high + slack)).all()),
                    f"{case.name}: row {row} merged {members.tolist()} into {merged.tolist()}",
                )


@promise(ReducerCase)
def check_p11_plans_compose(case: ReducerCase) -> None:
    """`plan.then(after)` does in one step what the two plans do one after the other."""

    @for_all(st.tuples(inputs_for(case.reducer), budgets(), budgets()))
    def holds(call: tuple[Inputs, int | float, int | float]) -> None:
        inputs, keep, fewer = call
        first = case.plan(inputs, keep)
        between = Inputs(
            inputs.tokens.reduce(first),
            inputs.signals.reduce(first),
            None if inputs.scores is None else first(inputs.scores),
        )
        second = case.plan(between, fewer)
        both = first.then(second)
        step, once = second(between.tokens.patches), both(inputs.tokens.patches)
        same = torch.equal(step, once) and torch.equal(both.mask, second.mask)
        require(same, f"{case.name}: patches {step.tolist()} in two steps, {once.tolist()} in one")
        features = inputs.tokens.features.float()
        scale = features.abs().masked_fill(~inputs.tokens.mask[:, :, None], 0)
        steps, at_once = second(first(features)), both(features)
        largest = (both.dense() @ scale).amax(1, keepdim=True)
        # Products of weights near float32's smallest number lose their digits.
        lost = 2.0**-149 * scale.shape[1] * scale.double().amax(1, keepdim=True)
        require(
            _near(at_once, steps, 1e-4 * largest + lost),
            f"{case.name}: {steps.tolist()} stepwise, {at_once.tolist()} at once",
        )


@promise(ReducerCase)
def check_p12_selections_are_nested_in_the_budget(case: ReducerCase) -> None:
    """What a selection keeps with a smaller budget, it keeps with every larger one."""

    @for_all(st.tuples(inputs_for(case.reducer), st.integers(1, 9)))
    def holds(call: tuple[Inputs, int]) -> None:
        inputs, keep = call
        fewer, more = case.plan(inputs, keep), case.plan(inputs, keep + 1)
        if fewer.members is not None or more.members is not None:
            return
        for row in inputs.rows:
            small, large = _kept(fewer, row).tolist(), _kept(more, row).tolist()
            require(
                set(small) <= set(large),
                f"{case.name}: row {row} keeps {small} of {keep} and {large} of {keep + 1}",
            )


@promise(ReducerCase)
def check_p13_same_input_gives_same_plan(case: ReducerCase) -> None:
    """The same input gives the same plan; global random generators are neither read nor moved."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        with seeded(1):
            first = case.plan(*call)
        with seeded(2):
            second = case.plan(*call)
        require(_same(first, second), f"{case.name} decided {first} and then {second}")


@promise(ReducerCase)
def check_p14_inputs_are_untouched(case: ReducerCase) -> None:
    """Inputs keep their bits, plans are on their device, and only declared signals are read."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call

        def decide(given: Inputs) -> Plan:
            return case.plan(given, keep)

        reads_only(case.name, case.reducer.signals, inputs, decide)
        untouched(case.name, inputs, decide)
        for there in on_devices(inputs):
            plan, expected = case.plan(there, keep), there.tokens.features.device
            parts = [plan.anchors, plan.mask, *_tensors(plan)]
            got = {part.device for part in parts}
            require(got == {expected}, f"{case.name} moved a plan from {expected} to {got}")
        ignores_others(case.name, inputs, decide, _same)


@promise(ReducerCase)
def check_p15_scores_are_ignored_where_it_says_so(case: ReducerCase) -> None:
    """A reducer that says it ignores scores decides the same with any and without."""

    def scored(inputs: Inputs) -> SearchStrategy[tuple[Inputs, Tensor]]:
        return scores_for(inputs.tokens, infinite=True).map(lambda scores: (inputs, scores))

    @for_all(st.tuples(inputs_for(case.reducer).flatmap(scored), budgets()))
    def holds(call: tuple[tuple[Inputs, Tensor], int | float]) -> None:
        (inputs, scores), keep = call
        if not case.keeping(keep).ignores_scores:
            return
        plain = case.plan(inputs, keep)
        other = case.plan(replace(inputs, scores=scores), keep)
        require(
            _same(plain, other),
            f"{case.name} says that it ignores scores, but {scores.tolist()} changed {plain} to "
            f"{other}",
        )


@promise(ReducerCase)
def check_p16_plans_are_made_where_the_inputs_are(case: ReducerCase) -> None:
    """Tensors are made where the inputs are, and none is brought to the host."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        expected = case.plan(*call)
        got = works_elsewhere(case.name, lambda: case.plan(*call))
        require(_same(got, expected), f"{case.name}: {got} on an accelerator, not {expected}")


@promise(ReducerCase)
def check_p17_ties_are_decided(case: ReducerCase) -> None:
    """No decision hangs on an order that torch leaves open: equal values in an unstable sort."""

    @for_all(_calls(case))
    def holds(call: tuple[Inputs, int | float]) -> None:
        expected = case.plan(*call)
        with AwkwardTies():
            got = case.plan(*call)
        same = torch.equal(got.anchors, expected.anchors) and torch.equal(got.mask, expected.mask)
        require(
            same and torch.allclose(got.dense(), expected.dense(), rtol=1e-5),
            f"{case.name}: ties decide: {_said(got)} or {_said(expected)}; sort with stable=True",
        )


@promise(ReducerCase)
def check_p18_the_budget_is_read(case: ReducerCase) -> None:
    """A reducer with a field `keep` keeps more where it is larger, in rows that have more."""

    @for_all(inputs_for(case.reducer))
    def holds(inputs: Inputs) -> None:
        if not case.budgeted:
            return
        longest, protected = max(inputs.tokens.lengths), inputs.tokens.protected_lengths
        few, all_of_it = case.plan(inputs, 1), case.plan(inputs, longest)
        for row, (real, fixed) in enumerate(zip(inputs.tokens.lengths, protected, strict=True)):
            if real == max(fixed, 1):
                continue
            got = int(few.mask[row].sum()), int(all_of_it.mask[row].sum())
            require(
                got[0] < got[1],
                f"{case.name}: row {row} of {real} tokens keeps {got[0]} with keep=1 and {got[1]} "
                f"with keep={longest}: `keep` is not read",
            )


@promise(ReducerCase)
def check_p19_infinite_scores_are_legal(case: ReducerCase) -> None:
    """Scores of +inf (keep it) and -inf (drop it first) give a sound plan, in every batch."""

    @for_all(_calls(case, infinite=True))
    def holds(call: tuple[Inputs, int | float]) -> None:
        inputs, keep = call
        plan = case.plan(inputs, keep)
        if inputs.scores is None:
            return
        weights = plan.dense()
        sound = bool((weights.isfinite() & (weights >= 0)).all())
        require(
            sound,
            f"{case.name}: scores {inputs.scores.tolist()} give weights {weights.tolist()}",
        )
        for row in inputs.rows:
            alone = case.plan(inputs.alone(row), keep)
            got, expected = _kept(plan, row), inputs.real(row)[_kept(alone, 0)]
            require(
                torch.equal(got, expected),
                f"{case.name}: with scores {inputs.scores[row].tolist()} row {row} keeps "
                f"{got.tolist()} in the batch and {expected.tolist()} alone",
            )


def _said(plan: Plan) -> str:
    """What stays, and of what it is made."""
    kept = plan.anchors.masked_fill(~plan.mask, -1).tolist()
    return f"{kept}" if plan.members is None else f"{kept} of {plan.dense().tolist()}"


def _same(a: Plan, b: Plan) -> bool:
    one, other = _tensors(a), _tensors(b)
    members = len(one) == len(other) and all(map(same_bits, one, other))
    same = torch.equal(a.anchors, b.anchors) and torch.equal(a.mask, b.mask)
    return members and same and a.tokens == b.tokens


def _tensors(plan: Plan) -> list[Tensor]:
    """What a plan says of members."""
    members = plan.members
    if members is None:
        return []
    found = (members.goals, members.shares, members.slots)
    return [each for each in found if each is not None]
