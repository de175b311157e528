# SPDX-License-Identifier: Apache-2.0
"""The prechecks, which come before any numeric comparison: were both sides made from the same things?

Most "numeric" bugs are none: another tokenizer, pooling or checkpoint, an older adapter (validation-methods §12.12).
What a case builds itself in a run is the same by the store's keys. A graph or a reference that the user provides says
what it was made from if this library made it: the graph in its metadata, the reference in its file. A precheck differs
only where that is certain. What may be legitimate (a custom pooling, a fused or quantized graph, a config that was
saved again) is unknown and marked suspect: it becomes part of the reason if the numbers do not agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qeff_validate.artifact import Kind
from qeff_validate.builders.provenance import GraphProvenance, read_provenance
from qeff_validate.config.case import Case
from qeff_validate.errors import ValidateError
from qeff_validate.models.row_order import switches
from qeff_validate.models.sources.checkpoint import weight_files
from qeff_validate.prechecks.fingerprint_diff import (
    POOLING_SYNONYMS,
    Fingerprint,
    compare_adapters,
    compare_body,
    compare_pooling_config,
    without_versions,
)
from qeff_validate.prechecks.graph_positions import GraphPositions, graph_positions
from qeff_validate.prechecks.weights_in_graph import WeightMatches, find_weights
from qeff_validate.protocols import Prechecked
from qeff_validate.report.result import Precheck, Result
from qeff_validate.tensors import Tensors

PRECHECKS = ("token ids", "mask", "positions", "pooling", "normalize", "max length", "weights", "adapters")
"""Names of the prechecks, from the session's inputs to the computation."""

GRAPH, REFERENCE = "the graph was exported", "the reference was recorded"

ABOUT = "about"
"""Name of the tensor in a recorded file that holds its provenance as JSON."""

LOCAL_SOURCES = ("package", "path", "random")
"""Kinds of sources that never need a network."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a case's own artifacts tell about how they were made, and how to look into them.

    Attributes:
        graph: provenance of a graph that the case provides; None if the case builds it.
        recorded: provenance of a recorded reference; None if the reference is run.
        local: the source can be read without a network.
        find_weights: looks for the source's weights in the graph; None if that cannot be done.
        find_positions: takes the row of the model's first position, and returns how the graph reads the table of
            positions; None if that cannot be done.
    """

    graph: GraphProvenance | None = None
    recorded: Mapping[str, Any] | None = None
    local: bool = True
    find_weights: Callable[[], WeightMatches] | None = None
    find_positions: Callable[[int], GraphPositions | None] | None = None

    def fingerprints(self) -> list[tuple[str, Fingerprint]]:
        """Return the fingerprint that each artifact was made from, with words that begin a sentence about it."""
        graph = [] if self.graph is None else [(GRAPH, self.graph.model)]
        return graph + ([] if self.recorded is None else [(REFERENCE, self.recorded.get("model"))])


def run_prechecks(
    model: Any, inputs: Any, evidence: Evidence, body_key: Callable[[], Mapping[str, Any]]
) -> tuple[Precheck, ...]:
    """Return all prechecks in order; ``mask`` and ``positions`` are decided in the run (`feed_monitor.FeedMonitor`).

    Args:
        model: a model wrapper; without `protocols.Prechecked` everything is unknown.
        inputs: its inputs.
        evidence: what the case's own artifacts tell.
        body_key: returns what identifies the weights that the case asks for.
    """
    if not isinstance(model, Prechecked):
        reason = "this kind of model does not say what it is made from"
        return tuple(Precheck(name, "unknown", reason) for name in PRECHECKS)
    ours: Any = "the model is not on this host"
    if evidence.local or getattr(getattr(model, "options", None), "pooling", None) not in (None, "auto"):
        ours = value_or_reason(model.settings)
    published = value_or_reason(model.published) if evidence.local else {}
    published = {} if isinstance(published, str) else published
    first = inputs.tables.get("first_position", 0)
    find_positions = evidence.find_positions if "positions" in inputs.tables else None
    positions = None if find_positions is None else value_or_reason(lambda: find_positions(first))
    positions = positions if isinstance(positions, GraphPositions) else None

    def compare_all(name: str, compare: Callable[[str, Fingerprint, Any], Precheck]) -> Precheck:
        return merge(name, (_compare(compare, who, theirs, ours) for who, theirs in evidence.fingerprints()))

    by_name = {
        "token ids": merge("token ids", _tokens(model, inputs, evidence)),
        "positions": _positions(model, inputs, first, positions),
        "max length": _length(model, inputs, evidence.graph, published, positions),
        "weights": _weights(evidence, body_key),
        "adapters": _with_base_models(compare_all("adapters", compare_adapters), model, published),
    }
    for name in ("pooling", "normalize"):
        by_name[name] = _with_published(compare_all(name, partial(compare_pooling_config, name)), ours, published)
    return tuple(by_name.get(name, Precheck(name, "unknown", "nothing was fed")) for name in PRECHECKS)


