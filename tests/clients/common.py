"""What every script of this folder is given: the servers that `run.py` started, and what they are asked."""

import os
from typing import Any

URL, LOADING_URL = os.environ["POLYMOE_URL"], os.environ["POLYMOE_LOADING_URL"]
KEY, SPENT_KEY = os.environ["POLYMOE_KEY"], os.environ["POLYMOE_SPENT_KEY"]
MODEL = "base"
ASK: Any = [{"role": "user", "content": "the fox"}]
CITIES = ("Paris", "Rome")
PARAMETERS: Any = {
    "type": "object",
    "properties": {"city": {"enum": list(CITIES)}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
DESCRIPTION = "Weather of a city"
