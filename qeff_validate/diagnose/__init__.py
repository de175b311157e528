# SPDX-License-Identifier: Apache-2.0
"""Tools that say where a difference comes from. Importing this package loads no framework."""
