#!/usr/bin/env bash
# Train remix.yaml on eight GPUs (ours: the paper does not say).
#
#     scripts/published/remix.sh data.path=train.jsonl [key=value ...] [options of moelora launch]
set -euo pipefail
exec moelora launch "$(dirname "$0")/remix.yaml" --num-processes 8 "$@"
