"""The proof that the service survives whatever dies under it. `tests/chaos/run --help` says how."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))  # local_server
