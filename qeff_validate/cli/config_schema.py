# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema of config files, with the options of each model kind, so that editors complete and check them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qeff_validate.config.case import Config
from qeff_validate.registry import is_built_in, registered

VERSION = 1
"""Of the schema; it grows when a config that was valid is no longer so."""

DIALECT = "https://json-schema.org/draft/2020-12/schema"

Json = dict[str, Any]


def config_schema() -> str:
    """Return the JSON Schema of config files as text, plug-ins that are installed among runtimes and model kinds.

    The options of a case are those of its ``model``, else of the ``model`` in ``defaults``, else of an embedding.
    """
    schema: Json = Config.model_json_schema()
    definitions: Json = schema["$defs"]
    kinds = [*filter(None, (_add_options(definitions, name) for name in sorted(registered("models"))))]
    case = definitions["Case"]
    _name_runtimes(case, definitions, sorted(registered("runtimes")))
    case["properties"]["model"]["enum"] = kinds
    case["properties"]["options"] = {"type": "object", "description": "options of the model kind"}
    case["required"].remove("source")  # it may stand in defaults
    case["allOf"] = [_if(_is_model(kind), {"properties": {"options": _options(kind)}}) for kind in kinds]
    properties = {name: value for name, value in case["properties"].items() if name != "name"}
    definitions["Defaults"] = {
        "description": "Values of cases that say nothing else; options and other mappings are merged key by key.",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _without_default(value) for name, value in properties.items()},
    }
    schema["properties"]["defaults"] = {"$ref": "#/$defs/Defaults"}
    in_defaults = {kind: _in_defaults(_is_model(kind)) for kind in kinds}
    no_model: Json = {"not": _in_defaults({"required": ["model"]})}
    any_kind = {"anyOf": [_options(kind) for kind in kinds]}  # each case with a kind of its own checks them again
    schema["allOf"] = [
        *(_if(condition, _inherited(kind, _options(kind))) for kind, condition in in_defaults.items()),
        _if(no_model, _inherited("embedding", any_kind)),
        _if(
            {"not": _in_defaults({"required": ["source"]})}, {"properties": {"cases": _each({"required": ["source"]})}}
        ),
    ]
    head = {"$schema": DIALECT, "$id": f"urn:qeff-validate:config:{VERSION}", "title": "qeff-validate config"}
    return json.dumps({**head, **{name: value for name, value in schema.items() if name not in head}}, indent=2) + "\n"


def _add_options(definitions: Json, kind: str) -> str | None:
    """Add the options of a model kind to the definitions; return its name, None for a plug-in that fails to load."""
    entry = registered("models")[kind]
    try:
        options = entry.load().options.model_json_schema()
    except Exception:  # a plug-in that cannot be imported is told where a case names it
        if is_built_in(entry):
            raise
        return None
    definitions.update(options.pop("$defs", {}))
    definitions[f"options of {kind}"] = options
    return kind


def _name_runtimes(case: Json, definitions: Json, names: list[str]) -> None:
    case["properties"]["runtimes"]["items"] = {"enum": names}
    definitions["Expect"]["properties"]["runtime"]["enum"] = names
    definitions["Performance"]["properties"]["runtimes"]["anyOf"][0]["items"] = {"enum": names}
    for choice in case["properties"]["tolerance"]["anyOf"]:
        if choice.get("type") == "object":
            choice["propertyNames"] = {"enum": names}


def _options(kind: str) -> Json:
    return {"$ref": f"#/$defs/options of {kind}".replace(" ", "%20")}


def _is_model(kind: str) -> Json:
    return {"properties": {"model": {"const": kind}}, "required": ["model"]}


def _in_defaults(condition: Json) -> Json:
    return {"properties": {"defaults": condition}, "required": ["defaults"]}


def _if(condition: Json, then: Json) -> Json:
    return {"if": condition, "then": then}


def _each(condition: Json) -> Json:
    return {"items": condition}


def _inherited(kind: str, defaults: Json) -> Json:
    """Return what holds where cases without a model are of a kind, and what the options in defaults then are."""
    case = _if({"not": {"required": ["model"]}}, {"properties": {"options": _options(kind)}})
    return {"properties": {"defaults": {"properties": {"options": defaults}}, "cases": _each(case)}}


def _without_default(value: Mapping[str, Any]) -> Json:
    return {name: part for name, part in value.items() if name != "default"}
