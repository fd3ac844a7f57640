"""`python -m bimedix_jax` is `bimedix`."""

import sys

from bimedix_jax.cli import main

sys.exit(main())
