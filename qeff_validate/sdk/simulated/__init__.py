# SPDX-License-Identifier: Apache-2.0
"""A simulation of the Cloud AI 100 SDK: compiler, runtime bindings, cards and tools, without any hardware.

Nothing in this package comes from, or talks to, a real SDK. It imitates the user-facing contract so that
client software can be exercised where there is no card; what it computes says how a model behaves in rounded
fp16 arithmetic on a CPU, not how fast or how exactly a card computes it. Every product carries the mark: the
bindings (`SIMULATED`), the container's own magic, and the version files.

The package stands on its own (relative imports only), so a copy of it under another prefix works as well.
"""

from __future__ import annotations

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when onnxruntime is loaded; child processes inherit it

SIMULATED = True
