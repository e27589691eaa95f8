# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: settings, log, results."""