def collect_evidence(case: Case, kind: Kind, model: Any, recorded: Tensors | None, *, in_memory: bool) -> Evidence:
    """Return the evidence of the artifacts that a case provides for a runtime that opens a kind of artifact.

    Args:
        case: the case.
        kind: of the artifact; a QPC is compiled from the case's ONNX file if it provides one.
        model: the model wrapper.
        recorded: the tensors of the recorded reference; None if it is run.
        in_memory: the model is the caller's own.
    """
    user_artifacts = case.artifacts
    graph, in_graph, positions_in_graph = None, None, None
    if kind == "qpc" and user_artifacts.qpc:
        graph = read_provenance("qpc", Path(user_artifacts.qpc))
    elif kind != "module" and user_artifacts.onnx:
        path = Path(user_artifacts.onnx)
        graph = read_provenance("onnx", path, user_artifacts.inputs.get("input_ids", "input_ids"))

        def in_graph() -> WeightMatches:
            return find_weights(path, weight_files(model.source.path))

        def positions_in_graph(first: int) -> GraphPositions | None:
            ids, mask = (user_artifacts.inputs.get(name, name) for name in ("input_ids", "attention_mask"))
            return graph_positions(path, weight_files(model.source.path), ids, mask, first)

    provenance = None
    if recorded is not None:
        provenance = json.loads(recorded[ABOUT].tobytes()) if ABOUT in recorded else {}
    kind_of_source, _, rest = case.source.partition(":")
    local = in_memory or recorded is None or kind_of_source in LOCAL_SOURCES or Path(rest or case.source).is_dir()
    folder = (
        value_or_reason(lambda: getattr(getattr(model, "source", None), "path", None))
        if local and isinstance(model, Prechecked)
        else None
    )
    has_files = isinstance(folder, Path) and folder.is_dir()
    return Evidence(
        graph, provenance, local, in_graph if has_files else None, positions_in_graph if has_files else None
    )


def value_or_reason(get: Callable[[], Any]) -> Any:
    """Return what a function returns, or, as a string, why it raised."""
    try:
        return get()
    except (ValidateError, ImportError, OSError, ValueError) as exc:
        return f"{type(exc).__name__}: {exc}".splitlines()[0]


def _compare(
    compare: Callable[[str, Fingerprint, Any], Precheck], who: str, theirs: Fingerprint, ours: Any
) -> Precheck:
    """Compare with the metadata of a file, which may have any form; what cannot be read is unknown and suspect."""
    try:
        return compare(who, theirs, ours)
    except (AttributeError, IndexError, KeyError, RecursionError, StopIteration, TypeError, ValueError) as exc:
        return Precheck("", "unknown", f"what {who} from cannot be read: {type(exc).__name__}: {exc}", suspect=True)


