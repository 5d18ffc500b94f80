#!/usr/bin/env bash
# Train a recipe on the machines of a hostfile, started over ssh by DeepSpeed's own runner.
#
#     scripts/launch/hostfile.sh RECIPE [key=value ...]
#
# HOSTFILE names the machines (scripts/launch/hostfile shows the form), ZERO a configuration of scripts/deepspeed. Every
# machine needs pdsh or ssh without a password, the same environment at the same path, and the run's folder on a disk
# that all of them share. What else the processes need in their environment goes into ~/.deepspeed_env, a line each.
set -euo pipefail
exec moelora launch "$@" --hostfile "${HOSTFILE:-scripts/launch/hostfile}" --deepspeed "${ZERO:-zero2}"
