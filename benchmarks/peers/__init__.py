# SPDX-License-Identifier: Apache-2.0
"""The implementations, one a file. Each has

    make(work, **options) -> step

where `step(n)` trains on the n-th batch and waits until the weights are updated; it returns the
loss (None if it is no implementation but a floor). For a workload that is not trained it returns
the outputs as a NumPy array. What a step can be spared (copies to the device, compiling, a layout
that the library prefers) happens in `make` or in the first step.
"""
