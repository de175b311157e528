# SPDX-License-Identifier: Apache-2.0
"""The public surface: its names, what loading it costs, and what is in the wheel."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from processes import config, environ, first_run
from wheels import build_wheel, package_files

import qeff_validate

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = ("torch", "transformers", "onnx", "onnxruntime", "peft", "sentence_transformers", "qaicrt")
SHOW = "import sys; print(*[name for name in sys.argv[1:] if name in sys.modules])"


def loaded_after(code: str, names: tuple[str, ...], folder: Path) -> list[str]:
    """Which of these modules are loaded in a fresh process after some code has run."""
    command = [sys.executable, "-c", f"{code}\n{SHOW}", *names]
    done = subprocess.run(command, cwd=folder, env=environ(folder), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


# --- names -----------------------------------------------------------------------------------------


def test_all_is_sorted_without_repeats_and_is_what_is_public() -> None:
    names = qeff_validate.__all__
    assert names == sorted(set(names))
    assert set(names) == set(qeff_validate._HOMES)
    assert set(dir(qeff_validate)) == {*names, "__version__"}


@pytest.mark.parametrize("name", qeff_validate.__all__)
def test_public_name_is_importable_and_lives_where_it_says(name: str) -> None:
    found = getattr(qeff_validate, name)
    home = importlib.import_module(f"qeff_validate.{qeff_validate._HOMES[name]}")
    assert found is getattr(home, name)
    assert found.__doc__, "what is public is documented"


def test_names_of_the_seeds_and_of_the_notebook_are_public() -> None:
    wanted = {
        "Case", "PooledModel", "apply_peft", "build", "check_embed_model_pytorch_vs_onnx_vs_ai100",
        "generate_peft_config", "load_model_and_tokenizer", "model", "runtime", "validate",
    }  # fmt: skip
    assert wanted <= set(qeff_validate.__all__)


def test_every_error_of_the_tree_is_public() -> None:
    errors = importlib.import_module("qeff_validate.errors")
    raised = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert raised <= set(qeff_validate.__all__)
    assert all(issubclass(getattr(errors, name), errors.ValidateError) for name in raised)


def test_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'qeff_validate' has no attribute 'valdate'"):
        _ = qeff_validate.valdate


def test_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert qeff_validate.__version__ == version("qeff-validate")


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Importing the module would replace the function as an attribute of the package."""
    modules = {info.name for info in pkgutil.iter_modules(qeff_validate.__path__)}
    assert {"engine", "plugin", "cli"} <= modules
    assert modules & set(qeff_validate.__all__) == set()


# --- what is loaded --------------------------------------------------------------------------------


def test_import_of_the_package_loads_no_third_party_at_all(tmp_path: Path) -> None:
    heavy = (*FRAMEWORKS, "pydantic", "numpy", "yaml", "rich", "typer", "pytest")
    assert loaded_after("import qeff_validate", heavy, tmp_path) == []


def test_probe_for_loaded_modules_sees_them(tmp_path: Path) -> None:
    """The counterpart: the tests around this one could not fail if the probe saw nothing."""
    assert loaded_after("import qeff_validate; qeff_validate.Case", ("pydantic", "torch"), tmp_path) == ["pydantic"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["schema"], ["list", "cases.yaml"], ["run", "bad.yaml"], ["doctor"]]
)
def test_command_that_runs_no_model_loads_no_framework(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "cases.yaml").write_text("cases:\n  - {name: x, source: 'random:bert'}\n")
    (tmp_path / "bad.yaml").write_text("cases:\n  - {name: x, sorce: 'random:bert'}\n")
    code = f"from qeff_validate.cli import main\nassert main({arguments!r}) in (0, 2)"
    assert loaded_after(code, FRAMEWORKS, tmp_path) == []


def test_case_and_all_adapters_but_no_framework_load_without_a_run(tmp_path: Path) -> None:
    code = """
import qeff_validate as qv
case = qv.Case(name="x", source="random:bert")
for name in ("torch", "ort", "ai100", "sim"):
    qv.runtime(name).probe()
qv.model(case)
"""
    assert loaded_after(code, FRAMEWORKS, tmp_path) == []


@pytest.mark.slow
def test_repeated_run_of_onnx_runtime_and_the_simulator_loads_neither_torch_nor_transformers(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first_run(tmp_path_factory.getbasetemp() / "first-run")
    arguments = ["run", str(config(tmp_path)), "--runtimes", "ort,sim"]
    code = f"from qeff_validate.cli import main\nassert main({arguments!r}) == 0"
    assert loaded_after(code, ("torch", "transformers", "onnxruntime"), tmp_path) == ["onnxruntime"]


# --- what is installed -----------------------------------------------------------------------------


@pytest.mark.slow
def test_wheel_holds_every_module_and_the_data_files_and_no_test(tmp_path: Path) -> None:
    wheel, package = build_wheel(tmp_path), package_files()
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {path.relative_to(ROOT).as_posix() for path in package} <= names
    data = {"py.typed", "suites/default.yaml", "suites/quickstart.yaml", "config/schema.json"}
    data |= {"sdk/simulated/versions/apps.xml", "sdk/simulated/versions/platform.xml"}
    assert {f"qeff_validate/{name}" for name in data} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"qeff_validate"}
