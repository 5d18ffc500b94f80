#!/usr/bin/env bash
# Learn TRACE as moram.yaml says, with ZeRO-2, as the authors did.
#
#     scripts/published/moram.sh data.path=LLM-CL-Benchmark_500 [key=value ...] [options of moelora launch]
set -euo pipefail
exec moelora launch "$(dirname "$0")/moram.yaml" --num-processes 1 --deepspeed zero2 "$@"
