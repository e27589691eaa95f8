# SPDX-License-Identifier: Apache-2.0
"""The training step, the loop around it, and what they need."""
