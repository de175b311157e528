# SPDX-License-Identifier: Apache-2.0
"""The model kind ``peft-causal-lm``: a causal language model with adapters. Loads no framework."""
