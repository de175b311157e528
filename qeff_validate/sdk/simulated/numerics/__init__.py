# SPDX-License-Identifier: Apache-2.0
"""Emulated arithmetic of the card: rounding to fp16, MXFP6 weights and MXINT8 state."""
