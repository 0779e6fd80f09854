"""What `run.py` and a system's process say to each other: one JSON object a line, over stdin and stdout.

    run.py -> {"models": [PATH, …], "options": {…}}                          once; the worker loads
    worker -> {"ready": true} | {"error": "…"}
    run.py -> {"prompts": [[model index, [token ids]], …], "output_tokens": N}   a run; the worker waits for `go`
    worker -> {"waiting": true}
    run.py -> {"go": true}                                                   to all workers at once: the barrier
    worker -> {"output_tokens": N, "seconds": S}

The worker's own prints go to stderr, so that a library's chatter cannot break the protocol. It ends when stdin closes.
Only the standard library is used here: the worker may run in another environment than polymoe's.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable

Load = Callable[[list[tuple[int, list[int]]], int], int]  # (model index, token ids) each, output tokens -> tokens made


def serve(load: Callable[[list[str], dict[str, int]], Load]) -> int:
    """Answer `run.py` until it closes the pipe. Returns the exit code."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")

    start = json.loads(sys.stdin.readline())
    try:
        run = load(start["models"], start["options"])
        answer(ready=True)
        for line in sys.stdin:
            job = json.loads(line)
            prompts = [(int(index), ids) for index, ids in job["prompts"]]
            answer(waiting=True)
            sys.stdin.readline()
            started = time.perf_counter()
            tokens = run(prompts, job["output_tokens"])
            answer(output_tokens=tokens, seconds=time.perf_counter() - started)
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")
        return 1
    return 0
