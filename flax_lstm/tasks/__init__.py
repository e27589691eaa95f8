# SPDX-License-Identifier: Apache-2.0
"""What is learnt: a file a task, with its loss, figures and baselines."""
