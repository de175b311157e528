# SPDX-License-Identifier: Apache-2.0
"""The import rule of design §2 and what no module may do, read from the source of every module.

Each rule is a function from source text to offences, so that it is itself tested on a text that offends.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from qeff_validate.builders.source_keys import EXPLAINS, JUDGES, SHAPES_ARTIFACTS

PACKAGE = Path(__file__).resolve().parents[2] / "qeff_validate"

ORDER = (
    {"suites", "plugin", "cli"}, {"session_outcome"}, {"engine"}, {"pipeline"}, {"explain", "selftest"},
    {"prechecks", "mutation"}, {"builders"}, {"models", "runtimes"}, {"sdk"}, {"session_wrapper"}, {"protocols"},
    {"report"}, {"config"}, {"comparison"}, {"artifact"}, {"json_tensor"}, {"tensors"}, {"registry"},
    {"files", "folders", "memory"}, {"errors"},
)  # fmt: skip
"""From left to right; a module imports only from its right, or from its own package."""
RANK = {name: rank for rank, names in enumerate(ORDER) for name in names}

FRAMEWORKS = frozenset({
    "torch", "transformers", "peft", "sentence_transformers", "onnx", "onnxruntime", "onnxscript", "onnx_ir",
    "qaicrt", "QAicApi_pb2",
})  # fmt: skip
MAY_USE_FRAMEWORKS = frozenset(
    {"models", "runtimes", "builders", "sdk", "mutation", "prechecks", "selftest", "explain"}
)
SIMULATOR_USES = frozenset({"numpy", "onnx", "onnxruntime", "google", "yaml"})

UNSAFE_MODULES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"})
UNSAFE_CALLS = frozenset({
    "torch.load", "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "os.system", "os.popen",
    "subprocess.getoutput", "subprocess.getstatusoutput", "eval", "exec",
})  # fmt: skip
UNSAFE_KEYWORDS = frozenset({"shell", "trust_remote_code", "allow_pickle"})


@dataclass(frozen=True)
class Import:
    """One imported module, by its full name; ``top``: as the module itself is loaded, outside TYPE_CHECKING."""

    module: str
    top: bool

    @property
    def root(self) -> str:
        return self.module.split(".")[0]


@functools.cache  # six rules read each module's
def imports(source: str, name: str) -> tuple[Import, ...]:
    """Every import of a module, also inside functions and TYPE_CHECKING."""
    tree = ast.parse(source)
    at_top = set(map(id, _loaded(tree.body)))
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, id(node) in at_top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = name.split(".")[: -node.level]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            # `from package import module` imports the module; a name that is none resolves to its package below
            found += [Import(f"{base}.{alias.name}", id(node) in at_top) for alias in node.names]
    return tuple(found)


def _loaded(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that run when a module is loaded."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _loaded(node.orelse)
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While, ast.ClassDef)):
            for part in ("body", "orelse", "finalbody"):
                yield from _loaded(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _loaded(handler.body)


def modules() -> dict[str, str]:
    """The source of every module by its full name; a package by the name of its ``__init__``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts)] = path.read_text(encoding="utf-8")
    return found


MODULES = modules()
NAMES = sorted(MODULES)


