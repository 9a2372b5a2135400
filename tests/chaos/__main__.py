"""`tests/chaos/run`. The executables are chosen before anything looks for them."""

import os
import sys

for i, word in enumerate(sys.argv):
    if word == "--bin-dir" and i + 1 < len(sys.argv):
        os.environ["RELORA_BIN_DIR"] = sys.argv[i + 1]
    elif word.startswith("--bin-dir="):
        os.environ["RELORA_BIN_DIR"] = word.partition("=")[2]

from .table import main  # noqa: E402

try:
    sys.exit(main())
except KeyboardInterrupt:
    sys.exit(130)
