# SPDX-License-Identifier: Apache-2.0
"""The relation ``scaled``: a small fraction of an adapter has that fraction of its effect.

Log-probabilities are smooth in the adapter's weights, so for a small fraction s their change is proportional to s in
every model (validation-methods §12.7). This fails if a factor of the adapter is not an input, is quantized away or is
clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qeff_validate.comparison.bounds import Bound
from qeff_validate.comparison.logit_metrics import log_softmax, noise_level
from qeff_validate.comparison.metric import Metric
from qeff_validate.comparison.vector_metrics import Floats
from qeff_validate.comparison.verdict import GateResult, Verdict, verdict_of_gates
from qeff_validate.errors import IncomparableError
from qeff_validate.models.causal_lm.decode_loop import generate
from qeff_validate.models.causal_lm.decoder_feeds import Plan, takes_ids
from qeff_validate.models.causal_lm.options import BASE
from qeff_validate.protocols import ComparisonContext, Session
from qeff_validate.tensors import Array, Tensors

SHARE = 1 / 128
"""Maximum fraction; less for a strong adapter, because the deviation from linearity grows with its square."""

LINEAR = 0.1
"""Accepted relative L2 of the effect of twice the fraction from twice the effect; a lost factor gives 0.5 or more."""

VISIBLE, CLEAR = 20.0, 80.0
"""Required ratio of the effect to the noise of log-probabilities, and the ratio that the fraction is chosen for."""


def compare_scaled_adapter(
    session: Session, inputs: Any, plan: Plan, adapter: Tensors, forced: Sequence[Array], context: ComparisonContext
) -> Verdict:
    """Compare the effects of a fraction of the adapter and of twice that fraction.

    Scaled are the tensors that are all zero in the base (``lora_B`` of LoRA).

    Args:
        session: open.
        inputs: prompts.
        plan: batch size, chunk length and padding.
        adapter: its tensors, or the stack of all, as the graph takes them.
        forced: the continuations of all runs (teacher forcing).
        context: precision.

    Raises:
        IncomparableError: nothing can be scaled, or the effect of a small fraction is lost in rounding.
    """
    base = inputs.adapters[BASE]
    zeros = [name for name, array in base.items() if not array.any() and adapter[name].any()]
    if not zeros:
        raise IncomparableError("no tensor of this adapter is zero in the base, so none carries its scale")

    def run(share: float) -> Floats:
        state = {name: array * np.float32(share) if name in zeros else array for name, array in adapter.items()}
        return log_softmax(np.concatenate(generate(session, inputs.ids, plan, state=state, forced=forced)))

    off = run(0.0)
    state, alone = (adapter, replace(plan, adapter=0)) if takes_ids(session) else (base, plan)
    without = np.concatenate(generate(session, inputs.ids, alone, state=state, forced=forced))
    full = run(1.0) - off
    for logits in (off, without, full):
        if not np.isfinite(logits).all():
            return Verdict("fail", "logits with a share of the adapter are NaN or infinite", planned=len(forced))
    level = noise_level(context.precision)
    if _size(off - log_softmax(without)) > VISIBLE * level:
        raise IncomparableError("this adapter has an effect beyond the tensors that are zero in the base")
    share = float(np.minimum(SHARE, CLEAR * level / _size(full))) if full.any() else SHARE
    if not _size(full) * share >= VISIBLE * level:
        raise IncomparableError(
            f"a share of {share:.3g} of the adapter changes log-probabilities by some {_size(full) * share:.1e}, too"
            f" little beside the noise of {context.precision}, {level:.1e}"
        )
    single, double = run(share) - off, run(2 * share) - off
    differences = np.linalg.norm(double - 2 * single, axis=-1)
    most = float(np.sqrt(np.mean(np.linalg.norm(full, axis=-1) ** 2))) * 2 * share
    steps = [len(text) for text in forced]
    errors = np.array([part.max() for part in np.split(differences, np.cumsum(steps)[:-1])]) / most
    worst = int(np.argmax(errors))
    metric = Metric("adapter.linearity", float(errors[worst]), {"row": worst, "text": inputs.labels[worst]})
    results = [GateResult(metric, Bound(LINEAR, "exact", f"the effect of {share:.3g} of the adapter, doubled"))]
    return verdict_of_gates(results, len(errors))


def _size(change: Floats) -> float:
    return float(np.sqrt(np.mean(change**2)))
