# SPDX-License-Identifier: Apache-2.0
"""The original model in another arithmetic: what a precision costs without a fault. Loads no framework."""
