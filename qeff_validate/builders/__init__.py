# SPDX-License-Identifier: Apache-2.0
"""Builders of artifacts (ONNX files, QPCs, bundles), and their store. Importing this package loads no framework."""
