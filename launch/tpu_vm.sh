#!/usr/bin/env bash
# Google's TPU VMs, one or a slice of many: create, set up, train, delete.
#
#   launch/tpu_vm.sh [--dry-run] VERB
#
#   create            a TPU, through Google's queue by default; waits until it is ready
#   setup             this checkout and its packages on every worker (and a Python, where the image's is older than 3.11)
#   train ARGS...     create, setup, `dino-jax train ARGS...` on every worker, and all of it again after a preemption or
#                     crash, from the last checkpoint. Ends when the run does. It must keep running: use tmux.
#   logs [--follow]   what worker 0 (or WORKER=N) wrote
#   status            of the machine, and of the run on each worker
#   stop              ends the run with a checkpoint; the machine stays and costs money
#   delete            deletes the machine; the workdir in its bucket stays
#
# Set in the environment:
#   PROJECT, ZONE     as gcloud knows them
#   NAME              of the machine (dino)
#   TOPOLOGY          as for `dino-jax plan`: v5e:4x4, v6e:2x4, v4:2x2x2, v5p:2x2x4, tpu7x:2x2x2; or
#   TYPE              an accelerator type of the Cloud TPU API, such as v5litepod-16
#   WORKDIR           gs://bucket/folder of the run; it outlives the machine
#   SPOT=1            cheaper; Google may take the machine away at any time
#   QUEUED=0          ask for the machine now instead of waiting in the queue (Cloud TPU API)
#   API               tpu: Cloud TPU API (up to v6e); compute: Compute Engine (v5p, v6e, and the only one for tpu7x)
#   VERSION           of the machine's software: a runtime version, or with API=compute an image family
#   MACHINE           the machine type, with API=compute
#   CREATE_FLAGS      more flags for the command that creates, such as "--network=NAME --internal-ips"
#   SSH_FLAGS         more flags for gcloud's ssh and scp, such as "--internal-ip"
#   MAX_RESTARTS, BACKOFF, POLL, WAIT_HOURS    limits of retries: 30 times, 60 s doubled up to 900 s; 30 s; 24 h
#
# --dry-run shows every command and runs none. docs/launch.md has more.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck source=launch/cloud.sh
source "$root/launch/cloud.sh"
# shellcheck source=launch/tpu_machine.sh
source "$root/launch/tpu_machine.sh"

code="dino-jax" # the checkout's folder on a worker, in the home directory
worker="DINO_VENV=\$HOME/dino-venv bash $code/launch/tpu_worker.sh"
POLL="${POLL:-30}"
NAME="${NAME:-dino}"

main() {
  [[ "${1:-}" != --dry-run ]] || { dry_run=yes && shift; }
  check_verb "${1:-}" create setup train logs status stop delete
  local verb="$1"
  shift
  [[ "$verb" == train || "$verb" == logs || $# == 0 ]] || die "$verb takes no arguments, not $1: see --help"
  PROJECT="${PROJECT:-${CLOUDSDK_CORE_PROJECT:-}}"
  ZONE="${ZONE:-${CLOUDSDK_COMPUTE_ZONE:-}}"
  require PROJECT "the Google Cloud project that pays (gcloud projects list)"
  require ZONE "where the TPUs are, such as us-west4-a (gcloud compute tpus locations list)"
  machine_settings
  need gcloud "https://cloud.google.com/sdk/docs/install"
  "$verb" "$@"
}

# Asks for the machine and waits until it is ready; one that is preempted meanwhile is deleted and asked for again.
create() {
  local waited=0
  while true; do
    find_state || die "$(why)"
    [[ -z "$dry_run" ]] || state=none
    case "$state" in
      ready)
        say "$NAME is ready; it costs money until launch/tpu_vm.sh delete"
        return
        ;;
      none)
        request || {
          no_capacity || die "$(why)" # waiting brings no quota and no permission
          another_try "$(why)"
        }
        [[ -z "$dry_run" ]] || return 0
        ;;
      stopped) must gcloud compute tpus tpu-vm start "$NAME" "${place[@]}" ;;
      gone)
        another_try "$NAME was preempted, or failed, before it was ready"
        remove
        ;;
      waiting)
        ((waited < ${WAIT_HOURS:-24} * 3600)) ||
          die "$NAME did not come in ${WAIT_HOURS:-24} h and may still come: raise WAIT_HOURS, or delete it and try another ZONE"
        sleep "$POLL"
        waited=$((waited + POLL))
        ;;
    esac
  done
}

delete() {
  remove
  [[ -n "$dry_run" ]] || say "$NAME is deleted${WORKDIR:+; the checkpoints stay in $WORKDIR}"
}

# Ends the script unless the machine is ready.
there() {
  find_state || die "$(why)"
  [[ "$state" == ready ]] || die "$NAME is not ready but $state: launch/tpu_vm.sh create"
}

setup() {
  there
  deploy || die "$(blame setup)"
}

