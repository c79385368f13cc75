"""The process that tries models for the zoo: a model's entry comes in as a JSON line, its row goes out as one.

It ends when its memory has grown beyond a limit; `run` then starts another. What libraries print goes to standard
error, so that rows are alone on standard output.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys

LIMIT = 4 * 2**20  # KiB of resident memory at which the process gives up its place


def main() -> None:
    """Serve until the input ends or memory has grown."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    import torch

    from convrewrite.zoo.models import Entry
    from convrewrite.zoo.trial import try_model

    torch.set_num_threads(1)
    for line in sys.stdin:
        row = try_model(Entry(**json.loads(line)))
        answers.write(row.to_json() + "\n")
        answers.flush()
        gc.collect()
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > LIMIT:
            return


if __name__ == "__main__":
    main()
