# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import qeff_validate.sdk.simulated as sim
from qeff_validate.sdk.simulated import device, release, tools

ROOT = Path(__file__).parents[4]


def records(text: str) -> list[dict[str, str]]:
    """Parse as real clients do: split at QID lines, then tab-indented `Key:Value`."""
    blocks = re.split(r"^QID \d+$", text, flags=re.MULTILINE)[1:]
    return [dict(line[1:].split(":", 1) for line in block.splitlines() if line.startswith("\t")) for block in blocks]


def test_query_of_two_devices(monkeypatch, capsys):
    monkeypatch.setenv("QAIC_SIM_DEVICES", "2")
    device.card(1).reserve(6, 768)
    assert tools.main(["qaic-util", "-q"]) == 0
    out = capsys.readouterr().out
    assert "Number of devices queried: 2\nQID 0\n\tStatus:Ready\n" in out
    first, second = records(out)
    assert (first["Nsp Total"], first["Nsp Free"], second["Nsp Free"]) == ("16", "16", "10")
    assert (first["Dram Total"], second["Dram Free"]) == ("32768 MB", "32000 MB")
    assert re.fullmatch(r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.\d", first["PCI Address"])
    assert "MDP+" in first["Device Capabilities"]
    assert "HybridBoot+" in first["Device Capabilities"]
    assert first["HW Version"].startswith("2.")
    assert "AIC200" not in first["FW IMAGE_VARIANT"]


def test_query_of_one_device(monkeypatch, capsys):
    monkeypatch.setenv("QAIC_SIM_DEVICES", "3")
    assert tools.main(["qaic-util", "-q", "-d", "2"]) == 0
    assert re.findall(r"^QID (\d+)$", capsys.readouterr().out, re.MULTILINE) == ["2"]


def test_query_without_devices(monkeypatch, capsys):
    monkeypatch.setenv("QAIC_SIM_DEVICES", "0")
    assert tools.main(["qaic-util", "-q"]) == 0
    assert records(capsys.readouterr().out) == []


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["qaic-util"],
        ["qaic-util", "-q", "-d"],
        ["qaic-util", "-q", "-d", "9"],
        ["qaic-version-util"],
        ["other"],
    ],
)
def test_bad_usage(argv, capsys):
    assert tools.main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err


@pytest.mark.parametrize("image", ["apps", "platform"])
def test_versions(image, capsys):
    assert tools.main(["qaic-version-util", f"--{image}"]) == 0
    tree = ET.parse(release.VERSIONS / f"{image}.xml")
    assert capsys.readouterr().out.strip() == next(tree.iter("base_version")).text == "1.22.0.120"
    assert next(tree.iter("simulated")).text == "true"


def test_as_a_process_from_another_prefix(tmp_path):
    """A copy of the package works under another name, without the library."""
    shutil.copytree(Path(sim.__file__).parent, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "elsewhere.tools", "qaic-util", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=True)
    assert len(records(done.stdout)) == 1
    code = (
        "import elsewhere.bindings.qaicrt, elsewhere.compiler.qaic_compile, sys; print('qeff_validate' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.strip() == "False"


def test_the_package_declares_itself():
    assert sim.SIMULATED is True
