# SPDX-License-Identifier: Apache-2.0
"""Cells, layers, models: Flax modules and the equations behind them."""
