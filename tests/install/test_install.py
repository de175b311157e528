# SPDX-License-Identifier: Apache-2.0
"""The wheel in fresh environments from a package index: without PyTorch, and the first commands of the README.

``make test-install`` runs this; tests/unit/test_extras.py blocks imports instead, in seconds.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from processes import case, config, made_for_another_host
from wheels import ROOT, build_wheel

CONSTRAINTS = ROOT / "requirements" / "constraints.txt"
HEAVY = {"torch", "transformers", "peft", "tokenizers", "huggingface-hub", "onnxscript", "onnx-ir", "scipy", "gguf"}
MOST_SECONDS = 90
"""Of processor time from `init` to the first verdict."""

pytestmark = [pytest.mark.slow, pytest.mark.environments]


class Environment:
    """A fresh virtual environment; commands see nothing of this one.

    Args:
        folder: where it is made; also the working directory of its commands.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run([sys.executable, "-m", "venv", str(folder / "env")], check=True)
        path = f"{folder / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.variables = {**kept, "PATH": path, "QEFF_VALIDATE_HOME": str(folder / "store"), "COLUMNS": "200"}

    def run(self, *command: str | Path, code: int = 0) -> str:
        """Return what a command prints; its exit code must be as wanted."""
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == code, done.stdout[-4000:]
        return done.stdout

    def install(self, *requirements: str | Path) -> None:
        pinned = ("--constraint", CONSTRAINTS) if sys.version_info[:2] == (3, 11) else ()
        self.run("pip", "install", "--quiet", *pinned, *requirements)

    def packages(self) -> set[str]:
        lines = self.run("pip", "list", "--format", "freeze", "--disable-pip-version-check").splitlines()
        return {line.partition("==")[0].lower() for line in lines}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with what `pip install qeff-validate` brings."""
    made = Environment(tmp_path_factory.mktemp("bare"))
    made.install(wheel)
    return made


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What another host has made: a bundle, an ONNX file and its recorded reference, with a measured noise floor."""
    return made_for_another_host(tmp_path_factory.mktemp("host"))


def test_base_installation_has_no_pytorch_and_runs_a_bundle_and_a_recorded_reference(
    bare: Environment, host: Path
) -> None:
    assert bare.packages() & HEAVY == set()
    assert "Proved: sim, a simulated AI 100, agrees" in bare.run("qeff-validate", "run", "--bundle", host / "bundle")
    artifacts = f"artifacts: {{onnx: {host}/model.onnx, reference: {host}/tiny.safetensors}}"
    cases = config(bare.folder, case(extra=f"runtimes: [ort, sim]\n{artifacts}"))
    said = bare.run("qeff-validate", "run", cases)
    assert "Proved: ort agrees" in said
    assert "Proved: sim, a simulated AI 100, agrees" in said


def test_base_installation_answers_every_other_command_and_names_the_extra(bare: Environment) -> None:
    assert "tiny" in bare.run("qeff-validate", "list", config(bare.folder, case()))
    assert "init" in bare.run("qeff-validate", "--help")
    assert '"$defs"' in bare.run("qeff-validate", "schema")
    shown = bare.run("qeff-validate", "doctor")
    assert re.search(r"ort +usable\n +sim +usable", shown)
    wanted = "pip install 'qeff-validate[torch]'"
    assert shown.count(wanted) >= 3
    assert wanted in bare.run("qeff-validate", "run", config(bare.folder, case()), code=3)
    suites = ("--qv-config", config(bare.folder, case()), "--pyargs", "qeff_validate.suites")
    assert wanted in bare.run("pytest", "-q", *suites, "--qv-runtimes", "ort", code=1)
    bare.run("qeff-validate", "init", "--quickstart")
    assert "minilm-cls" in bare.run("qeff-validate", "list", "validation.yaml")


def test_numbers_of_passing_tests_reach_pytest_html_and_allure(bare: Environment, host: Path) -> None:
    bare.install("pytest-html>=4", "allure-pytest>=2.15")
    artifacts = f"artifacts: {{onnx: {host}/model.onnx, reference: {host}/tiny.safetensors}}"
    cases = config(bare.folder, case(extra=f"runtimes: [ort]\n{artifacts}"))
    reports = ("--html", "out.html", "--self-contained-html", "--alluredir", "allure")
    bare.run("pytest", "-q", "--qv-config", cases, *reports, "--pyargs", "qeff_validate.suites.test_embedding")
    line = re.compile(r"output\.rel_l2 = \S+ \(bound \S+, floor\)")
    assert line.search((bare.folder / "out.html").read_text(encoding="utf-8"))
    (result,) = (bare.folder / "allure").glob("*-result.json")
    (attached,) = json.loads(result.read_text(encoding="utf-8"))["attachments"]
    assert line.search((bare.folder / "allure" / attached["source"]).read_text(encoding="utf-8"))


