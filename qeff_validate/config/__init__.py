# SPDX-License-Identifier: Apache-2.0
"""Cases and the files they come from. Importing this package loads no framework."""
