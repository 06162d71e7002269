"""A child that is tied to its parent ends with it, and does not begin without it."""

from __future__ import annotations

import os
import select
import subprocess
import sys

import pytest

from kvrelay_core.parent_death import parent_death_tie

TIMEOUT_S = 20.0
PARENT = """
import os, subprocess, sys
from kvrelay_core.parent_death import parent_death_tie
child = subprocess.Popen([sys.executable, "-c", "input()"], preexec_fn=parent_death_tie(os.getpid()))
print(child.pid, flush=True)
child.wait()
"""


def test_the_child_is_killed_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-P", "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert not select.select([child], [], [], 0)[0]
            parent.kill()
            assert select.select([child], [], [], TIMEOUT_S)[0], "the child outlived its parent"
        finally:
            os.close(child)


def test_a_child_without_its_parent_does_not_begin() -> None:
    # Of another process than our parent: ours counts as gone. In a child, for the tie cannot be undone.
    with pytest.raises(subprocess.SubprocessError):
        subprocess.run([sys.executable, "-c", "pass"], preexec_fn=parent_death_tie(1), check=True, timeout=TIMEOUT_S)
