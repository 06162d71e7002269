"""A process of its own that puts parts into a folder: `disk_writer.py WHAT FOLDER CAPACITY FIRST COUNT BODY_BYTES`.

WHAT is `all`: keys FIRST, FIRST+1, ... once each; `forever`: over and over, removing as it goes; or `half`: it stops
for good in the middle of its first part, and says so. Prints a line when it begins, and how much it evicted at the end.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from sealed_parts import key_of, part_of

from kvrelay_transfer.tiers import disk_store
from kvrelay_transfer.tiers.disk_store import DiskStore


def stop_half_way(fd: int, part: memoryview) -> None:
    os.ftruncate(fd, len(part))
    os.pwrite(fd, part[: len(part) // 2], 0)
    print("half", flush=True)
    signal.pause()


def main(what: str, folder: str, capacity_bytes: int, first: int, count: int, body_bytes: int) -> None:
    if what == "half":
        disk_store._write = stop_half_way
    store = DiskStore(Path(folder), capacity_bytes)
    parts = [
        (key_of(number), memoryview(part_of(key_of(number), body_bytes))) for number in range(first, first + count)
    ]
    print("begun", flush=True)
    while True:
        for key, part in parts:
            assert store.put(key, part)
            usage = store.usage()
            assert usage.used_bytes <= usage.capacity_bytes
            if what == "forever":
                store.remove(key)
        if what != "forever":
            break
    print(f"evicted {store.usage().num_evicted}", flush=True)
    store.close()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
