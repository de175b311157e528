# SPDX-License-Identifier: Apache-2.0
"""The simulator's QPC: one file, `<dir>/programqpc.bin`. Real cards refuse it, and the simulator refuses real QPCs.

Layout, little-endian (the real format, card-contract §5, shares only the file name)::

    page 0      preamble: magic, format version, crc of the header, total size, offset and size of the header
    page 1 …    segment constants: the weights, page-aligned, so that ONNX Runtime can map them
    then        segments network.onnx (refers to the weights as external data in this very file) and iodesc
    at the end  header: JSON with the segments (offset, size, crc32) and the required resources

The header comes last because the CRCs are known only after the weights were streamed.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import onnxruntime as ort

from .errors import QpcError
from .qpc_checks import header_problem
from .weights import CHUNK, Weight

FILE_NAME = "programqpc.bin"
MAGIC = b"QSIMQPC\x00"
REAL_MAGIC = (0x00A1CD7C).to_bytes(4, "little")
FORMAT_VERSION = 1
PAGE = 4096
MOST_PACKED = 1 << 30
"""Bytes of constants above which ONNX Runtime reads them from the mapped file, and copies none into memory."""
_PREAMBLE = struct.Struct("<8sIIQQQ")
_SEGMENTS = ("constants", "network.onnx", "iodesc")


@dataclass(frozen=True, slots=True)
class Program:
    """A verified QPC without its weights.

    Attributes:
        path: of programqpc.bin.
        header: the decoded header.
        network: serialized ModelProto, whose weights are external data in the same file.
        io_desc: serialized IoDesc (card-contract §3).
    """

    path: Path
    header: Mapping[str, Any]
    network: bytes
    io_desc: bytes

    @property
    def num_cores(self) -> int:
        """Number of NSPs that an activation takes on each card."""
        return int(self.header["num_cores"])

    @property
    def num_devices(self) -> int:
        """Number of cards that an activation needs."""
        return int(self.header["num_devices"])

    @property
    def hw_version(self) -> str:
        """The card generation that it was compiled for, ai100 or ai200."""
        return str(self.header["hw_version"])


class _PageWriter:
    """Writes data aligned to pages and computes their CRC."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.crc = file, 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.crc = zlib.crc32(data, self.crc)

    def align(self) -> int:
        self.write(b"\x00" * (-self.file.tell() % PAGE))
        return self.file.tell()


def write(
    directory: Path,
    *,
    model: Any,
    weights: Iterable[Weight],
    io_desc: bytes,
    facts: Mapping[str, Any],
    verify: Callable[[Program], None] | None = None,
) -> Path:
    """Write `<directory>/programqpc.bin` atomically: it is complete and accepted by `verify`, or not written.

    Args:
        directory: created if missing; unchanged on failure.
        model: ModelProto whose external initializers are the stubs of the weights; their locations are filled in.
        weights: read once, in chunks.
        io_desc: serialized IoDesc.
        facts: header entries: num_cores, num_devices, hw_version, precision, sdk_version, retained, mxint8, in_place.
        verify: called with the finished program before it gets its final name; raises to refuse it.
    """
    created = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".compiling-", dir=directory) as work:
            # with the final file name, because the network refers to the weights by it
            draft = Path(work) / FILE_NAME
            with draft.open("wb") as file:
                _write_file(file, model, weights, io_desc, facts)
            if verify is not None:
                verify(read(Path(work)))
            os.replace(draft, directory / FILE_NAME)
    except BaseException:
        if created:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory / FILE_NAME


def _write_file(
    file: IO[bytes], model: Any, weights: Iterable[Weight], io_desc: bytes, facts: Mapping[str, Any]
) -> None:
    file.write(b"\x00" * PAGE)
    segments: dict[str, dict[str, int]] = {}
    crc = _write_weights(_PageWriter(file), model, weights)
    segments["constants"] = {"offset": PAGE, "size": file.tell() - PAGE, "crc32": crc}
    for name, data in (("network.onnx", model.SerializeToString()), ("iodesc", io_desc)):
        segments[name] = {"offset": file.tell(), "size": len(data), "crc32": zlib.crc32(data)}
        file.write(data)
    header = json.dumps({"simulated": True, **facts, "segments": segments}, sort_keys=True).encode()
    place = file.tell()
    file.write(header)
    total = file.tell()
    file.seek(0)
    file.write(_PREAMBLE.pack(MAGIC, FORMAT_VERSION, zlib.crc32(header), total, place, len(header)))


