#!/usr/bin/env bash
# Train lora_mixer.yaml on eight GPUs (ours: the paper does not say).
#
#     scripts/published/lora_mixer.sh data.path=train.jsonl [key=value ...] [options of moelora launch]
set -euo pipefail
exec moelora launch "$(dirname "$0")/lora_mixer.yaml" --num-processes 8 "$@"
