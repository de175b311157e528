# SPDX-License-Identifier: Apache-2.0
"""Where the stages of cases run: in this process, or side by side in processes of this host."""