def _write_weights(writer: _PageWriter, model: Any, weights: Iterable[Weight]) -> int:
    stubs = {tensor.name: tensor for tensor in model.graph.initializer}
    for weight in weights:
        stub, offset = stubs[weight.name], writer.align()
        for chunk in weight.chunks():
            writer.write(chunk)
        if writer.file.tell() - offset != weight.nbytes:
            raise RuntimeError(f"weight {weight.name} has not the promised {weight.nbytes} bytes")
        del stub.external_data[:]
        for key, value in (("location", FILE_NAME), ("offset", offset), ("length", weight.nbytes)):
            stub.external_data.add(key=key, value=str(value))
    writer.align()
    return writer.crc


def read(directory: Path) -> Program:
    """Read and verify the QPC in a directory; the CRC of every segment is checked.

    Raises:
        QpcError: the file is missing, a real card's QPC, no QPC, damaged, or has another format version.
    """
    path = directory / FILE_NAME
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
            raise QpcError(f"Failed to open file{path}: it is no regular file")
        file = path.open("rb")
    except OSError as error:
        raise QpcError(
            f"Failed to open file{path}: {error.strerror}; pass the directory that holds {FILE_NAME}"
        ) from error
    with file:
        try:
            header = _read_header(file, path)
            data = {name: _read_segment(file, path, name, header["segments"][name]) for name in _SEGMENTS}
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, struct.error) as error:
            raise _damaged(path, f"its header is not readable ({type(error).__name__}: {str(error)[:200]})") from error
    return Program(path, header, data["network.onnx"], data["iodesc"])


def _damaged(path: Path, what: str) -> QpcError:
    return QpcError(f"{path} is truncated or corrupt: {what}; compile it again")


def _read_header(file: IO[bytes], path: Path) -> dict[str, Any]:
    start, size = file.read(_PREAMBLE.size), os.fstat(file.fileno()).st_size
    if start[:4] == REAL_MAGIC:
        raise QpcError(f"{path} is a real card's QPC; the simulator can not run it, compile for the simulator")
    if not start or (len(start) < len(MAGIC) and MAGIC.startswith(start)):
        raise _damaged(path, f"it has {size} bytes")
    if start[:8] != MAGIC:
        raise QpcError(f"{path} is not a QPC: it starts with {start[:8].hex(' ')}")
    if len(start) < _PREAMBLE.size:
        raise _damaged(path, f"it has {size} bytes")
    _, version, crc, total, place, length = _PREAMBLE.unpack(start)
    if version != FORMAT_VERSION:
        raise QpcError(f"{path} has QPC format {version}, not {FORMAT_VERSION}; compile it again")
    if size != total or place + length > size:
        raise _damaged(path, f"it has {size} bytes instead of {total}")
    file.seek(place)
    raw = file.read(length)
    if zlib.crc32(raw) != crc:
        raise _damaged(path, "the crc of its header does not match")
    header = json.loads(raw)
    if not isinstance(header, dict):
        raise ValueError("not an object")
    if problem := header_problem(header, _SEGMENTS, size):
        raise _damaged(path, problem)
    return header


def _read_segment(file: IO[bytes], path: Path, name: str, entry: Mapping[str, int]) -> bytes:
    """Verify one segment and return its bytes; the constants are only verified and remain in the file."""
    file.seek(entry["offset"])
    remaining, crc, chunks = entry["size"], 0, []
    while remaining > 0 and (chunk := file.read(min(CHUNK, remaining))):
        remaining, crc = remaining - len(chunk), zlib.crc32(chunk, crc)
        if name != "constants":
            chunks.append(chunk)
    if remaining or crc != entry["crc32"]:
        raise _damaged(path, f"the crc of segment {name} does not match")
    return b"".join(chunks)


def open_session(program: Program, *, check_only: bool = False) -> ort.InferenceSession:
    """Open the program in ONNX Runtime, with the weights mapped from the QPC instead of copied.

    Args:
        program: from `read`; its file must still exist.
        check_only: only check that it opens: no optimization, no prepacked weights.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # an int8 input is dequantized as the custom IO list states, not fused into int8 arithmetic
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.add_session_config_entry("session.x64quantprecision", "1")  # else sums of uint8 and int8 may saturate
    folder = "session.model_external_initializers_file_folder_path"
    options.add_session_config_entry(folder, str(program.path.parent))
    if threads := os.environ.get("QAIC_SIM_THREADS"):
        options.intra_op_num_threads = int(threads)
    if check_only:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if check_only or int(program.header["segments"]["constants"]["size"]) > MOST_PACKED:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return ort.InferenceSession(program.network, options, providers=["CPUExecutionProvider"])
