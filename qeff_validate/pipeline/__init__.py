# SPDX-License-Identifier: Apache-2.0
"""One case on its way from inputs to results. Importing this package loads no framework."""
