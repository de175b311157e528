# SPDX-License-Identifier: Apache-2.0
"""A runtime in a child process, so that native code that crashes or hangs does not end the run."""
