#!/usr/bin/env bash
# Train mixlora.yaml on one GPU, as the authors did.
#
#     scripts/published/mixlora.sh data.path=train.jsonl [key=value ...] [options of moelora launch]
set -euo pipefail
exec moelora launch "$(dirname "$0")/mixlora.yaml" --num-processes 1 "$@"
