# SPDX-License-Identifier: Apache-2.0
"""The mutation score of this library's own verdicts (``qeff-validate selftest``). Loads no framework."""
