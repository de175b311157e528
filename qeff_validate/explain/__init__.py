# SPDX-License-Identifier: Apache-2.0
"""Where a failing result comes from: the stage, the module, and what differs there. Judges nothing."""
