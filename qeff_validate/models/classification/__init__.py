# SPDX-License-Identifier: Apache-2.0
"""The model kinds ``sequence-classification`` and ``reranker``. Importing this package loads no framework."""
