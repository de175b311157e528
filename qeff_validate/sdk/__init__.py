# SPDX-License-Identifier: Apache-2.0
"""The AI 100 SDK: the installed one and the simulated one. Importing this package loads no framework."""
