# SPDX-License-Identifier: Apache-2.0
"""The ladder that is climbed before any number: were both sides of a comparison made from the same things?

Most "numeric" bugs are none: another tokenizer, pooling or checkpoint, an older adapter (validation-methods §12.12).
What a case builds itself in a run is the same by the store's keys. A graph or a reference that somebody brings says
what it was made from, if this library made it: the graph in its metadata, the reference in its file. Only what is
certain is said to differ; what may be legitimate (a custom pooling, a fused or quantized graph, a config that was saved
anew) is unknown, and, as a suspicion, it is a part of the reason if the numbers do not agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from qeff_validate.artifact import Kind
from qeff_validate.builders.provenance import About, about
from qeff_validate.config.case import Case
from qeff_validate.errors import ValidateError
from qeff_validate.models.row_order import switches
from qeff_validate.models.sources.checkpoint import weight_files
from qeff_validate.prechecks.fingerprint_diff import NAMES, Said, adapters, body, head, without_versions
from qeff_validate.prechecks.graph_positions import GraphPositions, graph_positions
from qeff_validate.prechecks.weights_in_graph import Found, found_in
from qeff_validate.report.result import Result, Rung
from qeff_validate.tensors import Tensors

RUNGS = ("token ids", "mask", "positions", "pooling", "normalize", "max length", "weights", "adapters")
"""From what is fed to what is computed."""

GRAPH, REFERENCE = "the graph was exported", "the reference was recorded"

ABOUT = "about"
"""Name of the tensor of a recorded file that says what it was made from, as JSON."""

NEAR = ("package", "path", "random")
"""Sources that are never looked for on a network."""


@dataclass(frozen=True, slots=True)
class Sides:
    """What is compared with what the case asks for.

    Attributes:
        graph: what a graph that the case brings says of itself; None if the case builds it.
        recorded: what a recorded reference says that it was made from; None if the reference is run.
        near: the source can be looked at without a network.
        contents: looks for the source's weights in the graph; None if that cannot be done.
        places: takes the row of the model's first position, and tells how the graph reads that table; None as above.
    """

    graph: About | None = None
    recorded: Mapping[str, Any] | None = None
    near: bool = True
    contents: Callable[[], Found] | None = None
    places: Callable[[int], GraphPositions | None] | None = None

    def said(self) -> list[tuple[str, Said]]:
        """Return what each side says that it was made from, with words that begin a sentence."""
        graph = [] if self.graph is None else [(GRAPH, self.graph.model)]
        return graph + ([] if self.recorded is None else [(REFERENCE, self.recorded.get("model"))])


def ladder(made: Any, inputs: Any, sides: Sides, body_key: Callable[[], Mapping[str, Any]]) -> tuple[Rung, ...]:
    """Climb the rungs in order; ``mask`` and ``positions`` are settled when they are fed (`watched.Watched`).

    Args:
        made: a model wrapper; without `protocols.Prechecked` everything is unknown.
        inputs: its inputs.
        sides: what the case brings.
        body_key: gives what identifies the weights that the case asks for.
    """
    if not hasattr(made, "settings"):
        return tuple(Rung(name, "unknown", "this kind of model does not say what it is made from") for name in RUNGS)
    ours: Any = "the model is not on this host"
    if sides.near or getattr(getattr(made, "options", None), "pooling", None) != "auto":
        ours = attempted(made.settings)
    published = attempted(made.published) if sides.near else {}
    published = {} if isinstance(published, str) else published
    first = inputs.tables.get("first_position", 0)
    look = sides.places if "positions" in inputs.tables else None
    places = None if look is None else attempted(lambda: look(first))
    places = places if isinstance(places, GraphPositions) else None
    climbed = {
        "token ids": merged("token ids", _tokens(made, inputs, sides)),
        "positions": _positions(made, inputs, first, places),
        "max length": _length(made, inputs, sides.graph, published, places),
        "weights": _weights(sides, body_key),
        "adapters": _bases(
            merged("adapters", (legible(adapters, who, theirs, ours) for who, theirs in sides.said())), made, published
        ),
    }
    for name in ("pooling", "normalize"):
        rung = merged(name, (legible(partial(head, name), who, theirs, ours) for who, theirs in sides.said()))
        climbed[name] = _beside(rung, ours, published)
    return tuple(climbed.get(name, Rung(name, "unknown", "nothing was fed")) for name in RUNGS)


def sides_of(case: Case, kind: Kind, made: Any, recorded: Tensors | None, *, in_memory: bool) -> Sides:
    """Return what a case brings for a runtime that opens an artifact of this kind.

    Args:
        case: the case.
        kind: of the artifact; a QPC is compiled from the case's ONNX file if it brings one.
        made: the model wrapper.
        recorded: the tensors of the recorded reference; None if it is run.
        in_memory: the model is the caller's own.
    """
    given = case.artifacts
    graph, contents, places = None, None, None
    if kind == "qpc" and given.qpc:
        graph = about("qpc", Path(given.qpc))
    elif kind != "module" and given.onnx:
        path = Path(given.onnx)
        graph = about("onnx", path, given.inputs.get("input_ids", "input_ids"))

        def contents() -> Found:
            return found_in(path, weight_files(made.source.path))

        def places(first: int) -> GraphPositions | None:
            ids, mask = (given.inputs.get(name, name) for name in ("input_ids", "attention_mask"))
            return graph_positions(path, weight_files(made.source.path), ids, mask, first)

    said = None
    if recorded is not None:
        said = json.loads(recorded[ABOUT].tobytes()) if ABOUT in recorded else {}
    kind_of_source, _, rest = case.source.partition(":")
    near = in_memory or recorded is None or kind_of_source in NEAR or Path(rest or case.source).is_dir()
    folder = (
        attempted(lambda: getattr(getattr(made, "source", None), "path", None))
        if near and hasattr(made, "settings")
        else None
    )
    local = isinstance(folder, Path) and folder.is_dir()
    return Sides(graph, said, near, contents if local else None, places if local else None)


def attempted(get: Callable[[], Any]) -> Any:
    """Return what a function gives, or as a text why it gives nothing."""
    try:
        return get()
    except (ValidateError, ImportError, OSError, ValueError) as exc:
        return f"{type(exc).__name__}: {exc}".splitlines()[0]


def legible(compare: Callable[[str, Said, Any], Rung], who: str, theirs: Said, ours: Any) -> Rung:
    """Return what a comparison with a graph's or a file's own words gives; these may be of any form."""
    try:
        return compare(who, theirs, ours)
    except (AttributeError, IndexError, KeyError, RecursionError, StopIteration, TypeError, ValueError) as exc:
        return Rung("", "unknown", f"what {who} from cannot be read: {type(exc).__name__}: {exc}", suspect=True)


def merged(name: str, found: Iterable[Rung]) -> Rung:
    """Return one rung of what several sides say: what differs, else what is unknown, else the same."""
    rungs = list(found)
    if not rungs:
        return Rung(name, "same", "made from the case")
    for state in ("differs", "unknown", "same"):
        of = [rung for rung in rungs if rung.state == state]
        if of:
            details = "; ".join(dict.fromkeys(rung.detail for rung in of if rung.detail))
            return replace(of[0], name=name, detail=details, suspect=any(rung.suspect for rung in of))
    raise AssertionError


def _beside(rung: Rung, ours: Any, published: Mapping[str, Any]) -> Rung:
    """Add what the files beside the weights say, if the case decides otherwise."""
    if rung.name not in published or isinstance(ours, str):
        return rung
    said, asked = published[rung.name], ours["head"][rung.name]
    if NAMES.get(said, said) == NAMES.get(asked, asked):
        return rung
    note = f"sentence-transformers' files say {said}, the case asks for {asked}"
    return replace(rung, detail="; ".join(filter(None, (rung.detail, note))))


def _tokens(made: Any, inputs: Any, sides: Sides) -> list[Rung]:
    name, most, found = "token ids", inputs.tables.get("tokens"), []
    for row, ids in enumerate(inputs.ids):
        if most is not None and ids.size and not 0 <= ids.min() <= ids.max() < most:
            wrong = int(ids.max() if ids.max() >= most else ids.min())
            text = f"row {row} ({inputs.texts[row][:40]!r}) has the id {wrong}, the model embeds 0 to {most - 1}"
            found.append(Rung(name, "differs", f"{text}: is it the model's own tokenizer?"))
            break
    if sides.recorded is not None:
        found.append(_recorded_tokens(made, inputs, _kept(sides.recorded.get("tokens")), near=sides.near))
    elif most is None and not found:
        found.append(Rung(name, "same", "made from the case; how many the model embeds is not known"))
    return found


def _kept(tokens: Any) -> Any:
    """Return what a file says of its token ids; None if it does not say ``asked`` and ``tokenizer``."""
    fits = isinstance(tokens, Mapping) and all(isinstance(tokens.get(key), Mapping) for key in ("asked", "tokenizer"))
    return tokens if fits else None


def _recorded_tokens(made: Any, inputs: Any, kept: Any, *, near: bool) -> Rung:
    """Compare recorded inputs with what the case would tokenize: by what they were made from, else one by one."""
    name, asked = "token ids", attempted(made.asked)
    if isinstance(asked, str):
        return Rung(name, "unknown", f"what the case would tokenize is not known here: {asked}")
    if not near:
        if kept and _spoken(kept["asked"]) != _spoken(plain(asked)):
            return Rung(name, "differs", "the reference was recorded for other texts than the case's")
        return Rung(name, "unknown", "the tokenizer is not on this host")
    tokenizer = attempted(made.tokenizer_key)
    if kept and kept["asked"] == plain(asked) and without_versions(kept["tokenizer"]) == without_versions(tokenizer):
        return Rung(name, "same")
    rows = attempted(made.rows)
    if isinstance(rows, str):
        return Rung(name, "unknown", f"cannot tokenize here what the case asks for: {rows}", suspect=kept is not None)
    if rows.pad != inputs.pad:
        return Rung(name, "differs", f"padding is {inputs.pad} in the recorded file, {rows.pad} by the case")
    if len(rows.ids) != len(inputs.ids):
        text = f"the recorded file has {len(inputs.ids)} rows, the case makes {len(rows.ids)}"
        return Rung(name, "differs", text)
    for row, (theirs, ours) in enumerate(zip(inputs.ids, rows.ids, strict=True)):
        if theirs.tolist() != ours.tolist():
            text = f"row {row} is {theirs.tolist()[:8]} ({inputs.texts[row][:40]!r}) in the recorded file,"
            return Rung(name, "differs", f"{text} {ours.tolist()[:8]} ({rows.texts[row][:40]!r}) by the case")
    return Rung(name, "same")


def _spoken(asked: Mapping[str, Any]) -> list[list[str]] | None:
    texts = asked.get("texts")
    if not isinstance(texts, list):
        return None
    return [f"{asked.get('prompt', '')}{text}".split() for text in texts]


def plain(value: Any) -> Any:
    """Return plain data as JSON gives it back."""
    return json.loads(json.dumps(value))


def _bases(rung: Rung, made: Any, published: Mapping[str, Any]) -> Rung:
    """Add which base an adapter names, if its last part is not in the case's source: a copy may have another name."""
    kind, _, source = getattr(getattr(made, "case", None), "source", "").partition(":")
    if kind in ("random", "tiny") or rung.state == "differs":
        return rung
    notes = [
        f"adapter {name!r} was trained on {base!r} by its adapter_config.json, the case's source is {source or kind!r}"
        for name, base in published.get("bases", {}).items()
        if isinstance(base, str) and base and Path(base).name.lower() not in (source or kind).lower()
    ]
    if not notes:
        return rung
    return replace(rung, detail="; ".join(filter(None, (rung.detail, *notes))), suspect=True)


