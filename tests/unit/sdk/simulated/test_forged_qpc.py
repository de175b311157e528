# SPDX-License-Identifier: Apache-2.0
"""Forged QPCs with valid CRCs are refused by errors and statuses of the bindings that name the problem."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from qeff_validate.artifact import Artifact
from qeff_validate.errors import RunError, Unavailable
from qeff_validate.protocols import runtime
from qeff_validate.sdk.simulated import qpc
from qeff_validate.sdk.simulated.bindings import QAicApi_pb2 as aicapi
from qeff_validate.sdk.simulated.bindings import qaicrt as rt
from qeff_validate.sdk.simulated.compiler import qaic_compile

X = np.arange(6, dtype=np.float32).reshape(2, 3)
PREAMBLE = struct.Struct("<8sIIQQQ")
SANE = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A program with a weight and retained state: y = x + w, s_RetainedState = s + x."""
    folder = tmp_path_factory.mktemp("forged")
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in ("x", "s", "y")}
    infos["t"] = helper.make_tensor_value_info("s_RetainedState", TensorProto.FLOAT, [2, 3])
    nodes = [helper.make_node("Add", ["x", "w"], ["y"]), helper.make_node("Add", ["s", "x"], ["s_RetainedState"])]
    weight = numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    graph = helper.make_graph(nodes, "g", [infos["x"], infos["s"]], [infos["y"], infos["t"]], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")
    flags = [f"-m={folder / 'm.onnx'}", "-aic-hw", "-retained-state", f"-aic-binary-dir={folder / 'qpc'}"]
    assert qaic_compile.main(flags) == 0
    return (folder / "qpc" / qpc.FILE_NAME).read_bytes()


class Parts:
    """The parts of a QPC, to be written again with valid CRCs."""

    def __init__(self, data: bytes) -> None:
        _, _, _, _, place, length = PREAMBLE.unpack(data[: PREAMBLE.size])
        self.header: Any = json.loads(data[place : place + length])
        self.segments = {name: data[e["offset"] :][: e["size"]] for name, e in self.header["segments"].items()}
        self.raw: bytes | None = None

    def desc(self) -> Any:
        return aicapi.IoDesc.FromString(self.segments["iodesc"])

    def data(self, change: Callable[[Any], object] = lambda header: None) -> bytes:
        body, places = b"", {}
        for name, segment in self.segments.items():
            places[name] = {"offset": 4096 + len(body), "size": len(segment), "crc32": zlib.crc32(segment)}
            body += segment
        self.header["segments"] = places
        changed = change(self.header)
        header = self.raw or json.dumps(self.header if changed is None else changed).encode("utf-8", "surrogatepass")
        place = 4096 + len(body)
        start = PREAMBLE.pack(qpc.MAGIC, 1, zlib.crc32(header), place + len(header), place, len(header))
        return start.ljust(4096, b"\0") + body + header


def outcome(folder: Path, data: bytes) -> str:
    """Return ``ran``, or the text of a refusal; other exceptions are raised."""
    folder.mkdir(exist_ok=True)
    (folder / qpc.FILE_NAME).write_bytes(data)
    try:
        with runtime("sim").open(Artifact("qpc", folder, "0")) as session:
            outputs = session.run({"x": X, "s": X}, fetch=["y"])
    except (RunError, Unavailable) as exc:
        return str(exc)
    return "ran" if outputs["y"].shape == X.shape else "ran with other shapes"


def test_what_is_put_together_again_unchanged_runs(original: bytes, tmp_path: Path) -> None:
    assert outcome(tmp_path / "q", Parts(original).data()) == "ran"


FIELDS = {
    "num_cores": [-1, 0, 17, 2**60, 2**70, 1.5, "4", True, None, [4]],
    "num_devices": [-1, 0, 2**60, 1.5, "1", None],
    "hw_version": [None, 3, [], "ai300"],
    "precision": [None, 3],
    "sdk_version": [None, {}],
    "simulated": [False, None, 1],
    "retained": [None, [], {"s": 1}, {"s": "nobody"}, {"nobody": "s_RetainedState"}, {"y": "x"}, {"x": "s"}],
    "mxint8": [None, {}, [1], ["x"], ["nobody"]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in FIELDS.items() for value in values])
def test_wrong_field_of_a_header_is_refused_and_named(name: str, value: Any, original: bytes, tmp_path: Path) -> None:
    text = outcome(tmp_path / "q", Parts(original).data(lambda header: {**header, name: value}))
    assert text != "ran"
    assert name in text or "retained" in text or "Version" in text, text


@pytest.mark.parametrize("name", ["num_cores", "num_devices", "hw_version", "simulated", "segments"])
def test_missing_field_of_a_header_is_refused(name: str, original: bytes, tmp_path: Path) -> None:
    change = lambda header: {key: value for key, value in header.items() if key != name}  # noqa: E731
    assert name.removesuffix("s") in outcome(tmp_path / "q", Parts(original).data(change))


@pytest.mark.parametrize("part", ["constants", "network.onnx", "iodesc"])
@pytest.mark.parametrize(
    ("key", "value"),
    [(k, v) for k in ("offset", "size", "crc32") for v in (-1, 2**40, 2**60, 2**70, 1.5, "1", None, True)],
)
def test_wrong_place_of_a_segment_is_refused(part: str, key: str, value: Any, original: bytes, tmp_path: Path) -> None:
    def change(header: Any) -> None:
        header["segments"][part][key] = value

    assert "truncated or corrupt" in outcome(tmp_path / "q", Parts(original).data(change))


@pytest.mark.parametrize(
    "raw", [b"[" * 10**5, b"\xff", b"[]", b"3", b"null", b"", b"{}", b'{"a":' * 10**4, b"9" * 9999]
)
def test_header_that_is_no_object_is_refused(raw: bytes, original: bytes, tmp_path: Path) -> None:
    parts = Parts(original)
    parts.raw = raw or b" "
    assert "truncated or corrupt" in outcome(tmp_path / "q", parts.data())


def twice(desc: Any) -> None:
    desc.selected_set.bindings.add().CopyFrom(desc.selected_set.bindings[0])


def shapes(*dims: list[int]) -> Callable[[Any], None]:
    def change(desc: Any) -> None:
        entry = desc.allowed_shapes.add()
        for each in dims:
            entry.shapes.add(type=0, dims=each)

    return change


def binding(**fields: Any) -> Callable[[Any], None]:
    def change(desc: Any) -> None:
        first = desc.selected_set.bindings[0]
        if "dims" in fields:
            del first.dims[:]
            first.dims.extend(fields["dims"])
        for name, value in fields.items():
            if name != "dims":
                setattr(first, name, value)

    return change


DESCRIPTIONS: dict[str, Callable[[Any], object]] = {
    "no bindings": lambda desc: desc.selected_set.Clear(),
    "binding twice": twice,
    "negative dims": binding(dims=[-2, 3]),
    "two negative dims": binding(dims=[-2, -3]),
    "huge dims": binding(dims=[2**31 - 1] * 4),
    "huge size": binding(dims=[2**20, 2**10], size=2**32 - 1),
    "other size": binding(size=3),
    "other dims": binding(dims=[3, 3], size=36),
    "other rank": binding(dims=[6]),
    "unknown type": binding(type=77),
    "invalid type": binding(type=0xFF),
    "other type": binding(type=7, size=48),
    "unknown direction": binding(dir=5),
    "other direction": binding(dir=1),
    "no name": binding(name=""),
    "other name": binding(name="z"),
    "index": binding(index=2**32 - 1),
    "too few shapes": shapes([2, 3]),
    "negative shape": shapes([-2, 3], [2, 3], [2, 3], [2, 3]),
    "huge shape": shapes([2**31 - 1, 2**31 - 1], [2, 3], [2, 3], [2, 3]),
    "shape of another rank": shapes([6], [2, 3], [2, 3], [2, 3]),
}


@pytest.mark.parametrize("change", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_wrong_description_is_refused(change: Callable[[Any], object], original: bytes, tmp_path: Path) -> None:
    parts = Parts(original)
    desc = parts.desc()
    change(desc)
    parts.segments["iodesc"] = desc.SerializeToString()
    assert outcome(tmp_path / "q", parts.data()) != "ran"


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, b"\x12" + b"\xff" * 9, b"\x0a\x05ab"])
@pytest.mark.parametrize("part", ["iodesc", "network.onnx"])
def test_segment_that_is_no_message_is_refused(part: str, data: bytes, original: bytes, tmp_path: Path) -> None:
    parts = Parts(original)
    parts.segments[part] = data
    assert outcome(tmp_path / "q", parts.data()) != "ran"


