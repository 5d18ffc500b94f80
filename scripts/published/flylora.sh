#!/usr/bin/env bash
# Train flylora.yaml on one GPU, which the batch of 128 is reckoned for.
#
#     scripts/published/flylora.sh data.path=train.jsonl [key=value ...] [options of moelora launch]
set -euo pipefail
exec moelora launch "$(dirname "$0")/flylora.yaml" --num-processes 1 "$@"
