# shellcheck shell=bash
# Shared by tpu_vm.sh and gke.sh, after common.sh: commands that are shown or run, and one line for what a cloud refuses.
# Nothing here needs a bash newer than 3.2, so that macOS will do.
# shellcheck disable=SC2034,SC2154  # variables go between the files

dry_run="" # not empty: show commands, run none
answer=""  # what the last `query` printed
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
output="$scratch/output" # of the last command
exec 3>&1                # commands are shown on the script's own standard output, whatever is captured
export CLOUDSDK_CORE_DISABLE_PROMPTS=1

usage() {
  sed -n '2,/^set -/{s/^# \{0,1\}//;/^set -/d;p;}' "$0"
  exit "$1"
}

# check_verb GIVEN VERB...: ends the script, with its usage or one line, unless GIVEN is one of the verbs.
check_verb() {
  case "$1" in
    -h | --help | help) usage 0 ;;
    "") usage 2 >&2 ;;
  esac
  [[ " ${*:2} " == *" $1 "* ]] || die "there is no verb $1: ${*:2}"
}

# require NAME FIX: the variable must be set.
require() { [[ -n "${!1:-}" ]] || die "$1 is not set: $2"; }

# need COMMAND WHERE: the command must be installed, unless this is a dry run.
need() { [[ -n "$dry_run" ]] || command -v "$1" >/dev/null || die "$1 is not installed: see $2"; }

# Prints a command so that it can be pasted.
show() {
  local word line="" quote="'"
  for word in "$@"; do
    if [[ "$word" =~ [^A-Za-z0-9_./:=,@%+-] || -z "$word" ]]; then word="$quote${word//$quote/$quote\\$quote$quote}$quote"; fi
    line="$line${line:+ }$word"
  done
  printf '%s\n' "$line" >&3
}

# run COMMAND...: shows it, and runs it unless this is a dry run. What it prints stays in $output, for `why`.
run() {
  if [[ -n "$dry_run" ]]; then
    show "$@"
  else
    say "$*" >&3
    "$@" >"$output" 2>&1 </dev/null
  fi
}

# quietly FILE COMMAND...: the same without saying so, its output in FILE.
quietly() {
  if [[ -n "$dry_run" ]]; then
    show "${@:2}"
  else
    "${@:2}" >"$1" 2>&1 </dev/null
  fi
}

# must COMMAND...: run it, or end with one line.
must() { run "$@" || die "$(why)"; }

# unless PATTERN COMMAND...: run it; a failure that says PATTERN does not count.
unless() { run "${@:2}" || grep -qiE "$1" "$output"; }

# query COMMAND...: sets `answer` to what it prints; in a dry run to $assumed. Status 1, and an empty answer, where the
# thing asked for does not exist; 2 for any other failure.
query() {
  answer="${assumed:-}"
  if [[ -n "$dry_run" ]]; then
    show "$@"
  elif ! answer="$("$@" 2>"$output" </dev/null)"; then
    answer=""
    grep -qiE "not.?found|does not exist" "$output" && return 1
    return 2
  fi
}

# Whether the last command failed for lack of free machines.
no_capacity() { grep -qE "[Nn]o more capacity|STOCKOUT|RESOURCE_POOL_EXHAUSTED|not have enough resources" "$output" 2>/dev/null; }

