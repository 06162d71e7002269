"""The documents say what is there: links lead somewhere, files and flags exist, errors and rules are complete."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from protocol_model.attempts import AttemptRules
from protocol_model.lease import LeaseRules
from protocol_model.memory import MemoryRules
from protocol_model.resources import ResourceRules
from protocol_model.tokens import TokenRules

from kvrelay_cli.main import build_parser
from kvrelay_core import errors

ROOT = Path(__file__).parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/**/*.md")])
COMPONENTS = (
    "bench", "cli", "client", "core", "decode_service", "engine", "kernels", "kv_transfer", "prefill_service",
    "proto", "router", "scripts", "tests", "worker",
)  # fmt: skip
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
# A path in backticks that names a file: `folder/file.ext`, or `file.ext` beside the document's folder of files.
FILE_NAME = re.compile(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|proto|md|toml|yaml|txt))`")
RULE_HEADING = re.compile(r"^\*\*([A-E]\d)\.", re.MULTILINE)
CITATION = re.compile(r"PROTOCOL ((?:[A-E]\d(?:, | and | to )?)+)")


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors_of(document: Path) -> set[str]:
    text = CODE_BLOCK.sub("", document.read_text())
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(document: Path) -> Iterator[str]:
    for target in LINK.findall(CODE_BLOCK.sub("", document.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path_text, _, anchor = target.partition("#")
        path = (document.parent / path_text).resolve() if path_text else document
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            yield target


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document: Path) -> None:
    assert list(broken_links(document)) == []


@pytest.mark.parametrize("document", sorted(ROOT.glob("docs/**/*.md")), ids=relative)
def test_files_that_are_named_exist(document: Path) -> None:
    names = set(FILE_NAME.findall(document.read_text()))
    assert sorted(name for name in names if not (ROOT / name).exists()) == []


def test_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/protocol.md").read_text())
    assert len(named) > 20
    missing = [f"{path}::{name}" for path, name in named if f"def {name}(" not in (ROOT / path).read_text()]
    assert missing == []


def test_architecture_names_files_at_all() -> None:
    """So that the test above cannot pass by finding nothing."""
    assert len(set(FILE_NAME.findall((ROOT / "docs/ARCHITECTURE.md").read_text()))) > 30


def error_classes(root: type[errors.KvRelayError] = errors.KvRelayError) -> Iterator[type[errors.KvRelayError]]:
    yield root
    for child in root.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from error_classes(child)


def test_every_error_is_explained_with_its_status() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    documented = set(re.findall(r"^\| `(\w+Error)` \| ([A-Z_]+) \|", text, re.MULTILINE))
    assert documented == {(cls.__name__, cls.status) for cls in error_classes()}


def flags_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from flags_of(child)
        else:
            yield from (flag for flag in action.option_strings if flag.startswith("--"))


def test_flags_of_clusters_and_roles_are_documented_and_exist() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    table = text[text.index("| flag | of |") : text.index("## Sizing")]
    documented = {
        flag for row in table.splitlines()[2:] if "|" in row for flag in re.findall(r"`(--[\w-]+)`", row.split("|")[1])
    }
    real = {flag for command in ("up", "serve") for flag in flags_of(build_parser(command))}
    assert documented == real - {"--help", "--version"}


def test_flags_named_anywhere_exist() -> None:
    real = {
        flag for command in ("up", "serve", "generate", "doctor", "cache") for flag in flags_of(build_parser(command))
    }
    elsewhere = {"--check", "--full"}  # of scripts/proto and scripts/test
    for document in ROOT.glob("docs/**/*.md"):
        named = set(re.findall(r"`(--[a-z][\w-]+)", document.read_text()))
        assert named <= real | elsewhere, relative(document)


def documented_rules() -> set[str]:
    return set(RULE_HEADING.findall((ROOT / "docs/protocol.md").read_text()))


def test_protocol_has_its_rules() -> None:
    counts = {"A": 7, "B": 7, "C": 7, "D": 3, "E": 3}
    assert documented_rules() == {f"{part}{n + 1}" for part, count in counts.items() for n in range(count)}


def test_rules_that_code_cites_exist() -> None:
    cited: set[str] = set()
    for component in COMPONENTS:
        for path in (ROOT / component).rglob("*.py"):
            if "gen" not in path.parts:
                for group in CITATION.findall(path.read_text()):
                    cited.update(re.findall(r"[A-E]\d", group))
    assert len(cited) > 10
    assert cited <= documented_rules()


def test_every_switch_of_the_model_is_named_with_its_rule() -> None:
    text = (ROOT / "docs/protocol.md").read_text()
    for rules in (MemoryRules, ResourceRules, LeaseRules, TokenRules, AttemptRules):
        for switch in fields(rules):
            assert f"`{switch.name}`" in text, f"docs/protocol.md does not say what is missed without {switch.name}"


def test_decisions_are_numbered_and_listed() -> None:
    decisions = sorted(path.name for path in (ROOT / "docs/adr").glob("[0-9]*.md"))
    assert [int(name[:4]) for name in decisions] == list(range(1, len(decisions) + 1))
    index = (ROOT / "docs/adr/README.md").read_text()
    for name in decisions:
        assert f"({name})" in index
        text = (ROOT / "docs/adr" / name).read_text()
        assert text.startswith(f"# {name[:4]}. ")
        for part in ("**Context.**", "**Decision.**", "**Consequences.**", "**Alternatives"):
            assert part in text, f"{name} lacks {part}"


@pytest.mark.parametrize("component", [name for name in COMPONENTS if name not in ("bench", "scripts")])
def test_every_component_says_what_it_is(component: str) -> None:
    readme = ROOT / component / "README.md"
    assert readme.exists(), "a component root holds a README and one package"
    assert len(readme.read_text()) > 200