def _positions(made: Any, inputs: Any, first: int, places: GraphPositions | None) -> Rung:
    """Compare where positions begin, and suspect rotary frequencies that change with the length of what is read.

    What is fed is seen later.
    """
    reach = made.reach(inputs)
    for kind, switch in switches(inputs.tables).items():
        if reach > switch:
            text = (
                f"rope_type {kind!r} changes its frequencies beyond {switch} positions, and the case reaches {reach}:"
                " what a row gives depends on the length that it is run at"
            )
            return Rung("positions", "unknown", text, suspect=True)
    if places is None or places.begins == first:
        return Rung("positions", "unknown", "nothing was fed")
    why = " (RoBERTa, XLM-R, MPNet and others begin behind the padding token's row)" if first else ""
    text = f"the graph gives the first token row {places.begins} of the table of positions, the model row {first}{why}"
    return Rung("positions", "differs", text)


def _length(
    made: Any,
    inputs: Any,
    graph: About | None,
    published: Mapping[str, Any],
    places: GraphPositions | None,
) -> Rung:
    name, reach, longest = "max length", made.reach(inputs), max(ids.size for ids in inputs.ids)
    positions, told = inputs.tables.get("positions"), published.get("max_seq_length")
    first = inputs.tables.get("first_position", 0)
    if positions is not None and reach > positions - first:
        text = f"the case asks for {reach} tokens, the model has positions for {positions - first}"
        rows = f" (a table of {positions} rows, in which the first token has row {first})" if first else ""
        return Rung(name, "differs", f"{text}{rows}")
    if places is not None and longest > places.rows - places.begins:
        text = (
            f"the graph's table of positions serves {places.rows - places.begins} tokens, the longest row has {longest}"
        )
        return Rung(name, "differs", text)
    if graph is not None and graph.most is not None and longest > graph.most:
        return Rung(name, "differs", f"the graph takes {graph.most} tokens, the longest row has {longest}")
    if graph is not None and graph.slots is not None and reach > graph.slots:
        return Rung(name, "differs", f"the graph keeps {graph.slots} positions, the longest text needs {reach}")
    if graph is not None and graph.most is not None and graph.most < reach:
        return Rung(
            name, "unknown", f"the graph takes {graph.most} tokens, the case asks for {reach}; no row is longer"
        )
    limits = {"sentence-transformers' files cut": told, "the tokenizer cuts": published.get("model_max_length")}
    notes = [f"{who} at {limit}, the case asks for {reach}" for who, limit in limits.items() if limit and reach > limit]
    return Rung(name, "same", "; ".join(notes))


