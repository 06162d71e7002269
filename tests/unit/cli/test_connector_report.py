"""What `doctor` makes of the facts: missing parts, what `auto` leaves out, probers that die or say nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from msgspec.structs import replace

from kvrelay_cli.connector_report import (
    ConnectorSurvey,
    auto_findings,
    auto_note,
    finding_of,
    look_at_torch,
    missing_part,
)
from kvrelay_cli.finding import Verdict
from kvrelay_cli.transfer.prober import Gpu, Prober, Speed, TorchFacts
from kvrelay_core.errors import DeadlineError, UnsupportedError, WorkerLostError

CPU = TorchFacts("2.13.0", 2, None, (), False, {"cpu": ("shm", "grpc")})
H100 = Gpu("H100", 60 << 30, 80 << 30, (1,))
GPUS = replace(
    CPU,
    cuda_version="13.0",
    gpus=(H100, replace(H100, peers=(0,))),
    auto={"cpu": ("shm", "grpc"), "cuda": ("cuda_ipc", "grpc")},
)
RDMA = replace(CPU, has_rdma=True, auto={"cpu": ("shm", "nixl", "grpc")})
SPEED = Speed("cpu", 1.0, 4.0, 5.0, 0.002)


def everything(module: str) -> bool:
    return True


def nothing(module: str) -> bool:
    return False


@pytest.mark.parametrize(
    ("name", "facts", "is_installed", "words"),
    [
        ("shm", None, nothing, "missing: connectors need torch; pip install 'kvrelay[engine]'"),
        ("shm", None, everything, "missing: connectors need torch, and it does not work here"),
        ("cuda_ipc", CPU, everything, "missing: no GPU that torch can use; it reads pools of GPUs in one host"),
        (
            "nixl", CPU, nothing,
            "missing: NIXL is not installed, and there is no RDMA hardware for it, so auto does without; "
            "pip install 'kvrelay[nixl]'",
        ),
        ("nixl", RDMA, nothing, "missing: NIXL is not installed; pip install 'kvrelay[nixl]'"),
        (
            "ucx", CPU, nothing,
            "missing: ucxx is not installed; auto does without; pip install 'kvrelay[ucx]' (with CUDA 12: ucxx-cu12)",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_and_how_to_get_it(
    name: str, facts: TorchFacts | None, is_installed: Callable[[str], bool], words: str
) -> None:
    assert str(missing_part(name, facts, is_installed)) == words


@pytest.mark.parametrize("name", ["shm", "nixl", "ucx", "grpc", "cuda_ipc"])
def test_nothing_is_missing_where_all_is_there(name: str) -> None:
    assert missing_part(name, GPUS, everything) is None


def test_why_a_connector_is_not_in_auto() -> None:
    assert "no RDMA hardware" in auto_note("nixl", CPU)
    assert auto_note("nixl", RDMA) == "" == auto_note("shm", CPU) == auto_note("cuda_ipc", GPUS)
    assert auto_note("ucx", RDMA) == "not in auto; --connector ucx takes it"


def test_order_of_auto_for_each_device() -> None:
    texts = [finding.text for finding in auto_findings(GPUS)]
    assert texts[0].startswith("--device cpu: shm, then grpc")
    assert texts[1].startswith("--device cuda: cuda_ipc, then grpc")


def test_gpus_and_which_memory_they_read() -> None:
    torch, first, second = look_at_torch(GPUS, "", has_driver=True)
    assert torch.text == "2.13.0, 2 threads, CUDA 13.0"
    assert first.text == "H100, 60.0 of 80.0 GiB free; reads cuda:1 directly"
    assert second.text.endswith("reads cuda:0 directly")


def test_gpus_that_do_not_reach_each_other() -> None:
    apart = replace(GPUS, gpus=tuple(replace(gpu, peers=()) for gpu in GPUS.gpus))
    *_, last = look_at_torch(apart, "", has_driver=True)
    assert last.verdict is Verdict.ABSENT and last.name == "peer access"


def test_a_driver_that_torch_cannot_use_is_a_problem() -> None:
    *_, cuda = look_at_torch(CPU, "", has_driver=True)
    assert cuda.verdict is Verdict.BAD
    *_, cuda = look_at_torch(CPU, "", has_driver=False)
    assert cuda.verdict is Verdict.ABSENT


class FakeProber:
    """Answers by a script; what was asked of it is in `asked`."""

    def __init__(self, answers: dict[str, Speed | Exception]) -> None:
        self._answers = answers
        self.asked: list[tuple[str, str]] = []
        self.is_closed = False

    def measure(self, name: str, device: str, timeout_s: float) -> Speed:
        assert not self.is_closed and timeout_s > 0
        self.asked.append((name, device))
        answer = self._answers.get(name, SPEED)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.is_closed = True


class Probers:
    """Makes them, and keeps what was made."""

    def __init__(self, **answers: Speed | Exception) -> None:
        self._answers = answers
        self.made: list[FakeProber] = []

    def __call__(self) -> Prober:
        self.made.append(FakeProber(self._answers))
        return cast(Prober, self.made[-1])


def survey_line(probers: Any, name: str, facts: TorchFacts = CPU, budget_s: float = 60.0) -> tuple[Verdict, str]:
    survey = ConnectorSurvey(probers, budget_s)
    finding = finding_of(survey.state_of(name, facts, everything, measure=True))
    survey.close()
    assert all(prober.is_closed for prober in probers.made)
    return finding.verdict, finding.text


def test_a_connector_that_works_has_its_speed() -> None:
    verdict, text = survey_line(Probers(), "shm")
    assert verdict is Verdict.OK
    assert text == "works: 4.00 GB/s on cpu (memcpy 5.00, first touch 1.00), one block 2.00 ms"


def test_a_connector_beside_auto_that_fails_is_no_problem() -> None:
    verdict, text = survey_line(Probers(ucx=UnsupportedError("UCX cannot start")), "ucx")
    assert verdict is Verdict.ABSENT
    assert text == "does not work: UCX cannot start; not in auto; --connector ucx takes it"


def test_a_connector_of_auto_that_fails_is_a_problem() -> None:
    verdict, text = survey_line(Probers(shm=UnsupportedError("no socket")), "shm")
    assert verdict is Verdict.BAD and text == "does not work: no socket"


def test_one_that_takes_its_prober_down_is_told_and_the_next_gets_a_new_one() -> None:
    probers = Probers(nixl=WorkerLostError("the prober process ended with status -11"))
    survey = ConnectorSurvey(probers)
    states = [survey.state_of(name, RDMA, everything, measure=True) for name in ("nixl", "grpc")]
    survey.close()
    assert finding_of(states[0]).verdict is Verdict.BAD and "status -11" in states[0].failure
    assert states[1].speed == SPEED
    assert [prober.asked for prober in probers.made] == [[("nixl", "cpu")], [("grpc", "cpu")]]


def test_one_that_takes_too_long_is_left_open() -> None:
    verdict, text = survey_line(Probers(grpc=DeadlineError("it said nothing for 6 s")), "grpc")
    assert verdict is Verdict.ABSENT
    assert text == "not measured: it said nothing for 6 s; try kvrelay bench transfer --connector grpc"


def test_nothing_is_asked_when_the_time_is_up() -> None:
    probers = Probers()
    verdict, text = survey_line(probers, "grpc", budget_s=0.0)
    assert verdict is Verdict.ABSENT and "the time for measurements was up" in text
    assert probers.made == []


def test_without_measuring_no_prober_is_asked_for_speed() -> None:
    probers = Probers()
    state = ConnectorSurvey(probers).state_of("shm", CPU, everything, measure=False)
    assert finding_of(state).text == "not measured" and probers.made == []


def test_pools_lie_where_the_connector_reads_them() -> None:
    probers = Probers()
    survey = ConnectorSurvey(probers)
    for name in ("shm", "cuda_ipc", "grpc"):
        survey.state_of(name, GPUS, everything, measure=True)
    assert probers.made[0].asked == [("shm", "cpu"), ("cuda_ipc", "cuda"), ("grpc", "cuda")]
