# SPDX-License-Identifier: Apache-2.0
"""The simulated `qaic-util` and `qaic-version-util` (card-contract §1.4, §1.1).

Run as `python -m qeff_validate.sdk.simulated.tools qaic-util -q`. Resources are counted within one process, so
`qaic-util` as a process of its own shows everything as free.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import device
from .release import base_version

_USAGE = "usage: qaic-util -q [-d <qid>]... | qaic-version-util --apps|--platform"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the tools and return its exit code.

    Args:
        argv: name of the tool and its arguments; None: ``sys.argv``.
    """
    tool, *arguments = list(sys.argv[1:] if argv is None else argv) or [""]
    try:
        if tool == "qaic-util" and arguments[:1] == ["-q"]:
            return _query(_selected(arguments[1:]))
        if tool == "qaic-version-util" and arguments in (["--apps"], ["--platform"]):
            print(base_version(arguments[0][2:]))
            return 0
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(_USAGE, file=sys.stderr)
    return 1


def _selected(arguments: list[str]) -> list[int]:
    flags, values = arguments[::2], arguments[1::2]
    if len(flags) != len(values) or set(flags) - {"-d"}:
        raise ValueError(_USAGE)
    return [int(value) for value in values] or device.device_ids()


def _query(qids: Sequence[int]) -> int:
    records = [record(device.card(qid)) for qid in qids]
    print(f"LRT QC_IMAGE_VERSION:{base_version('platform')}\nLRT IMAGE_VARIANT:SIMULATED")
    print(f"Number of devices queried: {len(records)}")
    for text in records:
        print(text)
    return 0


def record(card: device.Card) -> str:
    """Return one device's record: the QID line, then tab-indented `Key:Value` lines."""
    version, status = base_version("platform"), card.status
    values = {
        "Status": status,
        "MHI ID": card.qid,
        "PCI Address": f"0000:{card.qid + 1:02x}:00.0",
        "PCI Info": "Simulated Qualcomm AIC100",
        "Dev Link": f"/dev/accel/accel{card.qid} ",
    }
    if status == device.READY:
        nsp_free, dram_free = card.free()
        values |= {
            "HW Version": device.HW_VERSION,
            "HW Serial": f"0.0.0.{card.qid}",
            "FW Version": version,
            "FW QC_IMAGE_VERSION": version,
            "FW IMAGE_VARIANT": "AIC100.SIMULATED",
            "Dram Total": f"{device.DRAM_TOTAL_MB} MB",
            "Dram Free": f"{dram_free} MB",
            "Vc Total": device.VC_TOTAL,
            "Vc Free": card.vc_free,
            "Pc Total": device.PC_TOTAL,
            "Pc Free": device.PC_TOTAL,
            "MCID Total": device.MCID_TOTAL,
            "MCID Free": device.MCID_TOTAL,
            "Semaphore Total": device.SEM_TOTAL,
            "Semaphore Free": device.SEM_TOTAL,
            "Nsp Total": device.NSP_TOTAL,
            "Nsp Free": nsp_free,
            "Networks Active": card.networks_active,
            **{f"{name} Frequency(Mhz)": mhz for name, mhz in device.FREQUENCIES_MHZ.items()},
            "Sku Type": device.SKU_NAME,
            "Board serial": "SIMULATED",
            "Device Capabilities": "HybridBoot+,MDP+",
        }
    return "\n".join([f"QID {card.qid}", *(f"\t{key}:{value}" for key, value in values.items())])


if __name__ == "__main__":
    sys.exit(main())
