# SPDX-License-Identifier: Apache-2.0
"""Stands in for `executors.worker`: sleeps for each unit, and dies where the case is called after a signal."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import suppress

from qeff_validate.pipeline.executors.units import JUDGES
from qeff_validate.report.result import Result
from qeff_validate.runtimes.isolation.channel import Channel, Closed

SECONDS = 0.05
BROKEN = 4
"""Id of a card with which each unit fails."""

channel = Channel(socket.socket(fileno=int(sys.argv[1])))
channel.receive()
with suppress(Closed):
    while True:
        request = channel.receive()[0]
        unit, cards = request["unit"], request["device_ids"]
        time.sleep(SECONDS)
        if unit["case"].startswith("SIG") and unit["stage"] == JUDGES:
            os.write(1, b"the last words of a process\n")
            os.kill(os.getpid(), getattr(signal, unit["case"].partition("-")[0]))
        judged = unit["stage"] == JUDGES
        fault = {"reason": "had a broken card", "cards": [BROKEN]} if BROKEN in cards else None
        status = "error" if fault else "pass"
        result = Result(unit["case"], unit["runtime"], status, planned=3, compared=3).plain() if judged else None
        channel.send({"result": result, "fault": fault, "host": "", "hits": 0, "seconds": SECONDS, "megabytes": 1.0})
