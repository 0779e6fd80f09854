"""What every script of this folder is given."""

import os
from pathlib import Path

URL, KEY = os.environ["POLYMOE_URL"], os.environ["POLYMOE_KEY"]
CHECKPOINTS = {
    name: Path(path)
    for name, path in (pair.split("=", 1) for pair in os.environ["POLYMOE_CHECKPOINTS"].split(os.pathsep))
}
SECONDS = 60 * float(os.environ.get("HARNESS_MINUTES", "10"))
