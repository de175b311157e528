# SPDX-License-Identifier: Apache-2.0
"""Results, and the forms in which they are shown and written. Importing this package loads no framework."""
