"""Train a recipe under any launcher: ``torchrun --nproc-per-node 2 scripts/train.py RECIPE [key=value ...]``.

The same as ``moelora train``, for launchers that want a file.
"""

from __future__ import annotations

import sys

from moelora.cli.app import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
