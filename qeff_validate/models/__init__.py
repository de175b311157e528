# SPDX-License-Identifier: Apache-2.0
"""Model wrappers. Importing this package loads no framework."""
