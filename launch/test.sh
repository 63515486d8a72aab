#!/usr/bin/env bash
# Lint, types, import contracts and tests:
#
#   launch/test.sh [--all] [arguments of pytest]
#
# --all adds the tests marked `extra` (other libraries, several processes, TPU compiles) and installs what they need.
# Makes its own environment the first time. DINO_VENV and PYTHON: see common.sh. Paths are relative to the checkout.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

packages="test"
marker="not extra"
arguments=()
for argument in "$@"; do
  if [[ "$argument" == --all ]]; then
    packages="all"
    marker=""
  else
    arguments+=("$argument")
  fi
done

failed=""
check() {
  local name="$1"
  shift
  say "$name"
  "$@" || failed="$failed${failed:+, }$name"
}

ensure "$packages"
cd "$root"
export JAX_PLATFORMS=cpu
check "ruff check" "$venv_python" -m ruff check .
check "ruff format" "$venv_python" -m ruff format --check .
check "mypy" "$venv_python" -m mypy
check "lint-imports" "$venv/bin/lint-imports" --no-logo
if [[ -x "$venv/bin/shellcheck" ]]; then
  check "shellcheck" "$venv/bin/shellcheck" -x launch/*.sh launch/*.sbatch .ci/run
fi
check "pytest" "$venv_python" -m pytest -n 2 --dist loadfile -m "$marker" ${arguments[@]+"${arguments[@]}"}

[[ -z "$failed" ]] || die "failed: $failed"
