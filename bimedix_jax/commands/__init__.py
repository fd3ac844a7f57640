"""One module for each subcommand of `bimedix`; the table `COMMANDS` in `bimedix_jax.cli` lists them.

Each module has a frozen dataclass `Config`, whose fields with their docstrings are the command's options, and
`run(config, console) -> dict`, whose result is the command's JSON document. JAX and Flax are imported inside `run`, so
that `--help` is fast.
"""
