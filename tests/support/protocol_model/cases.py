"""The scenes in which nothing goes wrong while all rules hold, and for each rule one in which it is missed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from protocol_model import attempts, lease, memory, tokens
from protocol_model.attempts import AttemptModel, AttemptRules, Message
from protocol_model.explorer import STUCK, Exploration, explore
from protocol_model.lease import LeaseModel, LeaseRules
from protocol_model.memory import MemoryModel, MemoryRules, MemoryScene
from protocol_model.resources import ResourceModel, ResourceRules, ResourceScene
from protocol_model.tokens import TokenModel, TokenRules, TokenScene

Rules = TypeVar("Rules")

# What a scene of the larger bound may visit; the smaller scenes are visited whole.
LARGE_BOUND = 250_000


@dataclass(frozen=True)
class Scene:
    """A model with its circumstances fixed. `search` takes the name of a rule to be switched off, or None."""

    name: str
    search: Callable[[str | None], Exploration]


@dataclass(frozen=True)
class MissedRule:
    """Without `rule`, `scene` reaches a violation of this kind."""

    rule: str
    scene: Scene
    kind: str


def _rules(switches: Callable[..., Rules], without: str | None) -> Rules:
    return switches(**({} if without is None else {without: False}))


def _memory(name: str, scene: MemoryScene, max_states: int = LARGE_BOUND) -> Scene:
    return Scene(name, lambda without: explore(MemoryModel(scene, _rules(MemoryRules, without)), max_states))


def _resources(name: str, scene: ResourceScene) -> Scene:
    def search(without: str | None) -> Exploration:
        return explore(ResourceModel(scene, _rules(ResourceRules, without)), must_progress=True)

    return Scene(name, search)


def _tokens(name: str, scene: TokenScene) -> Scene:
    def search(without: str | None) -> Exploration:
        return explore(TokenModel(scene, _rules(TokenRules, without)), must_progress=True)

    return Scene(name, search)


def _attempts(name: str, *sent: Message) -> Scene:
    return Scene(name, lambda without: explore(AttemptModel(sent, _rules(AttemptRules, without))))


_OPEN_1, _OPEN_2, _CANCEL_1 = Message("open", 1), Message("open", 2), Message("cancel", 1)

ONE_BLOCK = _memory("memory: two prompts, one block", MemoryScene())
SHARED_PREFIX = _memory("memory: a prefix hit", MemoryScene("aa", source_blocks=1, reader_blocks=2))
THREE_REQUESTS = _memory("memory: three requests, one block", MemoryScene("aab"))
SLOW_READ = _memory("memory: reads that outlive their request", MemoryScene(source_blocks=2))
OVERSHOOT = _memory("memory: steps that outlive their request", MemoryScene(source_blocks=2, overshoot=True))
STORE = _memory("memory: a write-behind store", MemoryScene(store=True))
RESTART = _memory("memory: a restart under an old mapping", MemoryScene(restart=True))
EVERY_FAULT = _memory("memory: every fault", MemoryScene(overshoot=True, store=True, restart=True))

LARGER = _resources("resources: more requests than room", ResourceScene((2, 1, 2), 4, (4,), growth=1))
TOO_LARGE = _resources("resources: a prompt larger than the pool", ResourceScene((3, 1), 2, (4,)))
LONG_PROMPTS = _resources("resources: prompts as large as the pool", ResourceScene((2, 2), 2, (2,)))
TIGHT = _resources("resources: both pools tight", ResourceScene((2, 2), 4, (2,)))
GROWTH = _resources("resources: sequences that grow", ResourceScene((1, 1, 1), 3, (3,), growth=1))
TWO_DECODES = _resources("resources: a small and a large decode worker", ResourceScene((2, 1), 2, (1, 2)))
NEXT_TURNS = _resources("resources: next turns", ResourceScene((1, 1, 1, 1), 2, (2,), next_turns=2))

ALL_FAULTS = _tokens("tokens: every fault", TokenScene())
LIVE_DECODE = _tokens("tokens: decode lives, its session breaks", TokenScene(decode_may_die=False))

LEASE = Scene(
    "lease: one ticket",
    lambda without: explore(LeaseModel(_rules(LeaseRules, without)), must_progress=True),
)

CANCELLED = _attempts("attempts: cancelled", _OPEN_1, _CANCEL_1)
PLACED_ANEW = _attempts("attempts: placed anew on the same worker", _OPEN_1, _CANCEL_1, _OPEN_2, _OPEN_2)
NOT_CANCELLED = _attempts("attempts: the cancel was lost", _OPEN_1, _OPEN_2)

SCENES = (
    ONE_BLOCK, SHARED_PREFIX, THREE_REQUESTS, SLOW_READ, OVERSHOOT, STORE, RESTART, EVERY_FAULT,
    LARGER, TOO_LARGE, LONG_PROMPTS, TIGHT, GROWTH, TWO_DECODES, NEXT_TURNS,
    ALL_FAULTS, LIVE_DECODE, LEASE, CANCELLED, PLACED_ANEW, NOT_CANCELLED,
)  # fmt: skip

LARGE_SCENES = (
    _memory("memory: three requests, two blocks each side", MemoryScene("aab", 2, 2)),
    _memory("memory: every fault, two blocks", MemoryScene("ab", 2, 2, overshoot=True, store=True, restart=True)),
    _resources("resources: five requests", ResourceScene((2, 1, 3, 2, 1), 5, (4, 5), growth=1, next_turns=2)),
)

MISSED_RULES = (
    MissedRule("bump_before_reuse", ONE_BLOCK, memory.WRONG_KV),
    MissedRule("keep_word_on_hit", SHARED_PREFIX, memory.SPURIOUS_STALE),
    MissedRule("publish_only_sealed", SHARED_PREFIX, memory.WRONG_KV),
    MissedRule("credit_by_launch_word", ONE_BLOCK, memory.WRONG_KV),
    MissedRule("rewrite_in_private_block", SHARED_PREFIX, memory.WRONG_KV),
    MissedRule("retire_after_last_step", OVERSHOOT, memory.WRONG_KV),
    MissedRule("quarantine_destinations", SLOW_READ, memory.WRONG_KV),
    MissedRule("words_after_data", ONE_BLOCK, memory.WRONG_KV),
    MissedRule("recheck_stores", STORE, memory.TIER_POISONED),
    MissedRule("epoch_in_word", RESTART, memory.WRONG_KV),
    MissedRule("exports_unpinned", NEXT_TURNS, STUCK),
    MissedRule("refuse_too_large", TOO_LARGE, STUCK),
    MissedRule("reserve_prompt_whole", LONG_PROMPTS, STUCK),
    MissedRule("reserve_at_first_ready", LONG_PROMPTS, STUCK),
    MissedRule("reserve_all_or_nothing", TIGHT, STUCK),
    MissedRule("keep_growth_watermark", GROWTH, STUCK),
    MissedRule("offer_ticket_elsewhere", TWO_DECODES, STUCK),
    MissedRule("follow_takes_over", LEASE, lease.PINS_LOST),
    MissedRule("cap_until_followed", LEASE, lease.PINS_LEAKED),
    MissedRule("require_engine_beats", LEASE, lease.PINS_LEAKED),
    MissedRule("tolerate_pauses", LEASE, lease.PINS_LOST),
    MissedRule("grace_for_lost_transport", LEASE, lease.PINS_LOST),
    MissedRule("leaving_frees_at_once", LEASE, lease.PINS_LEAKED),
    MissedRule("refused_returns_to_stream", LEASE, lease.TICKET_WASTED),
    MissedRule("release_is_idempotent", LEASE, lease.PINS_LOST),
    MissedRule("count_holders", LEASE, lease.PINS_LOST),
    MissedRule("cap_the_pull", LEASE, lease.PINS_LEAKED),
    MissedRule("first_copy_wins", ALL_FAULTS, tokens.DOUBLE_EMISSION),
    MissedRule("gaps_wait", ALL_FAULTS, tokens.OUT_OF_ORDER),
    MissedRule("drop_lower_attempts", ALL_FAULTS, tokens.INCOHERENT),
    MissedRule("resume_with_committed", ALL_FAULTS, tokens.INCOHERENT),
    MissedRule("decode_echoes_first_token", LIVE_DECODE, STUCK),
    MissedRule("decode_asks_when_lost", ALL_FAULTS, tokens.INCOHERENT),
    MissedRule("decode_always_told", LIVE_DECODE, STUCK),
    MissedRule("repeat_the_same_answer", LIVE_DECODE, STUCK),
    MissedRule("reattach_sends_again", LIVE_DECODE, STUCK),
    MissedRule("keep_tombstones", CANCELLED, attempts.ZOMBIE),
    MissedRule("cancel_names_its_attempt", PLACED_ANEW, attempts.NOT_RUNNING),
    MissedRule("same_reattaches", PLACED_ANEW, attempts.STARTED_TWICE),
    MissedRule("higher_supersedes", NOT_CANCELLED, attempts.TWO_AT_ONCE),
    MissedRule("refuse_lower", NOT_CANCELLED, attempts.TWO_AT_ONCE),
)