READ_MLFLOW = """
import json, mlflow
(run,) = mlflow.search_runs(output_format="list")
files = [item.path for item in mlflow.artifacts.list_artifacts(run_id=run.info.run_id)]
print(json.dumps({"metrics": run.data.metrics, "tags": run.data.tags, "files": files}))
"""

READ_OTLP = """
import json, sys
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
request = ExportMetricsServiceRequest.FromString(open(sys.argv[1], "rb").read())
points = [
    [metric.name, {item.key: item.value.string_value for item in point.attributes}, point.as_double or point.as_int]
    for resource in request.resource_metrics for scope in resource.scope_metrics
    for metric in scope.metrics for point in metric.gauge.data_points
]
print(json.dumps(points))
"""


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """An HTTP server on the loopback address: its endpoint, and paths and bodies of what it was sent."""
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append((self.path, gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", received
        server.shutdown()


def test_reporters_reach_mlflow_and_an_opentelemetry_collector(
    bare: Environment, wheel: Path, host: Path, collector: tuple[str, list[tuple[str, bytes]]]
) -> None:
    endpoint, received = collector
    bare.install(f"{wheel}[mlflow,opentelemetry]")
    bare.variables |= {
        "MLFLOW_TRACKING_URI": (bare.folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
    }
    run = ("qeff-validate", "run", "--bundle", host / "bundle", "--reporter", "mlflow", "--reporter", "opentelemetry")
    bare.run(*run)
    results = json.loads((bare.folder / "qv-report" / "report.json").read_text(encoding="utf-8"))["results"]
    numbers = {metric["name"]: metric["value"] for metric in results[0]["metrics"]}

    logged = json.loads(bare.run("python", "-W", "ignore", "-c", READ_MLFLOW).splitlines()[-1])
    assert logged["metrics"] == pytest.approx({f"tiny/sim/{name}": value for name, value in numbers.items()})
    assert (logged["tags"]["status.tiny-sim"], logged["tags"]["passed"]) == ("pass", "True")
    assert sorted(logged["files"]) == ["report.json", "report.md"]

    ((path, body),) = received
    assert path == "/v1/metrics"
    (bare.folder / "otlp").write_bytes(body)
    points = json.loads(bare.run("python", "-c", READ_OTLP, "otlp"))
    sent = {attributes["metric"]: value for name, attributes, value in points if name == "qeff_validate.metric"}
    assert sent == pytest.approx(numbers)
    passed = [(attributes["case"], value) for name, attributes, value in points if name == "qeff_validate.passed"]
    assert passed == [("tiny", 1)]

    bare.variables["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:9"  # the port of discard, where nothing listens
    bare.variables["OTEL_EXPORTER_OTLP_TIMEOUT"] = "1"
    said = bare.run(*run[:4], "--reporter", "opentelemetry", code=3)
    assert "the reporter 'opentelemetry' failed" in said
    assert " pass " in said


def test_first_commands_of_the_readme_end_with_a_proof(wheel: Path, tmp_path: Path) -> None:
    fresh = Environment(tmp_path)
    block = re.search(r"```console\n(pip install qeff-validate .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    commands = [shlex.split(line, comments=True) for line in block[1].splitlines()]
    assert [words[0] for words in commands] == ["pip", "pip", "qeff-validate", "qeff-validate"]
    for words in commands[:2]:
        assert words[1] == "install"
        fresh.install(*(word.replace("qeff-validate", str(wheel)) for word in words[2:]))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fresh.run(*commands[2])
    said = fresh.run(*commands[3])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"from init to the verdict: {seconds:.0f} s of processor time")  # noqa: T201
    assert "Proved: ort agrees with Hugging Face" in said
    assert "Proved: sim, a simulated AI 100, agrees" in said
    assert seconds < MOST_SECONDS
    assert "passed" in fresh.run("pytest", "-q", "-k", "ort")
