# SPDX-License-Identifier: Apache-2.0
"""Spares an export work of `torch.onnx.export` whose result is known or thrown away.

Processor time of an export in a process that has exported before, with neither this nor `replace_in_place` and
`decompose_alone`, and with them: a BERT of two layers 1.7 s and 0.9 s, MiniLM 2.6 s and 1.6 s, a Qwen2 of two layers
with DoRA 3.8 s and 1.2 s, SmolLM2-135M 27 s and 18 s (on a busy machine).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from qeff_validate.models.framework_calls import replaced

_registries: dict[int, Any] = {}
"""The exporter's translations of operators by opset: it parses the source of each of them, 0.4 s an export."""


@contextlib.contextmanager
def no_repeated_work() -> Iterator[None]:
    """Within this context exports of one process share their tables, and no node of a graph is computed in vain.

    What a version of torch does not have is left out; an export is then slower, and the same.
    """
    import torch
    from onnx_ir.schemas import OpSignature
    from torch._export.passes import replace_set_grad_with_hop_pass as grad_regions
    from torch.fx import _lazy_graph_module
    from torch.fx.experimental import proxy_tensor
    from torch.onnx._internal.exporter import _registration

    with contextlib.ExitStack() as stack:
        # symbolized stack traces of each node; their paths are of this machine, and no file keeps them
        stack.enter_context(replaced(torch.fx.config, "do_not_emit_stack_traces", True))
        # memory formats of each node's tensor, which no pass of an export reads
        stack.enter_context(replaced(proxy_tensor, "_extract_tensor_metadata", lambda _: None))
        stack.enter_context(replaced(torch.export, "default_decompositions", _default_decompositions()))
        stack.enter_context(_shared_registry(_registration.ONNXRegistry))
        stack.enter_context(_promotion_by_rule())
        # Python code of each graph between two passes, which nothing runs
        stack.enter_context(_lazy_graph_module._use_lazy_graph_module(True))
        stack.enter_context(replaced(OpSignature, "from_op_schema", staticmethod(_signature_by_schema())))
        name = "replace_set_grad_with_hop_pass"
        stack.enter_context(replaced(grad_regions, name, _without_gradient_regions(getattr(grad_regions, name))))
        yield


@functools.cache
def _default_decompositions() -> Any:
    """Return `torch.export.default_decompositions`, with one table for all calls: nobody here changes it."""
    import torch

    return functools.cache(torch.export.default_decompositions)


@functools.cache
def _signature_by_schema() -> Any:
    """Return `onnx_ir.schemas.OpSignature.from_op_schema`, which reads a schema once, not at each node of its kind."""
    from onnx_ir.schemas import OpSignature

    read, signatures = OpSignature.from_op_schema, dict[tuple[str, str, int], Any]()

    def from_op_schema(schema: Any) -> Any:
        key = schema.domain, schema.name, schema.since_version
        if key not in signatures:
            signatures[key] = read(schema)
        return signatures[key]

    return from_op_schema


def _without_gradient_regions(split: Any) -> Any:
    """Return the exporter's pass that makes a region of what runs with gradients on or off, for a graph without them.

    An ONNX file has no gradients. With ``torch.no_grad`` in a model the pass splits its graph into modules and joins
    them again, and ``torch.enable_grad`` around a parameter ends the export with an IndexError.
    """
    import torch

    def split_without_gradients(graph_module: Any, signature: Any) -> Any:
        for node in list(graph_module.graph.nodes):
            if node.target is torch._C._set_grad_enabled:
                graph_module.graph.erase_node(node)
        return split(graph_module, signature)

    return split_without_gradients


@contextlib.contextmanager
def _shared_registry(registry_class: Any) -> Iterator[None]:
    """Make the exporter's registry once; `torch.onnx.export` changes it only for a ``custom_translation_table``."""
    from_torchlib = registry_class.from_torchlib

    def shared(opset_version: int) -> Any:
        if opset_version not in _registries:
            _registries[opset_version] = from_torchlib(opset_version=opset_version)
        return _registries[opset_version]

    with replaced(registry_class, "from_torchlib", staticmethod(shared)):
        yield


@contextlib.contextmanager
def _promotion_by_rule() -> Iterator[None]:
    """Let the exporter's type promotion run only the nodes that it changes: the values of others are known."""
    from torch.onnx._internal.fx.passes import type_promotion

    interpreter = type_promotion._TypePromotionInterpreter
    run = interpreter.run_node

    def run_node(self: Any, node: Any) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run(self, node)
        with self._set_current_node(node):
            rule = type_promotion.get_type_promotion_rule(node, self.type_promotion_table)
            if rule is not None:
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    with replaced(interpreter, "run_node", run_node):
        yield
