# SPDX-License-Identifier: Apache-2.0
"""The built-in runtimes: PyTorch, ONNX Runtime, Cloud AI 100. Importing this package loads no framework."""
