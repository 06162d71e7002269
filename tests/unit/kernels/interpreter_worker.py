"""Runs cases of the op specs in Triton's interpreter, one JSON line in, one out.

A process of its own: the interpreter must be chosen before Triton is imported, and another test of the same
pytest process may have imported it already.
"""

import json
import os
import sys
import traceback

os.environ["TRITON_INTERPRET"] = "1"

import torch

from kvrelay_kernels.specs import all_specs


def main() -> None:
    torch.set_num_threads(1)
    specs = all_specs()
    for line in sys.stdin:
        name, shape = json.loads(line)
        try:
            specs[name].check(shape, torch.float32, torch.device("cpu"))
            failure = None
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps(failure), flush=True)


if __name__ == "__main__":
    main()
