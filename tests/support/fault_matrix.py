"""The fault matrix as data: which fault at which stage of a hand-off has which outcome, who notices, within which time.

`tests/faults/test_matrix.py` runs every cell on every connector; `docs/operations.md` shows the table. Knows no
processes: how a fault is brought about is in `fault_actions`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class Network(Enum):
    """What lies between readers and sources; the value is how the table says it."""

    PROXIES = "loopback, proxies"  # these hold up what the services say to each other, and what grpc reads
    NAMESPACES = "network namespaces"  # all that goes between them goes over a wire


class ClusterKind(NamedTuple):
    """`source` is the --connector of both prefill workers, `readers` those of decode-0 and decode-1."""

    source: str
    readers: tuple[str, str]
    network: Network = Network.PROXIES

    @property
    def connectors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.readers))

    def has(self, fault: str) -> bool:
        """In namespaces only what a wire can do is different."""
        return self.network is Network.PROXIES or fault in NETWORK_FAULTS


CLUSTERS = (
    ClusterKind("auto", ("shm", "grpc")),
    ClusterKind("nixl", ("nixl", "nixl")),
    ClusterKind("ucx", ("ucx", "ucx")),
    ClusterKind("grpc", ("grpc", "grpc"), Network.NAMESPACES),
    ClusterKind("ucx", ("ucx", "ucx"), Network.NAMESPACES),
)
CONNECTORS = tuple(dict.fromkeys(name for kind in CLUSTERS for name in kind.readers))
NETWORK_FAULTS = ("network cut", "network away for 1.5 s", "slow link")


class Stage(Enum):
    BEFORE_ACCEPT = "before accept"  # the source has the request and has issued no ticket
    DURING_PULL = "during pull"  # a part of the blocks has been asked for
    AFTER_LAST_PULL = "after last pull"  # all are here and verified, the ticket is not released
    DURING_DECODE = "during decode"  # the reader has added tokens of its own


class Notice(Enum):
    """Who notices; the value is how the table says it."""

    ROUTER = "router"  # by its session with the worker
    READER = "reader"  # by its Follow
    SOURCE = "source"  # by the reader's Follow
    LEASE = "source's lease"  # by missed beats
    SERVICE = "source's service"  # by the silence of its engine
    CHECK = "reader's check"  # by the fence words


class Outcome(Enum):
    """What the client gets; the value is how the table says it. Tokens are always those of an undisturbed run."""

    GOES_ON = "goes on"  # at the first attempt
    MOVES = "recomputed or placed anew"
    RIGHT = "goes on, or is placed anew"  # whichever wins a race
    CANCELLED = "cancelled, as asked"
    REFUSED = "OverloadedError"
    LEASE_EXPIRED = "LeaseExpiredError for whoever shows it"
    NOT_A_CASE = "-"


@dataclass(frozen=True)
class Cell:
    fault: str
    stage: Stage
    outcome: Outcome
    answer_within_s: float = 0.0  # from the fault to the last token or the error
    notices: tuple[Notice, ...] = ()
    noticed_within_s: float = 1.0
    reason: str = ""  # why it is not a case

    @property
    def text(self) -> str:
        """As the table has it."""
        if self.outcome is Outcome.NOT_A_CASE:
            return f"- ({self.reason})"
        noticed = (
            f"{' and '.join(n.value for n in self.notices)} in {self.noticed_within_s:g} s" if self.notices else ""
        )
        return "; ".join(filter(None, (noticed, f"{self.outcome.value}, {self.answer_within_s:g} s")))


ROUTER, READER, SOURCE, LEASE, SERVICE, CHECK = Notice
GOES_ON, MOVES, RIGHT, CANCELLED, REFUSED, LEASE_EXPIRED, NOT_A_CASE = Outcome
Column = tuple[Outcome, float] | tuple[Outcome, float, tuple[Notice, ...]] | str

NO_TICKET = "no ticket names a block yet"
READ_IS_OVER = "the words were compared; they are not read again"
NO_READ = "no read is under way"

# For each fault: before accept, during pull, after last pull, during decode. A string is why that is not a case.
_ROWS: dict[str, tuple[Column, Column, Column, Column]] = {
    "source killed": (
        (MOVES, 5, (ROUTER,)),
        (MOVES, 6, (ROUTER, READER)),
        (GOES_ON, 3, (ROUTER,)),
        (GOES_ON, 3, (ROUTER,)),
    ),
    "reader killed": (
        (RIGHT, 6, (ROUTER,)),
        (MOVES, 6, (ROUTER, SOURCE)),
        (MOVES, 6, (ROUTER, SOURCE)),
        (MOVES, 6, (ROUTER,)),
    ),
    "source stopped for 5 s": (
        (MOVES, 6, (ROUTER,)),
        (MOVES, 7, (ROUTER, READER)),
        (GOES_ON, 3, (ROUTER,)),
        (GOES_ON, 3, (ROUTER,)),
    ),
    "reader stopped for 5 s": (
        (RIGHT, 7, (ROUTER,)),
        (MOVES, 7, (ROUTER, SOURCE)),
        (MOVES, 7, (ROUTER, SOURCE)),
        (MOVES, 7, (ROUTER,)),
    ),
    "source's engine hung for 5 s": (
        (GOES_ON, 8, (SERVICE,)),
        (MOVES, 7, (SERVICE,)),
        (GOES_ON, 3, (SERVICE,)),
        (GOES_ON, 3, (SERVICE,)),
    ),
    "reader's engine hung for 5 s": (
        (MOVES, 9, (LEASE,)),
        (MOVES, 9, (LEASE,)),
        (GOES_ON, 8, (LEASE,)),
        (GOES_ON, 8),
    ),
    "source's service stopped for 5 s": (
        (MOVES, 6, (ROUTER,)),
        (MOVES, 7, (ROUTER, READER)),
        (GOES_ON, 3, (ROUTER,)),
        (GOES_ON, 3, (ROUTER,)),
    ),
    "reader's service stopped for 5 s": (
        (RIGHT, 7, (ROUTER,)),
        (MOVES, 7, (ROUTER, SOURCE)),
        (MOVES, 7, (ROUTER, SOURCE)),
        (MOVES, 7, (ROUTER,)),
    ),
    "network cut": (
        (MOVES, 6, (READER,)),
        (MOVES, 7, (READER, SOURCE)),
        (GOES_ON, 3, (SOURCE,)),
        (GOES_ON, 3),
    ),
    "slow link": ((RIGHT, 20), (RIGHT, 20), (GOES_ON, 3), (GOES_ON, 3)),
    "source paused for 1.5 s": ((GOES_ON, 6), (GOES_ON, 6), (GOES_ON, 6), (GOES_ON, 6)),
    "reader paused for 1.5 s": ((GOES_ON, 6), (GOES_ON, 6), (GOES_ON, 6), (GOES_ON, 6)),
    "network away for 1.5 s": ((GOES_ON, 6), (GOES_ON, 6), (GOES_ON, 6), (GOES_ON, 6)),
    "block reused under the read": (NO_TICKET, (MOVES, 4, (CHECK,)), (GOES_ON, 3), (GOES_ON, 3)),
    "word changed between data and word read": (NO_TICKET, (MOVES, 4, (CHECK,)), READ_IS_OVER, READ_IS_OVER),
    "word of another epoch": (NO_TICKET, (MOVES, 4, (CHECK,)), READ_IS_OVER, READ_IS_OVER),
    "read landing after the reader cancelled": (NO_READ, (CANCELLED, 3), NO_READ, NO_READ),
    "ticket replayed after release": (
        "there is no ticket yet", (LEASE_EXPIRED, 5), (LEASE_EXPIRED, 5), (LEASE_EXPIRED, 5),
    ),
    "epoch changed by a restart on the same port": (
        (MOVES, 5, (ROUTER,)),
        (MOVES, 6, (ROUTER, READER)),
        (GOES_ON, 3, (ROUTER,)),
        (GOES_ON, 3, (ROUTER,)),
    ),
    "pool full on the reader": ((GOES_ON, 6), (GOES_ON, 4), (GOES_ON, 4), (GOES_ON, 4)),
    "pool full on every reader": (
        (REFUSED, 12),
        "all blocks are reserved at the first Ready",
        "all blocks are reserved at the first Ready",
        "as with the reader's pool full: growth has its own blocks",
    ),
    "disk and shm full": ((GOES_ON, 3), (GOES_ON, 3), (GOES_ON, 3), (GOES_ON, 3)),
}  # fmt: skip
_HUNG_WITHIN_S = 3.0


def _cell(fault: str, stage: Stage, column: Column) -> Cell:
    if isinstance(column, str):
        return Cell(fault, stage, NOT_A_CASE, reason=column)
    outcome, answer_within_s, *rest = column
    notices: tuple[Notice, ...] = rest[0] if rest else ()
    within_s = _HUNG_WITHIN_S if {LEASE, SERVICE} & set(notices) else 1.0
    return Cell(fault, stage, outcome, answer_within_s, notices, within_s)


# By connector and network, why none of the cells can be.
LEFT_OUT = {
    ("shm", Network.NAMESPACES): "it reads memory of its own host, over no network",
    ("nixl", Network.NAMESPACES): "there is RDMA in no namespace, and NIXL refuses TCP (ADR 0012): "
    "the link falls back, or is refused, when it is connected",
}

FAULTS = tuple(_ROWS)
CELLS = tuple(_cell(fault, stage, row[index]) for fault, row in _ROWS.items() for index, stage in enumerate(Stage))
RUN_CELLS = tuple(cell for cell in CELLS if cell.outcome is not NOT_A_CASE)


# Rows that are variants of one: the sample has a cell of one of them.
_VARIANTS = {
    "reader stopped for 5 s": "source stopped for 5 s",
    "source's engine hung for 5 s": "source stopped for 5 s",
    "reader's engine hung for 5 s": "source stopped for 5 s",
    "source's service stopped for 5 s": "source stopped for 5 s",
    "reader's service stopped for 5 s": "source stopped for 5 s",
    "reader paused for 1.5 s": "source paused for 1.5 s",
    "network away for 1.5 s": "source paused for 1.5 s",
    "pool full on every reader": "pool full on the reader",
}


def family_of(fault: str) -> str:
    return _VARIANTS.get(fault, fault)


# Where the connector itself is what the fault meets.
_DURING_PULL = (
    "source killed", "block reused under the read", "word changed between data and word read",
    "read landing after the reader cancelled",
)  # fmt: skip


def is_sampled(seed: int, kind: ClusterKind, cell: Cell, connector: str) -> bool:
    """Whether every run has it: of the first kind a sample, of the other connectors a few, of namespaces none."""
    if kind == CLUSTERS[0]:
        return (cell, connector) in sample(seed)
    return kind.network is Network.PROXIES and cell.stage is Stage.DURING_PULL and cell.fault in _DURING_PULL


def sample(seed: int) -> frozenset[tuple[Cell, str]]:
    """Of the first kind: one cell of each family of faults, over all stages and connectors as evenly as they go."""
    connectors = CLUSTERS[0].connectors
    chance = random.Random(seed)
    families = sorted(set(map(family_of, FAULTS)))
    num_taken: Counter[object] = Counter()
    chosen = set()
    for family in chance.sample(families, len(families)):
        cells = [(cell, name) for cell in RUN_CELLS if family_of(cell.fault) == family for name in connectors]
        chance.shuffle(cells)
        cell, name = min(cells, key=lambda pair: sum(num_taken[key] for key in _keys(*pair)))
        num_taken.update(_keys(cell, name))
        chosen.add((cell, name))
    return frozenset(chosen)


def _keys(cell: Cell, connector: str) -> tuple[object, ...]:
    return cell.stage, connector, (cell.stage, connector)


def table() -> Iterator[str]:
    """The lines of the table in Markdown."""
    yield f"| fault | {' | '.join(stage.value for stage in Stage)} |"
    yield f"|{'---|' * (1 + len(Stage))}"
    for fault in FAULTS:
        yield f"| {fault} | {' | '.join(cell.text for cell in CELLS if cell.fault == fault)} |"


def runs() -> Iterator[str]:
    """Which connector is tried how, as a table in Markdown."""
    yield "| connector | between the workers | cells |"
    yield "|---|---|---|"
    for name in CONNECTORS:
        for network in Network:
            cells = [cell for kind in CLUSTERS if name in kind.readers and kind.network is network
                     for cell in RUN_CELLS if kind.has(cell.fault)]  # fmt: skip
            yield f"| `{name}` | {network.value} | {len(cells) or f'- ({LEFT_OUT[name, network]})'} |"


if __name__ == "__main__":
    print("\n".join((*table(), "", *runs())))
