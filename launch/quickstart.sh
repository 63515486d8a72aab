#!/usr/bin/env bash
# Trains a small DINO on rendered images, on a CPU, in a few minutes, and shows what it learned:
#
#   launch/quickstart.sh [arguments of dino_jax.tools.quickstart]
#
# Needs bash and Python 3.11 or newer; makes its own environment the first time. Results go to runs/quickstart in the
# checkout. DINO_VENV and PYTHON: see common.sh.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

ensure base
cd "$root"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec "$venv_python" -m dino_jax.tools.quickstart "$@"
