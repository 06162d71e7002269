from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvrelay_engine.weight_pages import huge_page_environment


def test_an_engine_asks_for_huge_pages_and_keeps_the_rest() -> None:
    assert huge_page_environment({"HOME": "/root"}) == {"HOME": "/root", "THP_MEM_ALLOC_ENABLE": "1"}


def test_what_the_user_set_stays() -> None:
    assert huge_page_environment({"THP_MEM_ALLOC_ENABLE": "0"}) == {"THP_MEM_ALLOC_ENABLE": "0"}


def test_tensors_lie_on_huge_pages() -> None:
    with open("/sys/kernel/mm/transparent_hugepage/enabled") as file:
        if "[never]" in file.read():
            pytest.skip("this kernel gives no huge pages: /sys/kernel/mm/transparent_hugepage/enabled is never")
    program = (
        "import torch; weight = torch.ones(64 << 20, dtype=torch.uint8)\n"
        "for line in open('/proc/self/smaps_rollup'):\n"
        "    if line.startswith('AnonHugePages:'): print(int(line.split()[1]) // 1024)"
    )
    environment = huge_page_environment(os.environ)
    told = subprocess.run([sys.executable, "-P", "-c", program], env=environment, capture_output=True, check=True)
    assert int(told.stdout) >= 62, told.stdout
