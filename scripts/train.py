"""Train a recipe under any launcher: ``torchrun --nproc-per-node 2 scripts/train.py RECIPE [key=value ...]``.

The same as ``moelora train``, for launchers that want a file: torchrun, ``accelerate launch``, ``deepspeed``, srun.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # Python puts this folder first, where the folders deepspeed/ and accelerate/ would pass for the packages.
    del sys.path[0]
    from moelora.cli.app import main

    main(["train", *sys.argv[1:]])
