#!/usr/bin/env bash
# One run in several processes, on this machine or on plain hosts over ssh:
#
#   launch/multihost.sh --local N    [--dry-run] train --config=... --workdir=...
#   launch/multihost.sh --hosts A,B  [--port P] [--dry-run] train --config=... --workdir=...
#
# --local N    N processes here: CPU processes, or one for each of N GPUs
# --hosts A,B  one process on each host, which has all of its devices. The first is process 0, and listens on --port
#              (8476). Each host needs: ssh without a password; this checkout and its environment at the same path; a
#              workdir that all share (or gs://)
# --dry-run    prints the command of each process; installs and runs nothing
#
# The arguments of dino-jax follow: train or eval. Lines of output begin with [PROCESS]. SIGTERM and Ctrl-C go to all:
# they save a checkpoint after the same step and end with status 0. When a process dies or hangs, all are ended, the last
# line names it, and the status is not 0. The same command resumes. Variables: see dino_jax/parallel/distributed.py;
# those that begin with DINO_, JAX_, XLA_, TPU_, LIBTPU_, NCCL_, HF_ or GRAIN_ are passed on to the hosts.
# DINO_VENV and PYTHON: see common.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

options=()
dry_run=""
hosts=""
port=""
while (($#)); do
  case "$1" in
    --local=* | --hosts=* | --port=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
    --local | --hosts | --port)
      (($# > 1)) || die "$1 needs a value"
      [[ "$1" != --hosts ]] || hosts="$2"
      [[ "$1" != --port ]] || port="$2"
      options+=("$1" "$2")
      shift 2
      ;;
    --dry-run)
      dry_run=yes
      options+=("$1")
      shift
      ;;
    --help | -h)
      sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit
      ;;
    -*) die "unknown option $1: --local N, --hosts A,B,..., --port P, --dry-run; those of dino-jax follow its verb" ;;
    *) break ;;
  esac
done
(($#)) || die "nothing to run: add a verb of dino-jax and its arguments, such as train --config=... --workdir=..."
[[ "$1" == train || "$1" == eval ]] || die "several processes run train or eval, not $1: start that alone, as dino-jax $1 ..."
[[ -z "$hosts" || -n "$port" ]] || options+=(--port 8476)

python="$venv_python"
if [[ -z "$dry_run" ]]; then
  ensure base
elif [[ ! -x "$python" ]]; then
  find_python
fi
exec "$python" "$root/launch/supervise.py" "${options[@]}" -- "$venv_python" -m dino_jax "$@"
