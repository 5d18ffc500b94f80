#!/usr/bin/env bash
# Train smora.yaml on one GPU, which the batch of 8 x 16 is reckoned for (ours: how many is not said).
#
#     scripts/published/smora.sh data.path=train.jsonl [key=value ...] [options of moelora launch]
set -euo pipefail
exec moelora launch "$(dirname "$0")/smora.yaml" --num-processes 1 "$@"
