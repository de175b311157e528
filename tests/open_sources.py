# SPDX-License-Identifier: Apache-2.0
"""Load each source that ``sources.json`` lists, and print what is opened: ``python -m tests.open_sources FOLDER``."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qeff_validate import model
from qeff_validate.artifact import Artifact
from qeff_validate.config.case import Case
from qeff_validate.pipeline.user_artifacts import user_artifact
from qeff_validate.protocols import Settings, runtime
from tests.opened_files import opened_below


def digested(key: Any, folder: Path) -> set[Path]:
    """Return the files of a key: names with a digest, anywhere in it."""
    if not isinstance(key, Mapping):
        return set()
    names = {name for name, value in key.items() if isinstance(value, str) and len(value) == 64}
    below = [digested(value, folder) for value in key.values()]
    return {(folder / name).resolve() for name in names if (folder / name).is_file()}.union(*below)


def keys(case: Case) -> Any:
    """Return all keys of a case."""
    wrapper = model(case)
    return {"graph": wrapper.fingerprint(), "inputs": wrapper.inputs_key()}


def load(case: Case) -> None:
    """Do all that a case does with its source: tokenize, build the module, run the reference."""
    wrapper = model(case)
    inputs = wrapper.inputs(wrapper.tokenize())
    wrapper.published()
    wrapper.module()
    wrapper.reference(inputs, dtype="float32")


def main(root: Path) -> None:
    """Print JSON: for each source the files that were opened and those in its keys, relative to what is watched."""
    said = {}
    for name, entry in json.loads((root / "sources.json").read_text()).items():
        folder, case = Path(entry["folder"]), Case(**entry["case"])
        watched = Path(entry["watched"])
        if "runtime" in entry:
            given = case.artifacts
            path = Path(given.onnx or given.qpc or "")
            user_artifact(case, entry["kind"], path)
            known = {(folder / file).resolve() for file in entry["known"]}
            with opened_below(watched) as opened:
                opening = runtime(entry["runtime"], Settings()).open(Artifact(entry["kind"], path, ""))
                with opening:
                    pass
        else:
            known = digested(keys(case), folder)
            if "adapter" in entry:
                known |= digested(keys(case), Path(entry["adapter"]))
            with opened_below(watched) as opened:
                load(case)
        real = watched.resolve()
        said[name] = [sorted(str(path.relative_to(real)) for path in files if path.is_relative_to(real))
                      for files in (opened, known)]  # fmt: skip
    sys.stdout.write(f"{json.dumps(said)}\n")


if __name__ == "__main__":
    with contextlib.redirect_stderr(None):
        main(Path(sys.argv[1]))
