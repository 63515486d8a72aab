import sys

from dino_jax.cli import main

sys.exit(main())