def merge(name: str, prechecks: Iterable[Precheck]) -> Precheck:
    """Return one precheck for several artifacts: one that differs, else one that is unknown, else the same."""
    prechecks = list(prechecks)
    if not prechecks:
        return Precheck(name, "same", "made from the case")
    for state in ("differs", "unknown", "same"):
        in_state = [precheck for precheck in prechecks if precheck.state == state]
        if in_state:
            details = "; ".join(dict.fromkeys(precheck.detail for precheck in in_state if precheck.detail))
            suspect = any(precheck.suspect for precheck in in_state)
            return replace(in_state[0], name=name, detail=details, suspect=suspect)
    raise AssertionError


def _with_published(precheck: Precheck, ours: Any, published: Mapping[str, Any]) -> Precheck:
    """Add what the files published with the weights say, if the case decides otherwise."""
    if precheck.name not in published or isinstance(ours, str):
        return precheck
    theirs, asked = published[precheck.name], ours["head"][precheck.name]
    left_out = published.get("left_out") if precheck.name == "pooling" else None
    if left_out:
        text = (
            f"modules.json goes on with {', '.join(left_out)}, which the case's pooling {asked} leaves out: say"
            f" pooling: auto, or leave_out: [{', '.join(dict.fromkeys(left_out))}] if they are not deployed"
        )
        return Precheck(precheck.name, "differs", "; ".join(filter(None, (precheck.detail, text))))
    if POOLING_SYNONYMS.get(theirs, theirs) == POOLING_SYNONYMS.get(asked, asked):
        return precheck
    note = f"sentence-transformers' files say {theirs}, the case asks for {asked}"
    return replace(precheck, detail="; ".join(filter(None, (precheck.detail, note))))


def _tokens(model: Any, inputs: Any, evidence: Evidence) -> list[Precheck]:
    name, vocabulary, prechecks = "token ids", inputs.tables.get("tokens"), list[Precheck]()
    for row, ids in enumerate(inputs.ids):
        if vocabulary is not None and ids.size and not 0 <= ids.min() <= ids.max() < vocabulary:
            wrong = int(ids.max() if ids.max() >= vocabulary else ids.min())
            text = f"row {row} ({inputs.texts[row][:40]!r}) has the id {wrong}, the model embeds 0 to {vocabulary - 1}"
            prechecks.append(Precheck(name, "differs", f"{text}: is it the model's own tokenizer?"))
            break
    if evidence.recorded is not None:
        tokens = _valid(evidence.recorded.get("tokens"))
        prechecks.append(_recorded_tokens(model, inputs, tokens, local=evidence.local))
    elif vocabulary is None and not prechecks:
        prechecks.append(Precheck(name, "same", "made from the case; how many the model embeds is not known"))
    return prechecks


def _valid(tokens: Any) -> Any:
    """Return the provenance of recorded token ids; None if it lacks ``asked`` or ``tokenizer``."""
    valid = isinstance(tokens, Mapping) and all(isinstance(tokens.get(key), Mapping) for key in ("asked", "tokenizer"))
    return tokens if valid else None


def _recorded_tokens(model: Any, inputs: Any, recorded: Any, *, local: bool) -> Precheck:
    """Compare recorded inputs with what the case would tokenize: by their provenance, else row by row."""
    name, asked = "token ids", value_or_reason(model.asked)
    if isinstance(asked, str):
        return Precheck(name, "unknown", f"what the case would tokenize is not known here: {asked}")
    if not local:
        if recorded and _words(recorded["asked"]) != _words(as_json(asked)):
            return Precheck(name, "differs", "the reference was recorded for other texts than the case's")
        return Precheck(name, "unknown", "the tokenizer is not on this host")
    tokenizer = value_or_reason(model.tokenizer_key)
    same_texts = recorded and recorded["asked"] == as_json(asked)
    if same_texts and without_versions(recorded["tokenizer"]) == without_versions(tokenizer):
        return Precheck(name, "same")
    rows = value_or_reason(model.rows)
    if isinstance(rows, str):
        reason = f"cannot tokenize here what the case asks for: {rows}"
        return Precheck(name, "unknown", reason, suspect=recorded is not None)
    if rows.pad != inputs.pad:
        return Precheck(name, "differs", f"padding is {inputs.pad} in the recorded file, {rows.pad} by the case")
    if len(rows.ids) != len(inputs.ids):
        text = f"the recorded file has {len(inputs.ids)} rows, the case makes {len(rows.ids)}"
        return Precheck(name, "differs", text)
    for row, (theirs, ours) in enumerate(zip(inputs.ids, rows.ids, strict=True)):
        if theirs.tolist() != ours.tolist():
            text = f"row {row} is {theirs.tolist()[:8]} ({inputs.texts[row][:40]!r}) in the recorded file,"
            return Precheck(name, "differs", f"{text} {ours.tolist()[:8]} ({rows.texts[row][:40]!r}) by the case")
    return Precheck(name, "same")


