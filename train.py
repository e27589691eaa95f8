# SPDX-License-Identifier: Apache-2.0
"""Trains, or resumes a run: `python train.py [--config C] [--workdir DIR] [--SECTION.FIELD VALUE
...]`."""

import sys

from flax_lstm.__main__ import call, guarded

if __name__ == "__main__":
    sys.exit(guarded(call("train", "python train.py"), sys.argv[1:]))
