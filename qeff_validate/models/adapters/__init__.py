# SPDX-License-Identifier: Apache-2.0
"""PEFT adapters: on disk, as a config, on a model. Importing this package loads no framework."""