def _weights(sides: Sides, body_key: Callable[[], Mapping[str, Any]]) -> Rung:
    said, found = sides.said(), []
    ours: Any = "the model is not on this host"
    if said and sides.near:
        ours = attempted(body_key)
    for who, theirs in said:
        rung = legible(body, who, theirs, ours)
        if who == GRAPH and rung.state == "unknown" and sides.contents is not None:
            rung = _by_contents(rung, attempted(sides.contents), own=theirs is not None)
        if who == GRAPH and sides.graph is not None and sides.graph.contrib and rung.state != "differs":
            contrib = f"the graph has contrib operators: {sides.graph.contrib}"
            rung = Rung(rung.name, "unknown", "; ".join(filter(None, (rung.detail, contrib))), suspect=True)
        found.append(rung)
    return merged("weights", found)


def _by_contents(rung: Rung, found: Any, *, own: bool) -> Rung:
    """Decide by what stands in the graph; what we did not export may be fused or quantized."""
    if isinstance(found, str) or not found.tried:
        return rung
    counted = f"{found.same} of the model's {found.tried} largest matrices are in the graph, bit for bit"
    if found.same == found.tried:
        return Rung(rung.name, "same", counted)
    if own and found.same == 0 and found.alike == found.tried:
        return Rung(rung.name, "differs", f"{rung.detail}; none of its largest matrices is the model's")
    return Rung(rung.name, "unknown", counted, suspect=found.alike > 0)


def settled(result: Result) -> Result:
    """Return a result with what the ladder says: a rung that differs fails it, and the numbers are told beside it."""
    wrong = [f"{rung.name}: {rung.detail}" for rung in result.prechecks if rung.state == "differs"]
    if wrong:
        numbers = result.reason or "within their bounds all the same"
        return replace(result, status="fail", stage="precheck", reason=f"{'; '.join(wrong)}. The numbers: {numbers}")
    suspects = [f"{rung.name}: {rung.detail}" for rung in result.prechecks if rung.suspect]
    if suspects and result.status not in ("pass", "not_run"):
        return replace(result, reason=f"{result.reason}. Before looking further: {'; '.join(suspects)}")
    return result


def with_rungs(rungs: Sequence[Rung], fed: Iterable[Rung]) -> tuple[Rung, ...]:
    """Return a ladder with the rungs that were settled while it was fed; a suspicion stays unless one differs."""
    found = {rung.name: rung for rung in fed}

    def settled_rung(rung: Rung) -> Rung:
        seen = found.get(rung.name, rung)
        stays = rung.state == "differs" or (rung.suspect and seen.state != "differs")
        return rung if stays else seen

    return tuple(map(settled_rung, rungs))