# Brings the checkout and its packages to every worker.
deploy() {
  local unpack="rm -rf $code.new && mkdir $code.new && tar -C $code.new -xzf $code.tar.gz && rm -rf $code && mv $code.new $code"
  local archive="$scratch/$code.tar.gz"
  [[ -z "$dry_run" ]] || archive="$code.tar.gz"
  packing "$archive"
  [[ -n "$dry_run" ]] || say "checkout and packages, to every worker of $NAME"
  quietly "$output" "${packing[@]}" || return 1
  to_workers "$archive" "$code.tar.gz" && on_workers all "$unpack && $worker setup"
}

start_run() { on_workers all "$worker start$(printf ' %q' "$@")"; }

train() {
  local argument given=""
  for argument in "$@"; do
    case "$argument" in --workdir=*) given="${argument#*=}" ;; --workdir) die "write --workdir=gs://..., in one word" ;; esac
  done
  WORKDIR="${given:-${WORKDIR:-}}"
  require WORKDIR "gs://bucket/folder, which outlives the machine"
  [[ "$WORKDIR" == gs://* ]] || die "WORKDIR=$WORKDIR: a gs:// path is needed; the disk of a preempted machine is lost"
  [[ -n "$given" ]] || set -- "$@" "--workdir=$WORKDIR"
  create
  begin "$@"
  if [[ -n "$dry_run" ]]; then
    on_workers all "$worker status"
  else
    watch_over "$@"
  fi
}

# Sets up and starts the run; on the next machine where this one is preempted meanwhile.
begin() {
  until deploy && start_run "$@"; do
    local reason
    reason="$(blame "setting up and starting")"
    find_state || die "$(why)"
    [[ "$state" != ready ]] || die "$reason"
    another_try "$NAME was preempted while it was set up"
    create
  done
  since="$SECONDS"
  [[ -n "$dry_run" ]] || say "running; see launch/tpu_vm.sh logs --follow"
}

# Polls the run until it is over, and restarts what needs it.
watch_over() {
  local silences=0
  while true; do
    sleep "$POLL"
    look
    if [[ "$verdict" == silent ]]; then silences=$((silences + 1)); else silences=0; fi
    if ((SECONDS - since > 1800)) && [[ "$verdict" == running ]]; then
      failures=0 pause="${BACKOFF:-60}" # old failures do not count
    fi
    case "$verdict" in
      finished | stopped)
        say "$verdict: $last"
        say "$NAME still costs money: launch/tpu_vm.sh delete"
        return
        ;;
      refused) die "the run refused its input: $last" ;;
      ended)
        another_try "the run ended early: $last"
        start_run "$@" || say "$(blame starting)"
        since="$SECONDS"
        ;;
      gone)
        another_try "$NAME was preempted"
        create
        begin "$@"
        ;;
      silent)
        ((silences >= 3)) || continue
        another_try "$last"
        remove
        create
        begin "$@"
        silences=0
        ;;
    esac
  done
}

# Sets `verdict` (running, finished, stopped, refused, ended, gone, silent) and `last`, the line of the log that says why.
look() {
  local runs
  verdict=silent last=""
  if ! find_state; then
    last="$(why)"
  elif [[ "$state" != ready ]]; then
    verdict=gone
  elif on_workers all "$worker status"; then
    runs="$(sed -n 's/.*run: //p' "$output" | sort -u | tr '\n' ';')"
    case ";$runs" in # the worst of all workers counts
      *";exit 2;"*) verdict=refused last="$(log_of "exit 2")" ;;
      *";exit "[!0]*) verdict=ended last="$(log_of "exit [^0]")" ;;
      *";interrupted;"* | *";none;"*) verdict=ended last="$(log_of "(interrupted|none)")" ;;
      *";running;"*) verdict=running ;;
      *";stopped;"*) verdict=stopped last="$(log_of stopped)" ;;
      *) verdict=finished last="$(log_of "exit 0")" ;;
    esac
  else
    last="$(blame "looking at the run")"
  fi
}

# The last line that the first worker in this state wrote.
log_of() { grep -A 1 -E "run: $1" "$output" | sed -n 's/.*log: //p' | head -n 1; }

logs() {
  local how="-n 200" command=(gcloud compute tpus tpu-vm ssh "$NAME" "--worker=${WORKER:-0}")
  case "${1:-}" in "") ;; -f | --follow) how="-n 200 -F" ;; *) die "logs takes --follow, not $1" ;; esac
  there
  if [[ "$API" == compute ]]; then
    [[ -n "${workers[${WORKER:-0}]-}" ]] || die "there is no worker ${WORKER:-0} of $NAME"
    command=(gcloud compute ssh "${workers[${WORKER:-0}]}")
  fi
  command+=("${place[@]}" ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=tail $how dino-run/log")
  if [[ -n "$dry_run" ]]; then show "${command[@]}"; else "${command[@]}"; fi
}

status() {
  find_state || die "$(why)"
  [[ "$state" == ready ]] || {
    say "$NAME: $state"
    return
  }
  on_workers all "$worker status" || die "$(blame "looking at the run")"
  [[ -n "$dry_run" ]] || grep -E "run: |log: " "$output"
}

stop() {
  there
  on_workers all "$worker stop" || die "$(blame stopping)"
  [[ -n "$dry_run" ]] || say "stopped; $NAME still costs money: launch/tpu_vm.sh delete"
}

main "$@"
