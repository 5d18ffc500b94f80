#!/usr/bin/env bash
# Train loramoe.yaml on eight GPUs with ZeRO-3, parameters and optimizer on the CPU, as the released script.
#
#     scripts/published/loramoe.sh data.path=train.jsonl [key=value ...] [options of moelora launch]
set -euo pipefail
exec moelora launch "$(dirname "$0")/loramoe.yaml" --num-processes 8 --deepspeed zero3_offload "$@"
