# SPDX-License-Identifier: Apache-2.0
"""The packages of extras are missing: bundles and recorded references run, and errors name the extra.

Here the imports are blocked; tests/install makes environments in which the packages are indeed absent.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import case, config, environ, made_for_another_host

import qeff_validate
from qeff_validate.errors import (
    EXTRAS,
    MissingPackage,
    ValidateError,
    as_missing_package,
    missing_package,
    naming_extras,
)

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.integration


def without_extras(folder: Path, code: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process whose imports of optional packages fail, with `main` at hand."""
    block = f"import sys; sys.modules.update(dict.fromkeys({sorted(EXTRAS)!r}))\nfrom qeff_validate.cli import main\n"
    command = [sys.executable, "-c", block + code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environ(folder), capture_output=True, text=True, check=False)


def run(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return without_extras(folder, "sys.exit(main(sys.argv[1:]))", *arguments)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, an ONNX file and its recorded reference."""
    return made_for_another_host(tmp_path_factory.mktemp("made"), "tolerance: table")


def test_bundle_runs_without_the_packages_of_extras(made: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "run", "--bundle", made / "bundle", "--store", tmp_path / "store")
    assert (done.returncode, "Proved: sim" in done.stdout) == (0, True), done.stdout + done.stderr


def test_onnx_file_runs_against_a_recorded_reference_without_the_packages_of_extras(made: Path, tmp_path: Path) -> None:
    artifacts = f"artifacts: {{onnx: {made}/model.onnx, reference: {made}/tiny.safetensors}}"
    cases = config(tmp_path, case(extra=f"tolerance: table\nruntimes: [ort, sim]\n{artifacts}"))
    done = run(tmp_path, "run", cases, "--store", tmp_path / "store")
    assert (done.returncode, done.stdout.count("Proved: ")) == (0, 2), done.stdout + done.stderr


def test_run_that_needs_an_extra_is_an_error_that_names_it_once(tmp_path: Path) -> None:
    done = run(tmp_path, "run", config(tmp_path), "--runtimes", "torch,ort,sim", "--store", tmp_path / "store")
    assert done.returncode == 3
    assert (
        "tiny-torch: not_run: this needs PyTorch, which is not installed: pip install 'qeff-validate[torch]'"
        in done.stdout
    )
    assert "tiny-ort, tiny-sim: error at" in done.stdout
    assert done.stdout.count("pip install 'qeff-validate[torch]'") == 2
    assert "Traceback" not in done.stdout + done.stderr
    assert "note:" not in done.stdout


def test_pytest_and_doctor_name_the_extra(tmp_path: Path) -> None:
    suites = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--qv-config",
        config(tmp_path),
        "--qv-runtimes",
        "ort",
        "-k",
        "mini or tiny",
    ]
    code = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    done = without_extras(tmp_path, code, *suites, "--qv-store", tmp_path / "s", "--pyargs", "qeff_validate.suites")
    assert (done.returncode, "pip install 'qeff-validate[torch]'" in done.stdout) == (1, True), done.stdout
    shown = run(tmp_path, "doctor")
    assert re.search(
        r"torch +this needs PyTorch, which is not installed: pip install 'qeff-validate\[torch\]'", shown.stdout
    )


def test_public_names_of_an_extra_say_which(tmp_path: Path) -> None:
    code = """
import qeff_validate as qv
for name in qv.__all__:
    try:
        getattr(qv, name)
    except qv.MissingPackage as exc:
        print(name, exc)
"""
    done = without_extras(tmp_path, code)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == [
        "PooledModel", "apply_peft", "generate_peft_config", "load_model_and_tokenizer",
    ]  # fmt: skip
    assert (
        "generate_peft_config this needs PEFT, which is not installed: pip install 'qeff-validate[peft]'" in done.stdout
    )


def test_only_optional_packages_are_translated() -> None:
    with pytest.raises(ModuleNotFoundError), naming_extras():
        import no_such_module  # noqa: F401
    with pytest.raises(MissingPackage, match=r"qeff-validate\[torch\]"), naming_extras():
        raise ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    inner = ModuleNotFoundError("No module named 'peft.tuners'", name="peft.tuners")
    outer = RuntimeError("cannot import LoraModel")
    outer.__cause__ = inner
    assert str(as_missing_package(outer)) == str(missing_package("peft"))
    assert as_missing_package(ValueError("other")) is None
    assert issubclass(MissingPackage, ValidateError)
    assert qeff_validate.MissingPackage is MissingPackage


def test_each_optional_package_belongs_to_the_extra_that_its_error_names() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    base = text.partition("dependencies = [")[2].partition("\n]")[0]
    for module, (_, extra) in EXTRAS.items():
        package = module.replace("_", "-")
        if package != "tokenizers":  # comes with transformers
            assert re.search(rf'^{extra} = \[.*"{package}[\w-]*>=', text, flags=re.MULTILINE), package
        assert f'"{package}>=' not in base
