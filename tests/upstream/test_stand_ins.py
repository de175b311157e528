# SPDX-License-Identifier: Apache-2.0
"""QEfficient's defects, each by its stand-in: status and reason of our verdict. Without the defect all must pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest
from upstream.bench import LORA, Bench, adapters, embedding, mixed
from upstream.stand_ins import DEFECTS, Defect, rows

from qeff_validate.config.case import Case
from qeff_validate.engine import Runner

WORDS: Mapping[str, Sequence[str]] = {
    "the export for another pooling is served": ["output.rel_l2", "worst row"],
    "the export of other weights is served": ["output.rel_l2", "worst row"],
    "PEFT: the export of another base model is served": ["rows fail; first divergent token: base: 'a river' at step 0"],
    "finite LoRA: the export with other adapters is served": ["adapter 'a'", "with a, b only"],
    "after another compilation the old session answers": ["output.rel_l2", "(floor)"],
    "`avg` pools every row from row 0": ["output.rel_l2", "worst row"],
    "`max` writes -1e9 into its input, and returns it": ["output.tokenless_rows 64, allowed 0 (exact)"],
    "`mean` divides by max(count, 1e-9): 0 in fp16": ["are NaN or infinite in 1 of", "a row without a token"],
    "longer than every bucket: cut without a word": ["output.rel_l2", "worst row"],
    "equal adapter inputs are made one: 6 of 8 are left": ["layers.1.self_attn.q_proj.lora_B.weight' is missing"],
    "uneven batch, chunked prefill: first tokens from the last chunk": ["first tokens only", "only prompts of up to"],
    "rsLoRA scaled by alpha / r": ["adapter 'a' acts 0.53 times as strongly", "alpha / √r with rsLoRA"],
    "alpha_pattern ignored": ["adapter 'a'", "with a, b only"],
    "DoRA's magnitudes ignored": ["adapter 'a'", "with a, b only"],
    "the adapter of prompt 0 serves the whole batch": ["some prompts with 'base' give the outputs of 'a'"],
}
"""Texts that the reason of a defect must contain."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(Runner().pipeline, tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_stand_in_gets_its_verdict(defect: Defect, bench: Bench) -> None:
    result = defect.stand_in(bench)
    assert result.status == defect.expected, f"{result.status} {result.reason}"
    assert result.reason or defect.remark
    for text in WORDS.get(defect.name, ()):
        assert text in result.reason, f"{text!r} is not in {result.reason!r}"


def with_own_export(case: Callable[..., Case]) -> Callable[[Bench], Case]:
    """Return a case that provides the same file that it would export."""
    return lambda bench: case(onnx=bench.exported(case()))


HEALTHY: Mapping[str, tuple[Callable[[Bench], Case], str]] = {
    **{
        pooling: (with_own_export(lambda pooling=pooling, **artifacts: embedding(pooling, **artifacts)), "ort")
        for pooling in ("mean", "cls", "avg", "max")
    },
    "other weights": (with_own_export(lambda **artifacts: embedding(seed=1, **artifacts)), "ort"),
    "mean in fp16": (lambda _: embedding(), "sim"),
    "adapters": (with_own_export(adapters), "ort"),
    "another base": (lambda _: adapters(seed=1), "torch"),
    "left padding": (lambda _: adapters(padding_side="left"), "ort"),
    "rsLoRA": (lambda _: adapters(method="rslora"), "torch"),
    "alpha_pattern": (lambda _: adapters(peft={**LORA, "alpha_pattern": {"v_proj": 24}}), "torch"),
    "DoRA": (lambda _: adapters(method="dora"), "torch"),
    "mixed": (lambda _: mixed(), "torch"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_the_same_without_the_defect_passes(name: str, bench: Bench) -> None:
    case, runtime = HEALTHY[name]
    result = bench.result(case(bench), name=runtime)
    assert result.status == "pass", result.reason


def test_rows_are_one_for_each_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    some = [defect for defect in DEFECTS if "bucket" in defect.name]
    monkeypatch.setattr("upstream.stand_ins.DEFECTS", some)
    cut, fit = rows(Runner().pipeline)
    assert cut[:3] == ("longer than every bucket: cut without a word", "2.1", "fail")
    assert cut[3].startswith("output.rel_l2 ")
    assert len(cut[3]) == 160
    assert fit[1:] == ("2.1", "pass", some[1].remark)
    assert len({defect.name for defect in DEFECTS}) == len(DEFECTS)
