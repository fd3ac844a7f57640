"""One module a subcommand of `bimedix`; the table `COMMANDS` in `bimedix_jax.cli` names them.

Each module holds a frozen dataclass `Config`, whose fields with their docstrings are the command's options, and
`run(config, console) -> dict`, whose result is the command's JSON document. Heavy imports (JAX, Flax) happen inside
`run`, so that `--help` stays fast.
"""
