# SPDX-License-Identifier: Apache-2.0
"""A runtime in a process of its own, so that native code that crashes or hangs ends no run."""
