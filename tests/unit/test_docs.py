# SPDX-License-Identifier: Apache-2.0
"""What the documents name exists: targets, commands, options, names, configs, links, citations and pages."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import qeff_validate
from qeff_validate.cli.app import app
from qeff_validate.engine import load
from qeff_validate.errors import ConfigError
from qeff_validate.pipeline.executors import ray_cluster
from qeff_validate.plugin import MARKERS, OPTIONS

ROOT = Path(__file__).resolve().parents[2]
DOCS = [path for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))) if path.exists()]
SPECS = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "specs").glob("*.md"))}
SOURCES = [path for name in ("qeff_validate", "tests", "tools") for path in sorted((ROOT / name).rglob("*.py"))]
ACTION = ROOT / ".github" / "actions" / "validate" / "action.yml"
DEPLOYMENT = [*sorted((ROOT / "deploy").iterdir())]
WORKFLOWS = [*sorted((ROOT / ".github" / "workflows").glob("*.yml")), ACTION]

_SPEC = importlib.util.spec_from_file_location("layers_svg", ROOT / "tools" / "layers_svg.py")
layers_svg = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(layers_svg)

FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

CITATION = re.compile(r"(?:(?<![\w/])([A-Za-z][\w-]*)(?:\.md)?[`]*[\s#]+)?§ ?(\d+(?:\.\d+)*)")
PAGE = re.compile(r"(?<![\w/.-])(?:docs|facts)/[\w./-]*\w")

TARGETS = frozenset(
    re.findall(r"^([a-z][\w-]*):(?!=)", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
)
COMMANDS = {
    name: {
        option
        for part in (command, *getattr(command, "commands", {}).values())
        for parameter in part.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    }
    | {"--help"}
    for name, command in typer.main.get_command(app).commands.items()
}
QV_OPTIONS = {f"--qv-{name}" for name in (*OPTIONS, "allow-inconclusive")}


def blocks(text: str, *languages: str) -> list[str]:
    """The code blocks in one of these languages."""
    return [body for language, body in FENCE.findall(text) if language in languages]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def commands(text: str) -> Iterator[list[str]]:
    """Every command line, as words: the lines of shell blocks, and code in the prose that starts like one."""
    lines = [
        line
        for body in blocks(text, "console", "bash", "sh", "shell")
        for line in body.replace("\\\n", " ").splitlines()
    ]
    lines += [span for span in SPAN.findall(prose(text)) if span.startswith(("make ", "qeff-validate ", "pytest "))]
    for line in lines:
        words = shlex.split(line.removeprefix("$ ").replace("…", ""), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]  # variables of the environment
        if words and Path(words[0]).name.startswith("python") and words[1:2] == ["-m"]:
            words = words[2:]
        if words:
            yield [Path(words[0]).name, *words[1:]]


def wrong_commands(text: str) -> list[str]:
    """Commands that name a target, a command, an option or a marker that does not exist."""
    found = []
    for program, *words in commands(text):
        end = next((place for place, word in enumerate(words) if word in ("|", ">", "&&", ";")), len(words))
        check = {"make": _make, "qeff-validate": _cli, "pytest": _pytest}.get(program)
        found += check(words[:end]) if check else []
    return found


def _make(words: list[str]) -> list[str]:
    targets = [word for word in words if "=" not in word and not word.startswith("-")]
    return [f"make has no target {target!r}" for target in targets if target not in TARGETS]


def _cli(words: list[str]) -> list[str]:
    if not words or words[0].startswith("-"):
        return [] if words in ([], ["--help"]) else [f"qeff-validate has no option {words[0]}"]
    if words[0] not in COMMANDS:
        return [f"qeff-validate has no command {words[0]!r}"]
    options = [word.partition("=")[0] for word in words[1:] if word.startswith("-")]
    return [f"qeff-validate {words[0]} has no option {name}" for name in options if name not in COMMANDS[words[0]]]


def _pytest(words: list[str]) -> list[str]:
    options = [word.partition("=")[0] for word in words]
    found = [f"pytest has no option {name}" for name in options if name.startswith("--qv-") and name not in QV_OPTIONS]
    for flag, marked in itertools.pairwise(words):
        if flag == "-m":
            marks = set(re.findall(r"\w+", marked)) - {"not", "and", "or"}
            found += [f"no marker is called {mark!r}" for mark in sorted(marks - set(MARKERS))]
    return found


def wrong_names(code: str) -> list[str]:
    """Names of this package that a piece of Python uses and that do not exist."""
    tree = ast.parse(code)
    found, aliases = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            aliases |= {item.asname or item.name for item in node.names if item.name == "qeff_validate"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "qeff_validate":
            home = importlib.import_module(node.module or "")
            found += [f"{node.module}.{item.name}" for item in node.names if not hasattr(home, item.name)]
    public = {*qeff_validate.__all__, "__version__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases | {"qv"}:
            found += [f"qv.{node.attr}"] if node.attr not in public else []
    return found


def broken_links(text: str, folder: Path) -> list[str]:
    """Links to files or headings that are not there; addresses of the web are left alone."""
    found = []
    for target in LINK.findall(SPAN.sub("", prose(text))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = folder / path if path else None
        there = file is None or file.exists()
        if there and anchor:
            there = anchor in headings(file.read_text(encoding="utf-8") if file else text)
        found += [] if there else [target]
    return found


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    titles = re.findall(r"^#+ +(.+?) *$", prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def wrong_citations(text: str, page: str | None = None) -> list[str]:
    """Sections that are cited and are not in docs/specs.

    A section without a page belongs to the page that was named before it.

    Args:
        text: prose or source; a citation is the stem of a page of docs/specs, § and a number.
        page: the page that sections belong to before one is named.
    """
    found = []
    for name, section in CITATION.findall(text):
        # a word before § that is no page is a word of the sentence, but for what looks like the name of a page
        if name in SPECS or re.search(r"-|^[A-Z]{3,}$", name):
            page = name
        if page not in SPECS or not re.search(rf"^#+ {re.escape(section)}[. ]", SPECS[page], flags=re.MULTILINE):
            found.append(f"{page} §{section}")
    return found


def missing_pages(text: str) -> list[str]:
    """Paths below docs/ that are named and do not exist."""
    return [path for path in PAGE.findall(text) if not (ROOT / path).exists()]


def unpinned_actions(text: str) -> list[str]:
    """Actions of a workflow that are not named by a commit with the version beside it."""
    used = re.findall(r"uses: *(\S+)(.*)", text)
    others = [(name, rest) for name, rest in used if not name.startswith("./")]
    return [name for name, rest in others if not re.search(r"@[0-9a-f]{40}$", name) or not re.match(r" # v\d", rest)]


# --- the documents hold ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_commands_in_the_document_exist_with_their_options(path: Path) -> None:
    assert wrong_commands(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_python_in_the_document_parses_and_its_names_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    spans = [span for span in SPAN.findall(prose(text)) if span.startswith("qv.")]
    assert [name for code in (*blocks(text, "python"), *map(expression, spans)) for name in wrong_names(code)] == []


def expression(span: str) -> str:
    """What of a span of code in the prose can be parsed: its first name, if it is abridged."""
    try:
        ast.parse(span)
    except SyntaxError:
        return re.match(r"[\w.]+", span)[0]
    return span


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_configs_in_the_document_are_valid(path: Path, tmp_path: Path) -> None:
    for body in blocks(path.read_text(encoding="utf-8"), "yaml"):
        if re.search(r"^cases:", body, flags=re.MULTILINE):
            (tmp_path / "cases.yaml").write_text(body, encoding="utf-8")
            assert load([tmp_path / "cases.yaml"])


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_links_in_the_document_lead_somewhere(path: Path) -> None:
    assert broken_links(path.read_text(encoding="utf-8"), path.parent) == []


def test_readme_starts_with_the_installation_and_names_every_command_and_exit_code() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (first, *rest) = blocks(text, "console", "bash")
    assert first.startswith("pip install qeff-validate ")
    assert {"make validate", "make test"} <= set(SPAN.findall(text))
    shown = {words[1] for words in commands(text) if words[0] == "qeff-validate"}
    assert set(COMMANDS) <= shown, rest
    for code in ("0 ", "1 ", "2 ", "3 ", "130 "):
        assert re.search(rf"Exit codes:[^#]*\b{code}", text)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_config_of_this_repository_is_valid(path: Path) -> None:
    assert load([path])


def test_citations_and_named_pages_are_in_the_repository() -> None:
    wrong = []
    for path in (*DOCS, *SOURCES):
        if path != Path(__file__):  # it holds wrong ones on purpose
            text = path.read_text(encoding="utf-8")
            simulated = "card-contract" if "simulated" in path.as_posix() else None  # it implements that page
            own = path.stem if path.parent.name == "specs" else simulated
            wrong += [f"{path.relative_to(ROOT)}: {item}" for item in wrong_citations(text, own) + missing_pages(text)]
    assert wrong == []


def test_every_page_is_in_the_navigation_and_linked_from_the_start_page() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(re.findall(r"[\w/-]+\.md", navigation)) == pages
    start = set(LINK.findall((ROOT / "docs" / "index.md").read_text(encoding="utf-8")))
    assert pages - start == {"index.md", *(page for page in pages if page.startswith("decisions/"))} - start


def test_reference_has_every_public_name_once() -> None:
    text = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: qeff_validate\.(\w+)$", text, flags=re.MULTILINE)) == qeff_validate.__all__


def test_drawing_has_the_layers_of_the_import_rule_in_their_order() -> None:
    """After a change of the rule: python tools/layers_svg.py (make docs does it)."""
    layers = layers_svg.order((ROOT / "tests" / "unit" / "test_layers.py").read_text(encoding="utf-8"))
    drawn = re.findall(r'class="name"[^>]*>([^<]+)<', layers_svg.DRAWING.read_text(encoding="utf-8"))
    assert drawn == [name for layer in layers for name in layer]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_named_by_commit(path: Path) -> None:
    assert unpinned_actions(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", DEPLOYMENT, ids=lambda path: path.name)
def test_files_to_deploy_parse_and_name_commands_and_options_that_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        yaml.safe_load(text)
    commented = "\n".join(re.findall(r"^#   (.*)$", text, flags=re.MULTILINE))
    joined = re.sub(r"\\\n\s*", "", commented)
    lines = [line[line.index("qeff-validate run") :] for line in joined.splitlines() if "qeff-validate run" in line]
    assert wrong_commands("```sh\n" + "\n".join(lines) + "\n```") == []
    resources = set(re.findall(r'"?(\w+)\\?": (?:\d|\$\{CARDS)', text))
    assert resources <= {ray_cluster.CARDS, ray_cluster.COMPILER}, "what no unit asks for"


def test_shards_of_the_workflow_are_the_ones_that_it_merges() -> None:
    text = (ROOT / ".github" / "workflows" / "shards.yml").read_text(encoding="utf-8")
    share, report = yaml.safe_load(text)["jobs"].values()
    numbers = share["strategy"]["matrix"]["share"]
    (shard,) = re.findall(r'--shard "\$SHARE/(\d+)"', text)
    assert numbers == list(range(1, int(shard) + 1))
    (merged,) = [step["run"] for step in report["steps"] if "merge" in step.get("run", "")]
    assert merged.split()[2:-2] == [f"share-{number}" for number in numbers]
    runs = [step["run"] for step in (*share["steps"], *report["steps"]) if "qeff-validate" in step.get("run", "")]
    assert len(runs) == 2
    assert wrong_commands("```sh\n" + "\n".join(runs) + "\n```") == []


def action_steps() -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["runs"]["steps"]
    return steps


def test_action_is_composite_and_its_inputs_are_declared_and_never_pasted_into_a_script() -> None:
    text = ACTION.read_text(encoding="utf-8")
    action = yaml.safe_load(text)
    assert action["runs"]["using"] == "composite"
    assert set(re.findall(r"inputs\.([\w-]+)", text)) == set(action["inputs"])
    for step in action_steps():
        if "run" in step:
            assert step["shell"] == "bash"
            assert "${{" not in step["run"], "an input in a script would be run"
            assert wrong_commands(f"```bash\n{step['run']}```") == []


def test_workflow_uses_the_action_with_inputs_that_it_has() -> None:
    known = yaml.safe_load(ACTION.read_text(encoding="utf-8"))["inputs"]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    uses = [step for job in jobs.values() for step in job["steps"] if step.get("uses") == "./.github/actions/validate"]
    (step,) = uses
    assert set(step["with"]) <= set(known)
    assert {name for name, value in known.items() if value.get("required")} <= set(step["with"])
    assert all((ROOT / path).is_file() for path in step["with"]["configs"].split())


@pytest.mark.parametrize("code", [0, 1])
def test_scripts_of_the_action_keep_the_exit_code_and_the_summary(tmp_path: Path, code: int) -> None:
    program = tmp_path / "qeff-validate"
    program.write_text(f'#!/bin/sh\n[ "$1" = store ] && exit 0\necho "$@" > args\nexit {code}\n', encoding="utf-8")
    program.chmod(0o755)
    report = tmp_path / "my report"
    report.mkdir()
    (report / "report.md").write_text("# it\n", encoding="utf-8")
    names = {"GITHUB_OUTPUT": "output", "GITHUB_STEP_SUMMARY": "summary"}
    env = {name: str(tmp_path / file) for name, file in names.items()}
    env |= {"PATH": f"{tmp_path}:/usr/bin:/bin", "REPORT": "my report", "CONFIGS": "a.yaml b.yaml"}
    env |= {"ARGUMENTS": "--runtimes ort,sim"}
    scripts = {step["name"]: step["run"] for step in action_steps() if "run" in step}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]
    done = [
        subprocess.run([*shell, scripts[name]], cwd=tmp_path, env=env, check=False).returncode
        for name in ("run", "summary")
    ]
    assert done == [code, 0]
    assert (tmp_path / "args").read_text() == "run a.yaml b.yaml --report my report --runtimes ort,sim\n"
    assert (tmp_path / "output").read_text() == f"exit-code={code}\n"
    assert (tmp_path / "summary").read_text() == "# it\n"


def test_pre_commit_runs_the_checks_of_make_check() -> None:
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    checks = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in recipe.splitlines()]
    hooks = re.findall(r"entry: (.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [hook.removesuffix(" --force-exclude") for hook in hooks] == checks


# --- the checks can fail ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make validat", "make has no target 'validat'"),
        ("$ make test ARGS='-x' lnit", "make has no target 'lnit'"),
        ("qeff-validate rnu x.yaml", "qeff-validate has no command 'rnu'"),
        ("qeff-validate run x.yaml --runtime=ort  # why", "qeff-validate run has no option --runtime"),
        (".venv/bin/qeff-validate list x.yaml --sdk DIR", "qeff-validate list has no option --sdk"),
        ("A=b python -m pytest --qv-cfg x.yaml", "pytest has no option --qv-cfg"),
        ("pytest -m 'ai100 and not slwo' x", "no marker is called 'slwo'"),
    ],
)
def test_wrong_command_in_a_block_or_in_the_prose_is_found(line: str, problem: str) -> None:
    assert wrong_commands(f"Text.\n\n```console\n{line}\n```\n") == [problem]
    if not line.startswith(("$", ".", "A=")):
        assert wrong_commands(f"Say `{line.partition('  #')[0]}` first.") == [problem]


def test_right_commands_and_what_is_no_command_are_no_problem() -> None:
    lines = "make validate ARGS='--x'\nqeff-validate run x.yaml --case a -v | head --lines=3\npip install x\n"
    assert wrong_commands(f"```console\n{lines}```\n\n```yaml\nmake nothing\n```\n") == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import qeff_validate as qv\nqv.valdate(case)", "qv.valdate"),
        ("import qeff_validate\nqeff_validate.Reprot", "qv.Reprot"),
        ("from qeff_validate import Csae", "qeff_validate.Csae"),
        ("qv.no_such_name", "qv.no_such_name"),
    ],
)
def test_wrong_name_in_python_is_found(code: str, name: str) -> None:
    assert wrong_names(code) == [name]


def test_block_that_does_not_parse_is_found() -> None:
    with pytest.raises(SyntaxError):
        wrong_names("report = qv.validate(case,")


def test_link_to_what_is_not_there_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A `title`, it is\n")
    good = "[a](there.md) [b](there.md#a-title-it-is) [c](https://x.org/y) `[d](code.md)`\n# Own\n[e](#own)\n"
    assert broken_links(f"{good}[f](gone.md) [g](there.md#gone) [h](#other)", tmp_path) == [
        "gone.md",
        "there.md#gone",
        "#other",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("as card-contract §4.99 says", "card-contract §4.99"),
        ("(card-contract §4.5, §77)", "card-contract §77"),
        ("as the-contract §4 says", "the-contract §4"),
        ("DESIGN §2", "DESIGN §2"),
        ("by §4 alone", "None §4"),
    ],
)
def test_citation_of_what_is_not_in_the_repository_is_found(text: str, problem: str) -> None:
    assert wrong_citations(text) == [problem]


def test_citations_of_sections_that_are_there_are_no_problem() -> None:
    assert wrong_citations("card-contract §4.5 and §8; validation-methods §12.7,\n§14.2. In design §2") == []
    assert wrong_citations("as in §4", "card-contract") == []


def test_page_that_is_not_there_is_found() -> None:
    assert missing_pages("see docs/power.md, docs/gone.md and facts/style.md.") == ["docs/gone.md", "facts/style.md"]


def test_action_by_tag_is_found() -> None:
    pinned = f"actions/checkout@{'0' * 40}"
    text = f"- uses: {pinned} # v4\n- uses: actions/checkout@v4\n- uses: {pinned}\n"
    text += "- uses: ./.github/actions/validate\n"
    assert unpinned_actions(text) == ["actions/checkout@v4", pinned]


def test_config_with_an_unknown_key_is_found(tmp_path: Path) -> None:
    (tmp_path / "cases.yaml").write_text("cases:\n  - {name: x, sorce: 'random:bert'}\n")
    with pytest.raises(ConfigError):
        load([tmp_path / "cases.yaml"])
