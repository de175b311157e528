# SPDX-License-Identifier: Apache-2.0
"""The IoDesc messages of package `aicapi` (card-contract §3), under the module name that real clients import.

They are built from a descriptor in a separate pool: generated code would refuse an older protobuf runtime, and the
default pool would clash with the real module in the same process.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.internal import enum_type_wrapper

_DIRECTIONS = {"BUFFER_IO_TYPE_INPUT": 0, "BUFFER_IO_TYPE_OUTPUT": 1}
_DATA_TYPES = {
    "FLOAT_TYPE": 0,
    "FLOAT_16_TYPE": 1,
    "INT8_Q_TYPE": 2,
    "UINT8_Q_TYPE": 3,
    "INT16_Q_TYPE": 4,
    "INT32_Q_TYPE": 5,
    "INT32_I_TYPE": 6,
    "INT64_I_TYPE": 7,
    "INT8_TYPE": 8,
    "BFLOAT16_TYPE": 11,
    "TYPE_INVALID": 0xFF,
}
_ENUMS = {"bufferIoDirectionEnum": _DIRECTIONS, "bufferIoDataTypeEnum": _DATA_TYPES}

# By message: (field, number, type) of each field; a type that ends with * is repeated.
_MESSAGES: dict[str, list[tuple[str, int, str]]] = {
    "TensorShape": [("type", 1, "bufferIoDataTypeEnum"), ("dims", 2, "int32*")],
    "IoShapes": [("shapes", 1, "TensorShape*")],
    "DmaBufInfo": [
        ("dma_buf_index", 1, "uint32"),
        ("dma_size", 2, "uint32"),
        ("io_binding_offset", 3, "uint32"),
        ("dma_offset", 4, "uint32"),
    ],
    "IoBinding": [
        ("name", 1, "string"),
        ("index", 2, "uint32"),
        ("type", 3, "bufferIoDataTypeEnum"),
        ("dir", 4, "bufferIoDirectionEnum"),
        ("quant_scale", 5, "float"),
        ("quant_offset", 6, "int32"),
        ("dims", 7, "int32*"),
        ("size", 8, "uint32"),
        ("dma_buf_info", 9, "DmaBufInfo*"),
        ("is_partial_buf_allowed", 10, "bool"),
        ("is_valid", 20, "bool"),
    ],
    "IoSet": [("name", 1, "string"), ("bindings", 2, "IoBinding*")],
    "RuntimeConstants": [("name", 1, "string"), ("size", 2, "uint32"), ("offset", 3, "uint32")],
    "DmaBuf": [("index", 1, "uint32"), ("size", 2, "uint32"), ("dir", 3, "bufferIoDirectionEnum")],
    "IoDesc": [
        ("io_sets", 1, "IoSet*"),
        ("selected_set", 2, "IoSet"),
        ("program_name", 3, "string"),
        ("dma_buf", 4, "DmaBuf*"),
        ("runtime_constants", 5, "RuntimeConstants*"),
        ("pre_process_skip_stages", 6, "IoSet*"),
        ("post_process_skip_stages", 7, "IoSet*"),
        ("allowed_shapes", 8, "IoShapes*"),
    ],
}


def _add_field(message: descriptor_pb2.DescriptorProto, name: str, number: int, kind: str) -> None:
    field = message.field.add(name=name, number=number)
    base = kind.rstrip("*")
    field.label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
    if base in _ENUMS or base in _MESSAGES:
        field.type = field.TYPE_ENUM if base in _ENUMS else field.TYPE_MESSAGE
        field.type_name = f".aicapi.{base}"
    else:
        field.type = getattr(field, f"TYPE_{base.upper()}")


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(name="QAicApi.proto", package="aicapi", syntax="proto3")
    for enum_name, values in _ENUMS.items():
        enum = file.enum_type.add(name=enum_name)
        for value_name, number in values.items():
            enum.value.add(name=value_name, number=number)
    for message_name, fields in _MESSAGES.items():
        message = file.message_type.add(name=message_name)
        for name, number, kind in fields:
            _add_field(message, name, number, kind)
    return file


_pool = descriptor_pool.DescriptorPool()
_pool.Add(_file())  # type: ignore[no-untyped-call, unused-ignore]
DESCRIPTOR: Any = _pool.FindFileByName("QAicApi.proto")


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"aicapi.{name}"))


def _wrapper(name: str) -> Any:
    return enum_type_wrapper.EnumTypeWrapper(_pool.FindEnumTypeByName(f"aicapi.{name}"))


IoDesc: Any = _class("IoDesc")
IoSet: Any = _class("IoSet")
IoBinding: Any = _class("IoBinding")
IoShapes: Any = _class("IoShapes")
TensorShape: Any = _class("TensorShape")
DmaBufInfo: Any = _class("DmaBufInfo")
RuntimeConstants: Any = _class("RuntimeConstants")
DmaBuf: Any = _class("DmaBuf")
bufferIoDirectionEnum: Any = _wrapper("bufferIoDirectionEnum")
bufferIoDataTypeEnum: Any = _wrapper("bufferIoDataTypeEnum")

BUFFER_IO_TYPE_INPUT = 0
BUFFER_IO_TYPE_OUTPUT = 1
FLOAT_TYPE = 0
FLOAT_16_TYPE = 1
INT8_Q_TYPE = 2
UINT8_Q_TYPE = 3
INT16_Q_TYPE = 4
INT32_Q_TYPE = 5
INT32_I_TYPE = 6
INT64_I_TYPE = 7
INT8_TYPE = 8
BFLOAT16_TYPE = 11
TYPE_INVALID = 0xFF
