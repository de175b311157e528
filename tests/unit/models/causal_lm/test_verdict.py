# SPDX-License-Identifier: Apache-2.0
"""The verdict on continuations and what it says of a fault, on drawn logits of two adapters and three prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from floors import made_floor

from qeff_validate.comparison.logit_metrics import ERRORS, Text
from qeff_validate.comparison.noise_floor import Floor
from qeff_validate.comparison.verdict import Verdict
from qeff_validate.models.causal_lm.failure_hints import describe_rows
from qeff_validate.models.causal_lm.verdict import judge_continuations
from qeff_validate.protocols import ComparisonContext

NAMES, LENGTHS, STEPS, VOCAB = ("base", "a", "b"), (3, 9, 5), (2, 3, 1), 40
ROWS = sum(STEPS)
INPUTS = SimpleNamespace(
    labels=("p", "q", "r"), ids=tuple(np.zeros(length, np.int64) for length in LENGTHS), eos=frozenset({1})
)
WIDE = {"kl_p99": 0.09, "kl_max": 0.9, **dict.fromkeys(ERRORS, 4.9), "why": "a test"}

Rows = dict[str, np.ndarray]


def reference(effect: float = 0.3, names: Sequence[str] = NAMES, **alike: str) -> Rows:
    """Return logits in which each adapter adds noise of its own, or another's, to the base."""
    base = 3 * np.random.default_rng(0).standard_normal((ROWS, VOCAB))
    base[np.arange(ROWS), base.argmax(axis=1)] += 3  # far from any tie
    parts = [base]
    for name in names[1:]:
        seed = names.index(alike.get(name, name))
        parts.append(base + effect * np.random.default_rng(seed).standard_normal(base.shape))
    rows = np.concatenate(parts).astype(np.float32)
    return {"logits": rows, "tokens": rows.argmax(axis=1), "steps": np.array(STEPS * len(names))}


def actual(wanted: Rows, change: Callable[[Rows], Any] = lambda _: None, names: Sequence[str] = NAMES) -> Rows:
    found = {"logits": wanted["logits"].copy()}
    found["again"] = found["logits"][: ROWS * min(2, len(names))].copy()
    change(found)
    return found


def judge(wanted: Rows, found: Rows, precision: str = "fp16", names: Sequence[str] = NAMES, **more: Any) -> Verdict:
    context = ComparisonContext(precision, more.get("override", {}), 0, more.get("floor"), more.get("device", False))
    return judge_continuations(wanted, found, context, adapters=list(names), inputs=INPUTS)


def floor(strayed: float = 1e-3, delta_cosine: float = 1e-3, delta_norm: float = 0.01, **more: float) -> Floor:
    """Return measured noise with which an adapter of effect 0.3 is told from the base."""
    errors = {"kl_p99": 1e-4, "kl_max": 1e-3, **dict.fromkeys(ERRORS, 0.05), **more}
    for name in NAMES[1:]:
        errors |= {f"{name}.delta_cosine": delta_cosine, f"{name}.delta_norm": delta_norm, f"{name}.strayed": strayed}
    center = {"logits": reference()["logits"]}
    return made_floor(errors, systematic_errors={"mean_signed": 1e-3, "mean_norm": 1e-4}, center=center)


def failed(verdict: Verdict) -> set[str]:
    return {item.metric.name for item in verdict.metrics if not item.passed}


def of(name: str) -> slice:
    return slice(NAMES.index(name) * ROWS, (NAMES.index(name) + 1) * ROWS)


def halved(found: Rows) -> None:
    """Let each adapter act half as strongly, in all visits."""
    base = found["logits"][of("base")]
    for name in ("a", "b"):
        found["logits"][of(name)] = base + 0.5 * (found["logits"][of(name)] - base)
    found["again"][:] = found["logits"][: 2 * ROWS]


@pytest.mark.parametrize("names", [NAMES, NAMES[:2], NAMES[:1]], ids=len)
def test_equal_logits_pass_with_every_row_compared_twice_where_it_was_visited_twice(names: Sequence[str]) -> None:
    wanted = reference(names=names)
    verdict = judge(wanted, actual(wanted, names=names), names=names)
    assert (verdict.status, verdict.reason) == ("pass", "")
    assert verdict.planned == verdict.compared == ROWS * (len(names) + min(2, len(names)))


def test_the_adapters_change_alone_sees_what_widened_bounds_of_logits_let_through() -> None:
    wanted = reference()
    verdict = judge(wanted, actual(wanted, halved), override=WIDE)
    assert failed(verdict) == {"adapter.a.delta_norm", "adapter.b.delta_norm"}, verdict.reason
    turned = actual(wanted)
    noise = np.random.default_rng(9).standard_normal((ROWS, VOCAB))
    for name in ("a", "b"):
        turned["logits"][of(name)] += (0.06 * noise).astype(np.float32)
    turned["again"][:] = turned["logits"][: 2 * ROWS]
    assert failed(judge(wanted, turned, override=WIDE)) == {"adapter.a.delta_cosine", "adapter.b.delta_cosine"}


