# SPDX-License-Identifier: Apache-2.0
"""Devices and processes: the mesh, launchers, memory allocation, caches."""
