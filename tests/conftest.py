"""Fixtures of the tests that run whole clusters, of which unit tests use none, and settings of all tests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from made_checkpoints import CheckpointMaker

if TYPE_CHECKING:
    from cluster import Cluster
    from vision_cases import VisionCases

# A deadline for each example would measure the machine; pytest-timeout bounds the whole test.
settings.register_profile("kvrelay", deadline=None)
settings.load_profile("kvrelay")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> CheckpointMaker:
    """Makes the checkpoint of a variant of `checkpoints.VARIANTS`, once a session."""
    return CheckpointMaker(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def vision_cases(tmp_path_factory: pytest.TempPathFactory) -> VisionCases:
    from vision_cases import VisionCases

    return VisionCases(tmp_path_factory.mktemp("vision"))


@pytest.fixture(scope="session")
def shared_cluster(checkpoint: CheckpointMaker) -> Iterator[Cluster]:
    """One prefill and one decode worker for every test that does not harm them; small blocks, small chunks."""
    from cluster import Cluster

    with Cluster(
        checkpoint("llama3_scaled"),
        connector="shm",
        block_tokens=16,
        kv_blocks=512,
        max_num_seqs=32,
        max_batched_tokens=64,
        served_model_name="tiny",
    ) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: Cluster) -> Iterator[Cluster]:
    """The shared cluster; after the test nothing of the test is left in it."""
    yield shared_cluster
    shared_cluster.assert_no_leaks()