def test_strength_of_an_adapter_is_told_as_a_number() -> None:
    wanted = reference(effect=1.0)
    reason = judge(wanted, actual(wanted, halved)).reason
    for name in ("a", "b"):
        assert f"adapter {name!r} acts 0.5 times as strongly as in the reference (cosine 1)" in reason


def swapped(found: Rows) -> None:
    a = found["logits"][of("a")].copy()
    found["logits"][of("a")], found["logits"][of("b")] = found["logits"][of("b")], a
    found["again"][ROWS:] = found["logits"][of("a")]


def served(name: str, other: str) -> Callable[[Rows], None]:
    def change(found: Rows) -> None:
        found["logits"][of(name)] = found["logits"][of(other)]
        found["again"][:] = found["logits"][: 2 * ROWS]

    return change


def again(row: int, value: Any) -> Callable[[Rows], None]:
    def change(found: Rows) -> None:
        found["again"][row] = value if not callable(value) else value(found)

    return change


FAULTS: Mapping[str, tuple[Callable[[Rows], Any], Sequence[str]]] = {
    "swapped": (swapped, ["adapter 'a' gives the outputs of 'b'", "adapter 'b' gives the outputs of 'a'", "with a, b"]),
    "base for b": (served("b", "base"), ["adapter 'b' behaves as base", "6 of 18 rows fail, with b only"]),
    "a for base": (served("base", "a"), ["base gives the outputs of adapter 'a'", "with base only"]),
    "b stays": (
        again(slice(0, ROWS), lambda found: found["logits"][of("b")]),
        ["the second visit to base gives the outputs of 'b': an adapter stays on", "revisit 6"],
    ),
    "one bit": (
        again((8, 3), lambda found: np.nextafter(found["logits"][8, 3], np.float32(99))),
        ["the second visit to a differs from the first by up to ", "base last, is still seen", "revisit 1, allowed 0"],
    ),
    "NaN in a second visit": (
        again((0, 0), np.nan),
        ["second visit to base differs from the first by up to nan: what came between, b last, is"],
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_fails_and_is_named_and_the_others_are_not(name: str) -> None:
    change, words = FAULTS[name]
    wanted = reference()
    verdict = judge(wanted, actual(wanted, change))
    assert verdict.status == "fail"
    assert [text for text in words if text not in verdict.reason] == [], verdict.reason
    explanations = {other for other, (_, texts) in FAULTS.items() if texts[0] in verdict.reason}
    assert explanations == {name}


def test_reason_begins_with_what_is_likely_and_names_every_gate_that_failed() -> None:
    wanted = reference()
    verdict = judge(wanted, actual(wanted, served("a", "b")))
    assert verdict.reason.startswith("adapter 'a' gives the outputs of 'b'; 6 of 18 rows fail, with a only; ")
    assert [name for name in failed(verdict) if name not in verdict.reason] == []
    assert verdict.reason.count("allowed") == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.update(logits=found["logits"][:-2]), "logits have 16 rows, wanted 18: a cont"),
        (lambda found: found.update(again=found["again"][:-1]), "second visits have 11 rows, wanted 12: a cont"),
        (lambda found: found.update(logits=np.pad(found["logits"], ((0, 1), (0, 0)))), "went on behind its end"),
        (lambda found: found.update(logits=found["logits"][:, 1:]), "has shape [18, 39], the reference [18, 40]"),
        (lambda found: found.update(logits=found["logits"].astype(float)), "has dtype float64, the reference float32"),
    ],
    ids=["fewer rows", "fewer second visits", "more rows", "fewer columns", "another dtype"],
)  # fmt: skip
def test_other_rows_columns_or_dtypes_fail_before_any_number(change: Callable[[Rows], Any], words: str) -> None:
    wanted = reference()
    verdict = judge(wanted, actual(wanted, change))
    assert (verdict.status, verdict.compared, words in verdict.reason) == ("fail", 0, True), verdict.reason


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_fails_with_its_place(bad: float) -> None:
    wanted = reference()
    found = actual(wanted)
    found["logits"][of("b")][1, 7] = bad
    verdict = judge(wanted, found)
    assert verdict.status == "fail"
    for words in ("first at row 13, column 7", "1 of 18 rows fail, with b only, no first token, so decode steps only"):
        assert words in verdict.reason


