# SPDX-License-Identifier: Apache-2.0
"""What can be compared before any number: what was fed, and what artifacts were made from. Loads no framework."""