def test_network_with_functions_or_weights_elsewhere_is_refused(original: bytes, tmp_path: Path) -> None:
    for word in ("its network has functions", "lies in"):
        parts = Parts(original)
        model = onnx.load_from_string(parts.segments["network.onnx"])
        if word.endswith("functions"):
            made = [helper.make_node("Neg", ["a"], ["b"])]
            model.functions.append(helper.make_function("own", "f", ["a"], ["b"], made, [helper.make_opsetid("", 17)]))
        else:
            tensor = TensorProto(name="v", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="../../../etc/passwd")
            model.graph.initializer.append(tensor)
        parts.segments["network.onnx"] = model.SerializeToString()
        assert word in outcome(tmp_path / "q", parts.data())


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_program_that_is_no_file_is_refused_and_not_waited_for(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / qpc.FILE_NAME)
    with pytest.raises(RuntimeError, match="Failed to create Qpc"):
        rt.Qpc(str(tmp_path))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@SANE
@given(st.sampled_from([*FIELDS, "segments", "other"]), VALUES)
def test_any_value_in_a_header_is_refused_or_harmless(original: bytes, tmp_path: Path, name: str, value: Any) -> None:
    outcome(tmp_path / "q", Parts(original).data(lambda header: {**header, name: value}))


@SANE
@given(st.data())
def test_any_bytes_in_a_signed_part_are_refused_or_harmless(
    original: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    parts = Parts(original)
    name = data.draw(st.sampled_from(["iodesc", "network.onnx"]))
    segment = bytearray(parts.segments[name])
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(segment) - 1))
        segment[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=3))
    parts.segments[name] = bytes(segment)
    outcome(tmp_path / "q", parts.data())


@SANE
@given(st.integers(0, 2**20), st.binary(min_size=1, max_size=12))
def test_any_bytes_in_a_file_are_refused(original: bytes, tmp_path: Path, at: int, inserted: bytes) -> None:
    at %= len(original)
    data = original[:at] + inserted + original[at + len(inserted) :]
    text = outcome(tmp_path / "q", data)
    assert (text == "ran") == (data == original or not touched(original, at, len(inserted)))


def touched(data: bytes, at: int, length: int) -> bool:
    """Return True if a change affects more than the padding of the first page."""
    return at < PREAMBLE.size or at + length > 4096 or at + length > len(data)
