"""Most requests name a variant that there is, or all of them would end with its name."""

from typing import Any

import schemathesis


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    del context
    if isinstance(body, dict) and isinstance(body.get("model"), str) and len(body["model"]) % 8 != 7:
        return {**body, "model": ("base", "v1", "v2")[len(body["model"]) % 3]}
    return body
