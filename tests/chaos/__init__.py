"""The proof that the service survives whatever dies under it. `tests/chaos/run --help` says how; README.md what holds."""
