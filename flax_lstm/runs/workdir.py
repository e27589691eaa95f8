# SPDX-License-Identifier: Apache-2.0
"""What the files and folders of a work directory are called."""

CONFIG_FILE, RESULT_FILE, METRICS_FILE = "config.py", "result.json", "metrics.jsonl"
ASSETS, CHECKPOINTS = "assets", "checkpoints"
