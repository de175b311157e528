# SPDX-License-Identifier: Apache-2.0
"""A simulation of the Cloud AI 100 SDK: compiler, runtime bindings, cards and tools, without any hardware.

Nothing in this package is copied from a real SDK or uses one. It imitates the user-facing contract, so that client
software can be tested without a card. Its results show how a model behaves in rounded fp16 arithmetic on a CPU, not how
fast or how exactly a card computes. Everything declares itself as simulated: the bindings (`SIMULATED`), the QPC (its
magic number), and the version files.

The package is self-contained (relative imports only), so a copy of it under another prefix works as well.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is loaded; child processes inherit it

SIMULATED = True