INCONCLUSIVE: Mapping[str, tuple[Rows, dict[str, Any], str]] = {
    "no bounds": (reference(), {"precision": "mxfp6"}, "no sound bound for kl_p99, "),
    "a weak adapter": (reference(effect=0.01), {}, "adapter 'a' changes log-probabilities by 9.3e-03, 1.0 times"),
    "a weak adapter beside measured noise": (
        reference(effect=0.1), {"floor": floor(strayed=0.03)}, "9.3e-02, 3.1 times the noise of fp16, and 5 are needed",
    ),
    "equal adapters beside measured noise": (
        reference(b="a"), {"floor": floor()}, "adapters 'a' and 'b' say the same, so a swap would not be seen",
    ),
    "noise that hides the direction of a change": (
        reference(), {"floor": floor(delta_cosine=0.2)}, "adapter 'a': noise in fp16 hides delta of cosine of its",
    ),
    "a floor that is no number": (reference(), {"floor": floor(kl_max=np.nan)}, "the original model itself gives NaN"),
    "equal adapters": (reference(b="a"), {}, "adapters 'a' and 'b' say the same, so a swap would not be seen"),
}  # fmt: skip


@pytest.mark.parametrize("name", INCONCLUSIVE)
def test_what_cannot_be_told_is_inconclusive(name: str) -> None:
    wanted, options, words = INCONCLUSIVE[name]
    verdict = judge(wanted, actual(wanted), **options)
    assert (verdict.status, words in verdict.reason) == ("inconclusive", True), verdict.reason


def test_reference_that_is_not_finite_is_inconclusive_and_a_failure_beside_a_weak_adapter_is_one() -> None:
    wanted = reference()
    wanted["logits"][4, 4] = np.inf
    found = actual(wanted)
    found["logits"][4, 4] = found["again"][4, 4] = 1.0
    verdict = judge(wanted, found)
    explanations = "the reference itself holds NaN or infinity in 1 of 18 rows of logits: row 4 (\"base: 'q' +2\")"
    assert (verdict.status, verdict.reason) == ("inconclusive", explanations)
    assert verdict.compared == verdict.planned - 2, "the row was visited twice"
    weak = reference(effect=0.01)
    verdict = judge(weak, actual(weak, again((0, 0), 5.0)))
    assert verdict.status == "fail"
    assert "is it trained?" in verdict.reason


def test_adapter_without_any_effect_that_fails_all_the_same_is_no_crash() -> None:
    wanted = reference(effect=0.0)
    verdict = judge(wanted, actual(wanted, lambda found: found["logits"].__setitem__((of("b"), 3), 9.0)))
    assert verdict.status == "fail"
    assert "6 of 18 rows fail, with b only" in verdict.reason


def test_equal_logits_pass_beside_measured_noise_with_systematic_gates_on_a_device_alone() -> None:
    wanted = reference()
    for device in (False, True):
        verdict = judge(wanted, actual(wanted), floor=floor(delta_cosine=1e-4), device=device)
        assert (verdict.status, verdict.reason) == ("pass", "")
        gates = {item.metric.name for item in verdict.metrics if item.bound}
        assert ({"logits.mean_signed", "logits.mean_norm"} <= gates) == device
        change = next(item for item in verdict.metrics if item.metric.name == "adapter.a.delta_norm")
        assert change.bound is not None
        assert (change.bound.source, change.bound.value) == ("floor", pytest.approx(0.02))


def test_size_of_a_change_may_err_by_a_quarter_of_what_its_direction_may_though_no_run_did() -> None:
    wanted = reference()
    verdict = judge(wanted, actual(wanted), floor=floor(delta_cosine=1e-4, delta_norm=1e-7))
    bounds = {item.metric.name: item.bound for item in verdict.metrics}
    size, direction = bounds["adapter.a.delta_norm"], bounds["adapter.a.delta_cosine"]
    assert size is not None
    assert direction is not None
    assert direction.value == pytest.approx(4e-4)
    assert size.value == pytest.approx(0.25 * (2 * 4e-4) ** 0.5)
    assert size.why == "0.25 x 0.028, the error across the change that is allowed"


