# SPDX-License-Identifier: Apache-2.0
"""A user's graph under the names of the model's interface: what is said where an output is not there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from qeff_validate.config.case import Artifacts
from qeff_validate.errors import RunError
from qeff_validate.models.causal_lm.decoder_interface import Interface, decoder_graph
from qeff_validate.models.causal_lm.options import PeftCausalLMOptions
from qeff_validate.runtimes.renamed_session import RenamedSession
from qeff_validate.tensors import TensorSpec


def test_a_decoder_that_gives_chosen_tokens_alone_is_refused_with_the_reason() -> None:
    graph = decoder_graph(Interface(dims=[((2, 8), (2, 8))], vocab=40), {}, PeftCausalLMOptions(), starts=False)
    outputs = (TensorSpec("next_tokens", "int64", ("batch_size", 1, 1)), *graph.outputs[1:])
    session = SimpleNamespace(inputs=graph.inputs, outputs=outputs, shapes=())
    with pytest.raises(RunError, match="logits are what is compared, and tokens that a graph has chosen do not tell"):
        RenamedSession(session, graph, Artifacts())
    complete = SimpleNamespace(inputs=graph.inputs, outputs=graph.outputs, shapes=())
    assert RenamedSession(complete, graph, Artifacts()).outputs == graph.outputs