def _words(asked: Mapping[str, Any]) -> list[list[str]] | None:
    texts = asked.get("texts")
    if not isinstance(texts, list):
        return None
    return [f"{asked.get('prompt', '')}{text}".split() for text in texts]


def as_json(value: Any) -> Any:
    """Return plain data after a round trip through JSON."""
    return json.loads(json.dumps(value))


def _with_base_models(precheck: Precheck, model: Any, published: Mapping[str, Any]) -> Precheck:
    """Add the base model that an adapter names, unless the last part of its name is in the case's source.

    That is suspect, not certain: a copy may have another name.
    """
    kind, _, source = getattr(getattr(model, "case", None), "source", "").partition(":")
    if kind in ("random", "tiny") or precheck.state == "differs":
        return precheck
    notes = [
        f"adapter {name!r} was trained on {base!r} by its adapter_config.json, the case's source is {source or kind!r}"
        for name, base in published.get("bases", {}).items()
        if isinstance(base, str) and base and Path(base).name.lower() not in (source or kind).lower()
    ]
    if not notes:
        return precheck
    return replace(precheck, detail="; ".join(filter(None, (precheck.detail, *notes))), suspect=True)


def _positions(model: Any, inputs: Any, first: int, in_graph: GraphPositions | None) -> Precheck:
    """Compare where positions begin, and suspect rotary frequencies that change with the length of a text.

    The positions that are fed are compared later, in the run.
    """
    reach = model.reach(inputs)
    for kind, switch in switches(inputs.tables).items():
        if reach > switch:
            text = (
                f"rope_type {kind!r} changes its frequencies beyond {switch} positions, and the case reaches {reach}:"
                " what a row gives depends on the length that it is run at"
            )
            return Precheck("positions", "unknown", text, suspect=True)
    if in_graph is None or in_graph.begins == first:
        return Precheck("positions", "unknown", "nothing was fed")
    why = " (RoBERTa, XLM-R, MPNet and others begin behind the padding token's row)" if first else ""
    row = in_graph.begins
    text = f"the graph gives the first token row {row} of the table of positions, the model row {first}{why}"
    return Precheck("positions", "differs", text)


def _length(
    model: Any,
    inputs: Any,
    graph: GraphProvenance | None,
    published: Mapping[str, Any],
    in_graph: GraphPositions | None,
) -> Precheck:
    name, reach, longest = "max length", model.reach(inputs), max(ids.size for ids in inputs.ids)
    positions = inputs.tables.get("positions")
    first = inputs.tables.get("first_position", 0)
    if positions is not None and reach > positions - first:
        text = f"the case asks for {reach} tokens, the model has positions for {positions - first}"
        rows = f" (a table of {positions} rows, in which the first token has row {first})" if first else ""
        return Precheck(name, "differs", f"{text}{rows}")
    capacity = None if in_graph is None else in_graph.rows - in_graph.begins
    if capacity is not None and longest > capacity:
        text = f"the graph's table of positions serves {capacity} tokens, the longest row has {longest}"
        return Precheck(name, "differs", text)
    if graph is not None and graph.max_tokens is not None and longest > graph.max_tokens:
        return Precheck(name, "differs", f"the graph takes {graph.max_tokens} tokens, the longest row has {longest}")
    if graph is not None and graph.max_positions is not None and reach > graph.max_positions:
        return Precheck(
            name, "differs", f"the graph keeps {graph.max_positions} positions, the longest text needs {reach}"
        )
    if graph is not None and graph.max_tokens is not None and graph.max_tokens < reach:
        return Precheck(
            name, "unknown", f"the graph takes {graph.max_tokens} tokens, the case asks for {reach}; no row is longer"
        )
    limits = {
        "sentence-transformers' files cut": published.get("max_seq_length"),
        "the tokenizer cuts": published.get("model_max_length"),
    }
    notes = [f"{who} at {limit}, the case asks for {reach}" for who, limit in limits.items() if limit and reach > limit]
    return Precheck(name, "same", "; ".join(notes))


