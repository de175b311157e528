# SPDX-License-Identifier: Apache-2.0
"""Where weights, configs and tokenizers come from. Importing this package loads no framework."""
