# SPDX-License-Identifier: Apache-2.0
"""The simulated compiler: `qaic_compile` and, as before SDK 1.21, `qaic_exec`."""
