# SPDX-License-Identifier: Apache-2.0
"""The simulated runtime bindings: `qaicrt` and the protobuf messages `QAicApi_pb2`."""