def layer(module: str) -> str | None:
    """The word of design §2 that a module of ours belongs to; None for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__init__" else None


def wrong_way(source: str, name: str) -> list[str]:
    """Imports that point left, sideways, or at the package as a whole."""
    own = layer(name)
    if own is None:
        return []  # the package stands left of everything: it hands out names of all
    offences = []
    for item in imports(source, name):
        if item.root != "qeff_validate":
            continue
        target = layer(item.module)
        known = target in RANK
        if not known or (target != own and RANK[target] <= RANK[own]):
            offences.append(f"{name} imports {item.module}")
    return offences


APART = (("models", "runtimes"), ("models.embedding", "models.causal_lm"))
"""Neither imports from the other. `models.kinds` registers both kinds, and nothing imports it."""


def side_by_side(source: str, name: str) -> list[str]:
    """Imports between parts that do not know each other, and imports of the registry of kinds."""
    own = name.removeprefix("qeff_validate.")
    offences = []
    for item in imports(source, name):
        target = item.module.removeprefix("qeff_validate.")
        between = any(
            f"{own}.".startswith(f"{one}.") and f"{target}.".startswith(f"{other}.")
            for pair in APART
            for one, other in (pair, pair[::-1])
        )
        if between or f"{target}.".startswith("models.kinds."):
            offences.append(f"{name} imports {item.module}")
    return offences


def shaped_by_judges(source: str, name: str) -> list[str]:
    """Imports of what judges or explains, as a module that shapes artifacts is loaded."""
    path = name.removeprefix("qeff_validate.").replace(".", "/") + ".py"
    if not path.startswith(tuple(f"{folder}/" for folder in SHAPES_ARTIFACTS)) or path in (*JUDGES, *EXPLAINS):
        return []
    judges = tuple(
        "qeff_validate." + judge.removesuffix(".py").replace("/", ".") + "." for judge in (*JUDGES, *EXPLAINS)
    )
    return [
        f"{name} imports {item.module}" for item in imports(source, name) if item.top and item.module.startswith(judges)
    ]


def misplaced_frameworks(source: str, name: str) -> list[str]:
    """Imports of a framework where none may be, wherever in the module they stand."""
    if layer(name) in MAY_USE_FRAMEWORKS:
        return []
    return [f"{name} imports {item.module}" for item in imports(source, name) if item.root in FRAMEWORKS]


def simulator_leaks(source: str, name: str) -> list[str]:
    """Imports of the simulated SDK that are neither its own, nor of the standard library, nor allowed."""
    allowed = SIMULATOR_USES | sys.stdlib_module_names
    own = "qeff_validate.sdk.simulated."
    return [
        f"{name} imports {item.module}"
        for item in imports(source, name)
        if item.root not in allowed and not item.module.startswith(own)
    ]


def unsafe(source: str, name: str) -> list[str]:
    """What runs what a file says, or hands text to a shell."""
    offences = [f"{name} imports {item.module}" for item in imports(source, name) if item.root in UNSAFE_MODULES]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            named = {f"{node.module}.{alias.name}" for alias in node.names} & UNSAFE_CALLS
            offences += [f"{name}:{node.lineno} imports {text}" for text in sorted(named)]
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in UNSAFE_CALLS:
            offences.append(f"{name}:{node.lineno} calls {called}")
        for keyword in node.keywords:
            off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
            if keyword.arg in UNSAFE_KEYWORDS and not off:
                offences.append(f"{name}:{node.lineno} sets {keyword.arg}")
    return offences


# --- the rules hold --------------------------------------------------------------------------------


def test_every_module_of_the_package_is_read() -> None:
    assert {
        "qeff_validate.engine",
        "qeff_validate.models.embedding.pooling",
        "qeff_validate.sdk.simulated.bindings.qaicrt",
    } <= set(NAMES)


def test_every_module_has_a_place_in_the_order() -> None:
    assert {layer(name) for name in NAMES} - {None} <= set(RANK)


Rule = Callable[[str, str], list[str]]


@pytest.mark.parametrize(
    "rule", [wrong_way, side_by_side, shaped_by_judges, misplaced_frameworks, unsafe], ids=lambda rule: rule.__name__
)
def test_no_module_breaks_a_rule(rule: Rule) -> None:
    assert [offence for name, source in MODULES.items() for offence in rule(source, name)] == []


def test_simulated_sdk_imports_nothing_outside_itself() -> None:
    simulated = {name: source for name, source in MODULES.items() if ".simulated." in name}
    assert len(simulated) > 10
    assert [offence for name, source in simulated.items() for offence in simulator_leaks(source, name)] == []


def heavy_modules(sources: dict[str, str]) -> set[str]:
    """Modules whose loading loads a framework, by themselves or through another module."""
    top = {name: {item.module for item in imports(source, name) if item.top} for name, source in sources.items()}
    heavy = {name for name, wanted in top.items() if any(module.split(".")[0] in FRAMEWORKS for module in wanted)}
    while True:
        more = {name for name, wanted in top.items() if any(resolved(m, sources) in heavy for m in wanted)} - heavy
        if not more:
            return heavy
        heavy |= more


def resolved(module: str, sources: dict[str, str]) -> str:
    """The module that an import of ``package.module`` or ``package.module.name`` loads."""
    for candidate in (module, f"{module}.__init__", module.rpartition(".")[0]):
        if candidate in sources:
            return candidate
    return module


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that import each other in a circle, lazily or not; empty if there is none."""
    graph = {name: {resolved(item.module, sources) for item in imports(text, name)} for name, text in sources.items()}
    try:
        TopologicalSorter({name: wanted - {name} for name, wanted in graph.items()}).prepare()
    except CycleError as exc:
        return list(exc.args[1])
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    apart = {name: text for name, text in MODULES.items() if name != "qeff_validate.__init__"}
    assert circle(apart) == []


def test_circle_is_found() -> None:
    sources = {
        "p.a": "def f():\n    from p.b import g",
        "p.b": "import p.c",
        "p.c": "from p.a import f",
        "p.d": "import p.a",
    }
    assert set(circle(sources)) == {"p.a", "p.b", "p.c"}


