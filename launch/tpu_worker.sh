#!/usr/bin/env bash
# Runs on a TPU VM, sent and called by tpu_vm.sh: setup | start ARGS... | status | stop
#
# The files of the run are in ~/dino-run: log, pid, and status once it ended.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

folder="$HOME/dino-run"
mkdir -p "$folder"

setup() {
  [[ -x "$venv_python" ]] || provide_python
  ensure tpu
}

# Old images have an older Python: a build of 3.12 from uv, which pip can install, or the distribution's 3.11.
provide_python() {
  local python="" version=""
  if ! (find_python) 2>/dev/null; then
    say "no Python 3.11 or newer here: fetching 3.12"
    if python3 -m pip install --user --quiet uv && python3 -m uv python install --quiet 3.12; then
      PYTHON="$(python3 -m uv python find 3.12)"
    elif apt_install python3.11 python3.11-venv; then
      PYTHON=python3.11
    else
      die "neither uv nor apt has a Python 3.11: install one on the machine, or choose a newer image with VERSION"
    fi
    export PYTHON
  fi
  find_python
  "$python" -c 'import ensurepip, venv' 2>/dev/null || apt_install "python${version%.*}-venv" || true # make_venv reports it
}

apt_install() {
  sudo apt-get -o DPkg::Lock::Timeout=300 -qq update && sudo apt-get -o DPkg::Lock::Timeout=300 -qq -y install "$@"
} >>"$folder/apt.log" 2>&1

start() {
  end_run
  rm -f "$folder/status" "$folder/asked" "$folder/pid"
  cd "$root"
  ulimit -n "$(ulimit -Hn)" 2>/dev/null || true
  # Without its TPU the run must end, not train on the CPU.
  JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}" setsid nohup "$venv_python" "$root/launch/keep.py" \
    "--status=$folder/status" "$venv/bin/dino-jax" train "$@" >>"$folder/log" 2>&1 </dev/null &
  echo "$!" >"$folder/pid"
  echo "run: running"
}

alive() { [[ -f "$folder/pid" ]] && kill -0 -- "-$(cat "$folder/pid")" 2>/dev/null; }

# Two lines: "run: STATE" and "log: LAST LINE".
status() {
  local ended=""
  ended="$(cat "$folder/status" 2>/dev/null)" || true
  if [[ -z "$ended" ]] && alive; then
    echo "run: running"
  elif [[ "$ended" == 143 && -f "$folder/asked" ]]; then
    echo "run: stopped"
  elif [[ "$ended" == 143 ]]; then
    echo "run: interrupted" # by a signal that did not come from tpu_vm.sh: the machine is being taken away
  elif [[ -f "$folder/pid" ]]; then
    echo "run: exit ${ended:-unknown, killed}"
  else
    echo "run: none"
  fi
  echo "log: $(tail -c 4000 "$folder/log" 2>/dev/null | tr '\r' '\n' | grep -v '^ *$' | tail -n 1)"
}

stop() {
  touch "$folder/asked"
  end_run
  status
}

# SIGTERM: the run saves and ends. SIGKILL for what is left after three minutes.
end_run() {
  local second
  alive || return 0
  kill -TERM -- "-$(cat "$folder/pid")" 2>/dev/null || true
  for ((second = 0; second < ${STOP_SECONDS:-180} * 5; second++)); do
    alive || return 0
    sleep 0.2
  done
  kill -KILL -- "-$(cat "$folder/pid")" 2>/dev/null || true
}

case "${1:-}" in
  setup | start | status | stop) "$@" ;;
  *) die "there is no verb ${1:-}: setup start status stop" ;;
esac
