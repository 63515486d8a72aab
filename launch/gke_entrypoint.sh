#!/usr/bin/env bash
# A container's first process: runs `dino-jax ARGS...` and passes SIGTERM on to it.
#
# A run that was told to stop saves and ends with 0, but to Kubernetes 0 means that the work is done. So what was told to
# stop ends with 143 here, which JobSet answers with another try.
set -uo pipefail

told=""
trap 'told=yes; kill -TERM "$child" 2>/dev/null' TERM INT
"${DINO_JAX:-dino-jax}" "$@" &
child=$!
while true; do
  wait "$child"
  status=$?
  kill -0 "$child" 2>/dev/null || break # else only the wait was interrupted
done
[[ -n "$told" && "$status" == 0 ]] && exit 143
exit "$status"