def test_what_loads_a_framework_when_imported_is_itself_imported_lazily() -> None:
    heavy = heavy_modules(MODULES)
    assert "qeff_validate.models.embedding.pooling" in heavy
    assert {layer(name) for name in heavy} <= MAY_USE_FRAMEWORKS
    assert not {name for name in heavy if name.endswith("__init__")}


# --- the rules can fail ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qeff_validate.tensors", "from qeff_validate.artifact import Kind"),
        ("qeff_validate.report", "def f():\n    from qeff_validate import engine"),
        ("qeff_validate.config.case", "if TYPE_CHECKING:\n    from qeff_validate.report import Report"),
        ("qeff_validate.models.x", "from qeff_validate.runtimes.ort import OrtRuntime"),
        ("qeff_validate.runtimes.x", "import qeff_validate.models.sources.resolve"),
        ("qeff_validate.cli", "from qeff_validate.plugin import option"),
        ("qeff_validate.models.x", "from .. import engine"),
        ("qeff_validate.models.x", "from qeff_validate import PooledModel"),
        ("qeff_validate.models.x", "import qeff_validate as qv"),
    ],
)
def test_import_that_points_left_or_sideways_is_found(name: str, source: str) -> None:
    assert len(wrong_way(source, name)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qeff_validate.models.x", "from qeff_validate.runtimes.ort import OrtRuntime"),
        ("qeff_validate.models.embedding.x", "from qeff_validate.models.causal_lm.kv_cache import masks"),
        ("qeff_validate.models.causal_lm.x", "def f():\n    from qeff_validate.models.embedding import pooling"),
        ("qeff_validate.models.sources.x", "from qeff_validate.models import kinds"),
    ],
)
def test_import_between_parts_that_do_not_know_each_other_is_found(name: str, source: str) -> None:
    assert len(side_by_side(source, name)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("qeff_validate.cli", "from qeff_validate.engine import load"),
        (
            "qeff_validate.models.x",
            "from qeff_validate.models.y import f\nfrom . import z\nfrom ..config.case import Case",
        ),
        ("qeff_validate.__init__", "from qeff_validate.engine import validate"),
    ],
)
def test_import_that_points_right_or_stays_at_home_is_no_offence(name: str, source: str) -> None:
    assert wrong_way(source, name) == []
    assert side_by_side(source, name) == []


@pytest.mark.parametrize(
    "source", ["import torch", "def f():\n    from onnx import load", "import transformers.models", "import qaicrt"]
)
def test_framework_in_a_layer_without_one_is_found(source: str) -> None:
    assert len(misplaced_frameworks(source, "qeff_validate.engine")) == 1
    assert misplaced_frameworks(source, "qeff_validate.models.x") == []


@pytest.mark.parametrize(
    "source",
    ["import torch", "from qeff_validate.errors import RunError", "from ..locate import Sdk", "import qeff_validate"],
)
def test_import_out_of_the_simulated_sdk_is_found(source: str) -> None:
    assert len(simulator_leaks(source, "qeff_validate.sdk.simulated.qpc")) == 1


def test_judge_in_what_shapes_artifacts_is_found() -> None:
    source = "from qeff_validate.models.causal_lm.failure_hints import pattern"
    assert len(shaped_by_judges(source, "qeff_validate.models.causal_lm.model")) == 1
    assert shaped_by_judges(source, "qeff_validate.models.causal_lm.verdict") == []
    assert shaped_by_judges(f"def f():\n    {source}", "qeff_validate.models.causal_lm.model") == []


def test_module_that_loads_a_framework_through_others_is_found() -> None:
    sources = {
        "p.direct": "if True:\n    import torch",
        "p.second": "from p.direct import f",
        "p.third": "import p.second",
        "p.lazy": "def f():\n    import p.direct",
        "p.typed": "if TYPE_CHECKING:\n    import torch",
        "p.light": "import p.lazy",
    }
    assert heavy_modules(sources) == {"p.direct", "p.second", "p.third"}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "from torch import load",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "yaml.unsafe_load(text)",
        "subprocess.run('ls', shell=True)",
        "os.system('ls')",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "AutoModel.from_pretrained(path, trust_remote_code=case.trust)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_unsafe_code_is_found(source: str) -> None:
    assert len(unsafe(source, "qeff_validate.x")) == 1


@pytest.mark.parametrize(
    "source",
    [
        "yaml.safe_load(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=False)",
        "re.compile(text)",
        "m.eval()",
    ],
)
def test_safe_code_is_no_offence(source: str) -> None:
    assert unsafe(source, "qeff_validate.x") == []