@pytest.mark.parametrize(
    ("change", "gate"),
    [
        (lambda logits: logits * 1.002, "logits.mean_norm"),
        (lambda logits: logits + 0.04 * np.eye(VOCAB)[11], "logits.mean_signed"),
    ],
    ids=["scaled", "one token"],
)
def test_an_error_that_all_rows_have_fails_on_a_device_alone(change: Callable[..., Any], gate: str) -> None:
    wanted = reference()

    def altered(found: Rows) -> None:
        found["logits"][:] = change(found["logits"])
        found["again"][:] = found["logits"][: 2 * ROWS]

    assert judge(wanted, actual(wanted, altered), floor=floor()).status == "pass"
    assert failed(judge(wanted, actual(wanted, altered), floor=floor(), device=True)) == {gate}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_hide_no_other_row_and_no_other_adapter(bad: float) -> None:
    """The prompt with the bad row is left out of what adapters change; one that is half as strong is still named."""
    wanted = reference()
    found = actual(wanted, halved)
    found["logits"][of("base")][0, 7] = bad
    found["again"][0] = found["logits"][0]
    verdict = judge(wanted, found)
    assert (verdict.status, verdict.compared) == ("fail", verdict.planned)
    assert "adapter 'b' acts 0.5 times as strongly as in the reference (cosine 1)" in verdict.reason
    assert {"logits.non_finite", "adapter.a.delta_norm", "logits.all_error"} <= failed(verdict)
    assert "revisit" not in failed(verdict), "both visits gave the same"
    shown = {item.metric.name: item.metric.value for item in verdict.metrics}
    assert np.isfinite([value for name, value in shown.items() if name != "logits.non_finite"]).all()


def test_logits_that_are_all_nan_fail_and_nothing_else_is_measured() -> None:
    wanted = reference()
    found = actual(wanted, lambda rows: [array.fill(np.nan) for array in rows.values()])
    verdict = judge(wanted, found)
    assert (verdict.status, failed(verdict)) == ("fail", {"logits.non_finite"})
    assert verdict.reason.startswith("18 of 18 rows fail; logits: 720 of 720 values are NaN or infinite in 18 of 18")


@pytest.mark.parametrize("size", [1e-3, 3e-3])
def test_a_change_in_the_right_direction_is_never_called_another_one(size: float) -> None:
    """A small error beside an adapter's effect: the cosine is next to 1, so the adapter does what it should."""
    wanted = reference()
    noise = np.random.default_rng(9).standard_normal((ROWS, VOCAB))

    def altered(found: Rows) -> None:
        for name in ("a", "b"):
            found["logits"][of(name)] += (size * noise).astype(np.float32)
        found["again"][:] = found["logits"][: 2 * ROWS]

    verdict = judge(wanted, actual(wanted, altered), precision="fp32")
    assert verdict.status == "fail"
    assert "adapter 'a' changes what it should, as strongly as in the reference (cosine " in verdict.reason
    assert "other things" not in verdict.reason


def test_a_change_in_another_direction_is_called_so() -> None:
    wanted = reference()
    noise = np.random.default_rng(9).standard_normal((ROWS, VOCAB))

    def altered(found: Rows) -> None:
        found["logits"][of("a")] += (0.15 * noise).astype(np.float32)
        found["again"][:] = found["logits"][: 2 * ROWS]

    assert (
        "adapter 'a' changes other things than in the reference (cosine 0.8"
        in judge(wanted, actual(wanted, altered), precision="fp32").reason
    )


# --- which rows --------------------------------------------------------------------------------------

# adapter, prompt, step of each row; prompts have 3, 9 and 5 tokens and 2, 3 and 1 steps
PLACES = [(at, prompt, step) for at in NAMES for prompt in range(3) for step in range(STEPS[prompt])]
TEXTS = [
    Text(f"{at}: {prompt}", range(start, start + STEPS[prompt]))
    for at, first in zip(NAMES, range(0, 18, 6), strict=True)
    for prompt, start in enumerate((first, first + 2, first + 5))
]


@pytest.mark.parametrize(
    ("hit", "wanted"),
    [
        (lambda *_: False, ""),
        (lambda *_: True, "18 of 18 rows fail"),
        (lambda at, *_: at != "base", "12 of 18 rows fail, with a, b only"),
        (lambda at, prompt, step: step == 0, "9 of 18 rows fail, first tokens only, which the prefill gives"),
        (lambda at, prompt, step: step > 0,
         "9 of 18 rows fail, no first token, so decode steps only, only prompts 1, 2 of 3"),
        (lambda at, prompt, step: LENGTHS[prompt] + step >= 5,
         "12 of 18 rows fail, only where 5 tokens or more are read"),
        (lambda at, prompt, step: prompt == 1 and step < 2, "6 of 18 rows fail, only prompts of 9 tokens and more"),
        (lambda at, prompt, step: prompt == 0, "6 of 18 rows fail, only prompts of up to 3 tokens"),
        (lambda at, prompt, step: prompt == 2, "3 of 18 rows fail, first tokens only, which the prefill gives, only"
         " prompts 3 of 3"),
        (lambda at, prompt, step: at == "b" and prompt == 1 and step == 2,
         "1 of 18 rows fail, with b only, no first token, so decode steps only, only prompts of 9 tokens and more"),
    ],
)  # fmt: skip
def test_rows_that_fail_are_told_by_what_sets_them_apart(hit: Callable[..., bool], wanted: str) -> None:
    bad = np.array([hit(*place) for place in PLACES])
    assert describe_rows(bad, TEXTS, NAMES, LENGTHS) == wanted
