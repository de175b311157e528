# SPDX-License-Identifier: Apache-2.0
"""Results that wait in a file without a name until they are asked for, so that many of them take no memory."""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from qeff_validate.report.result import Result


class KeptResults:
    """Takes results and hands them out again; those that the disk does not take stay in memory.

    Examples:
        >>> read = KeptResults().keep(Result("small", "ort", "pass").plain())
        >>> read().runtime
        'ort'
    """

    def __init__(self) -> None:
        self._descriptor: int | None = None

    def keep(self, plain: Mapping[str, Any]) -> Callable[[], Result]:
        """Take a result, as `Result.plain` gives it, and return a function that reads it."""
        text = json.dumps(plain).encode()
        try:
            start = os.lseek(self._open(), 0, os.SEEK_END)
            written = os.write(self._open(), text)
        except OSError:
            written = 0
        return partial(self._read, start, len(text)) if written == len(text) else partial(Result.from_plain, plain)

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor, path = tempfile.mkstemp()
            weakref.finalize(self, os.close, self._descriptor)
            os.unlink(path)
        return self._descriptor

    def _read(self, start: int, length: int) -> Result:
        return Result.from_plain(json.loads(os.pread(self._open(), length, start)))