def _weights(evidence: Evidence, body_key: Callable[[], Mapping[str, Any]]) -> Precheck:
    fingerprints, prechecks = evidence.fingerprints(), []
    ours: Any = "the model is not on this host"
    if fingerprints and evidence.local:
        ours = value_or_reason(body_key)
    for who, theirs in fingerprints:
        precheck = _compare(compare_body, who, theirs, ours)
        if who == GRAPH and precheck.state == "unknown" and evidence.find_weights is not None:
            matches = value_or_reason(evidence.find_weights)
            precheck = _by_matches(precheck, matches, exported_here=theirs is not None)
        if who == GRAPH and evidence.graph is not None and evidence.graph.contrib and precheck.state != "differs":
            contrib = f"the graph has contrib operators: {evidence.graph.contrib}"
            detail = "; ".join(filter(None, (precheck.detail, contrib)))
            precheck = Precheck(precheck.name, "unknown", detail, suspect=True)
        prechecks.append(precheck)
    return merge("weights", prechecks)


def _by_matches(precheck: Precheck, matches: WeightMatches | str, *, exported_here: bool) -> Precheck:
    """Decide by the weights that are in the graph; one that we did not export may be fused or quantized."""
    if isinstance(matches, str) or not matches.searched:
        return precheck
    counts = f"{matches.identical} of the model's {matches.searched} largest matrices are in the graph, bit for bit"
    if matches.identical == matches.searched:
        return Precheck(precheck.name, "same", counts)
    if exported_here and matches.identical == 0 and matches.same_shape == matches.searched:
        return Precheck(precheck.name, "differs", f"{precheck.detail}; none of its largest matrices is the model's")
    return Precheck(precheck.name, "unknown", counts, suspect=matches.same_shape > 0)


def with_prechecks(result: Result) -> Result:
    """Return a result that its prechecks are applied to.

    A precheck that differs makes it fail, with the numbers in the reason; suspects are added to the reason of a result
    that does not pass.
    """
    differing = [f"{precheck.name}: {precheck.detail}" for precheck in result.prechecks if precheck.state == "differs"]
    if differing:
        numbers = result.reason or "within their bounds all the same"
        reason = f"{'; '.join(differing)}. The numbers: {numbers}"
        return replace(result, status="fail", stage="precheck", reason=reason)
    suspects = [f"{precheck.name}: {precheck.detail}" for precheck in result.prechecks if precheck.suspect]
    if suspects and result.status not in ("pass", "not_run"):
        return replace(result, reason=f"{result.reason}. Before looking further: {'; '.join(suspects)}")
    return result


def with_feed_prechecks(prechecks: Sequence[Precheck], observed: Iterable[Precheck]) -> tuple[Precheck, ...]:
    """Return prechecks with those that were observed in the run; a suspicion stays unless the observation differs."""
    by_name = {precheck.name: precheck for precheck in observed}

    def latest(precheck: Precheck) -> Precheck:
        observation = by_name.get(precheck.name, precheck)
        stays = precheck.state == "differs" or (precheck.suspect and observation.state != "differs")
        return precheck if stays else observation

    return tuple(map(latest, prechecks))