# Why the last command failed, in one line with the fix. gcloud's wording changes: matched loosely, specific words first.
why() {
  local place="${ZONE:-${LOCATION:-this place}}" what="${TYPE:-${TOPOLOGY:-this machine}}" project="${PROJECT:-PROJECT}"
  if no_capacity; then
    echo "$place has no free $what now: try another ZONE, or wait in Google's queue (no QUEUED=0)"
    return
  fi
  case "$(cat "$output" 2>/dev/null)" in
    *QUOTA* | *[Qq]uota* | *RESOURCE_EXHAUSTED*)
      echo "no quota for $what in $place: ask for it (console: IAM & Admin, Quotas), or give another ZONE or TYPE," \
        "or SPOT=1, which has a quota of its own: $(last_error)" ;;
    *"has not been used in project"* | *SERVICE_DISABLED* | *"is not enabled"*)
      echo "an API is off in project $project: gcloud services enable tpu.googleapis.com compute.googleapis.com" \
        "container.googleapis.com --project=$project" ;;
    *"active account"* | *UNAUTHENTICATED* | *[Rr]eauthentication* | *"auth login"*)
      echo "gcloud is not logged in: gcloud auth login" ;;
    *ssh-add*) echo "the SSH agent lacks gcloud's key: ssh-add ~/.ssh/google_compute_engine" ;;
    *PERMISSION_DENIED* | *"does not have permission"* | *"equired '"*"' permission"* | *forbidden* | *Forbidden*)
      echo "this account may not do that in project $project: ask its owner for the role: $(last_error)" ;;
    *"unrecognized arguments"* | *"Invalid choice"*)
      echo "this gcloud is too old: gcloud components update: $(last_error)" ;;
    *"ould not resolve"* | *"ame resolution"* | *"etwork is unreachable"* | *"ailed to establish a new connection"*)
      echo "cannot reach Google's servers: check the network or the proxy settings" ;;
    *"Cannot connect to the Docker daemon"*) echo "docker is not running: start it, or give IMAGE and BUILD=0" ;;
    *) last_error ;;
  esac
}

# The last error line of $output, or its last line.
last_error() {
  { grep -iE 'error|denied|failed|exceeded|exhausted' "$output" || grep -v '^ *$' "$output" || echo "no message"; } 2>/dev/null |
    tail -n 1 | sed 's/^ *//' | cut -c 1-300
}

# another_try REASON: counts a failure and waits, each time longer; ends the script after MAX_RESTARTS of them.
failures=0
pause="${BACKOFF:-60}"
another_try() {
  failures=$((failures + 1))
  ((failures <= ${MAX_RESTARTS:-30})) ||
    die "$1; that was the last of $failures tries: fix it, or raise MAX_RESTARTS (${MAX_RESTARTS:-30})"
  say "$1; try $failures of ${MAX_RESTARTS:-30} in $pause s"
  sleep "$pause"
  pause=$((pause * 2 < 900 ? pause * 2 : 900))
}

# packing FILE: sets `packing` to the command that packs what a machine needs of the checkout.
packing() {
  packing=(env COPYFILE_DISABLE=1 tar -C "$root" -c -z -f "$1" --exclude=__pycache__
    README.md LICENSE pyproject.toml constraints.txt configs dino_jax launch)
}

# TOPOLOGY=v5e:4x4 -> generation=v5e shape=4x4 chips=16
read_topology() {
  generation="${TOPOLOGY%%:*}"
  shape="${TOPOLOGY#*:}"
  [[ "$TOPOLOGY" =~ ^(v4|v5e|v5p|v6e|tpu7x):[0-9]+x[0-9]+(x[0-9]+)?$ ]] ||
    die "TOPOLOGY=$TOPOLOGY: generation:shape is needed, such as v5e:4x4, v6e:2x4, v5p:2x2x4 or tpu7x:2x2x2"
  chips=$((${shape//x/*}))
}

# chips_to_hosts MACHINE: how many of a machine type such as ct6e-standard-4t make the topology; sets `hosts`, `per_host`.
chips_to_hosts() {
  [[ "$1" =~ -([0-9]+)t(-|$) ]] || die "MACHINE=$1: a machine type with its number of chips is needed, as in tpu7x-standard-4t"
  per_host="${BASH_REMATCH[1]}"
  ((chips % per_host == 0)) || die "TOPOLOGY=$TOPOLOGY is $chips chip(s), and a $1 has $per_host: give another MACHINE"
  hosts=$((chips / per_host))
}
