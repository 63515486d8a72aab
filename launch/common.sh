# shellcheck shell=bash
# Shared by the scripts of this folder: finds a Python and makes the environment. What is missing is one line.
#
#   PYTHON     the interpreter to use; without it python3, python3.13, python3.12, python3.11 are tried
#   DINO_VENV  the environment's folder; without it .venv in the checkout
#
# Nothing is ever deleted: an environment that does not fit is named in the error.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${DINO_VENV:-$root/.venv}"
[[ "$venv" == /* ]] || venv="$PWD/$venv"
venv_python="$venv/bin/python"

say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }

die() {
  printf '%s: error: %s\n' "${0##*/}" "$*" >&2
  exit 1
}

# ensure base|tpu|cuda|test|all: an environment with what quickstart.sh, a TPU or GPU machine, test.sh or `test.sh --all`
# needs.
# A stamp marks a complete installation. It is repeated when a pin, an extra or the path of the checkout changes.
ensure() {
  local set="$1" part contains=(base)
  check_held
  [[ -x "$venv_python" && "$(cat "$venv/.dino-jax-$set" 2>/dev/null)" == "$(fingerprint)" ]] && return
  check_place "$set"
  make_venv
  : >"$venv/install.log"
  say "installing dino-jax into $venv (log: $venv/install.log)"
  case "$set" in
    base) pip_install -e "$root" ;;
    tpu | cuda)
      pip_install -e "${root}[$set]"
      contains+=("$set")
      ;;
    test)
      pip_install -e "${root}[test]"
      contains+=(test)
      ;;
    all)
      pip_install -e "${root}[test,export,hf,tiff,tpu]"
      pip_install --no-deps jax2onnx # see pyproject.toml
      install_peers
      contains+=(test tpu all)
      ;;
  esac
  for part in "${contains[@]}"; do
    fingerprint >"$venv/.dino-jax-$part"
  done
  say "ready: $(du -sm "$venv" | cut -f1) MB"
}

fingerprint() {
  {
    printf '%s\n' "$root"
    cat "$root/pyproject.toml" "$root/constraints.txt" "$venv/pyvenv.cfg"
  } 2>/dev/null | cksum
}

# Ends the script unless the environment's folder can be written and has space on its disk.
check_place() {
  local need_gb free_kb
  if [[ ! -e "$venv/pyvenv.cfg" && -n "$(find "$venv" -mindepth 1 ! -name install.log 2>/dev/null | head -n 1)" ]]; then
    die "$venv exists and is not a Python environment: name another folder with DINO_VENV"
  fi
  if ! { mkdir -p "$venv" && : >"$venv/install.log"; } 2>/dev/null; then
    die "cannot write to $venv: make it writable or name another folder with DINO_VENV"
  fi
  case "$1" in base) need_gb=2 ;; test | tpu) need_gb=3 ;; *) need_gb=6 ;; esac
  [[ -x "$venv_python" ]] && need_gb=1 # most of it is installed
  free_kb="$(df -Pk "$venv" | awk 'NR == 2 { print $4 }')"
  ((free_kb >= need_gb * 1024 * 1024)) ||
    die "$((free_kb / 1024)) MB are free on the disk of $venv and $need_gb GB are needed: free some or set DINO_VENV"
}

make_venv() {
  local python="" version=""
  "$venv_python" -c 'import pip' 2>/dev/null && return
  find_python
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "Python $version lacks the venv module: install it (Debian, Ubuntu: apt install python${version%.*}-venv) or set PYTHON"
  say "making an environment with Python $version in $venv"
  "$python" -m venv "$venv" >"$venv/install.log" 2>&1 || die "$python -m venv failed: $(last_line "$venv/install.log")"
}

# An existing environment must be new enough, and of $PYTHON's version where that is set.
check_held() {
  local python="" version="" held
  held="$(version_of "$venv_python")" || return 0 # none, or broken: make_venv fixes it
  if [[ -n "${PYTHON:-}" ]]; then
    find_python
    [[ "${held%.*}" == "${version%.*}" ]] || die "$venv holds Python $held, PYTHON is $version: remove it or set DINO_VENV"
  fi
  new_enough "$held" || die "$venv holds Python $held and 3.11 is needed: remove it or set DINO_VENV"
}

# Sets `python` and `version` to the first interpreter that is new enough.
find_python() {
  local candidate found="" candidates=(python3 python3.13 python3.12 python3.11)
  [[ -n "${PYTHON:-}" ]] && candidates=("$PYTHON")
  for candidate in "${candidates[@]}"; do
    version="$(version_of "$candidate")" || continue
    if new_enough "$version"; then
      python="$candidate"
      return
    fi
    found="${found:-$candidate is $version}"
  done
  die "Python 3.11 or newer is needed and ${found:-${candidates[0]} is not installed}: install one or name it with PYTHON"
}

# The version as MAJOR.MINOR.MICRO; fails where $1 does not run as a Python.
version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

new_enough() {
  local major minor
  IFS=. read -r major minor _ <<<"$1"
  ((major > 3 || (major == 3 && minor >= 11)))
}

pip_install() { pip_try "$@" || die "$(diagnose "$venv/install.log")"; }

# The pins hold for building too; which of the two variables pip reads depends on its version.
pip_try() {
  local pins="$root/constraints.txt"
  PIP_CONSTRAINT="$pins" PIP_BUILD_CONSTRAINT="$pins" \
    "$venv_python" -m pip install --disable-pip-version-check --progress-bar off --no-compile "$@" 2>&1 |
    tee -a "$venv/install.log" | milestones
}

# The libraries that the cross-check tests compare with. torch's Linux wheels on the package index bring gigabytes of
# CUDA, so only its CPU build is installed, from where pip is configured to look. Without one, these tests skip.
install_peers() {
  local torch
  torch="$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$root/constraints.txt" | head -n 1)"
  [[ "$(uname)" == Linux ]] && torch="$torch+cpu"
  if pip_try --no-deps "torch==$torch"; then
    pip_install -e "${root}[peers]"
    pip_install --no-deps vos-benchmark # see pyproject.toml
  else
    say "no torch $torch for this Python where pip looks (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL): tests with torch will be skipped"
  fi
}

# The lines of pip's output that show progress: downloads of a megabyte or more, the installation, retries.
milestones() {
  local telling="(Downloading|Using cached) [^ ]+ \([0-9.]+ [MG]B\)|Installing (build dependencies|collected packages)"
  grep --line-buffered -oE "$telling|WARNING: Retrying" || true # none is no failure
}

# One line for why pip failed.
diagnose() {
  local log="$1" offline="Retrying|NewConnectionError|ConnectionError|Max retries|name resolution|Name or service not known"
  offline+="|Connection refused|Network is unreachable|timed out|ProxyError|SSLError"
  if grep -qE "No space left on device|Errno 28" "$log"; then
    echo "the disk of $venv is full: free some space or set DINO_VENV (log: $log)"
  elif grep -qE "$offline" "$log"; then
    echo "pip cannot reach the package index: check the network or the proxy settings (log: $log)"
  else
    echo "pip failed: $(last_line "$log") (log: $log)"
  fi
}

# The last error in a log, or its last line: a traceback's own message.
last_line() {
  { grep -E '^ *(ERROR|error):' "$1" | grep -v 'ERROR: Exception:' || grep -v '^ *$' "$1" || echo "no message"; } | tail -n 1
}
