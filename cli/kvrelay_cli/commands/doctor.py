"""`kvrelay doctor`: what this machine can do, or what a running worker says of itself. Changes nothing, needs no
model."""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import msgspec

from kvrelay_cli import flag_types
from kvrelay_cli.commands.generate import tls_files
from kvrelay_cli.finding import Finding, Verdict
from kvrelay_cli.flags import add_tls_flags
from kvrelay_core.errors import ConfigError, DeadlineError, WorkerLostError

if TYPE_CHECKING:
    from kvrelay_cli.connector_report import ConnectorState
    from kvrelay_cli.transfer.prober import TorchFacts

EPILOG = """\
Each line says `ok`, `--` (not there, and not needed) or `BAD` (something will not work). Exit code 2 with a BAD line.
Connectors are tried between two processes, blocks of 2 MiB; GB/s are 10^9 bytes a second. It takes 20 s at most.
`kvrelay bench transfer` measures more closely.

examples:
  kvrelay doctor                              this machine
  kvrelay doctor --json                       the same for programs
  kvrelay doctor --target 127.0.0.1:50061     a running worker: its pool, its hand-offs, its links
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-speed", action="store_true", help="leave out the measurements")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    parser.add_argument(
        "--target", type=flag_types.address, metavar="HOST:PORT", help="ask the worker that listens there instead"
    )
    add_tls_flags(parser, "for a worker that was started with them")


def run(args: argparse.Namespace) -> int:
    if args.target is not None:
        from kvrelay_cli.worker_report import ask_worker, lines_of_worker

        answer = ask_worker(args.target, tls_files(args))
        print(json.dumps(answer) if args.json else "\n".join(lines_of_worker(answer)))
        return 0
    report = Report(echo=not args.json)
    examine(report, measure=not args.no_speed)
    if args.json:
        print(json.dumps(report.as_json()))
    problems = report.problems()
    if problems:
        raise ConfigError(f"this machine has problems: {', '.join(problems)}")
    return 0


class Report:
    """What was found so far; with `echo` each line is printed as soon as it is known."""

    def __init__(self, *, echo: bool) -> None:
        self._echo = echo
        self._findings: list[Finding] = []
        self.facts: TorchFacts | None = None
        self.connectors: list[ConnectorState] = []

    def add(self, finding: Finding) -> None:
        self._findings.append(finding)
        if self._echo:
            print(finding, flush=True)

    def problems(self) -> list[str]:
        return [finding.name.strip() for finding in self._findings if finding.verdict is Verdict.BAD]

    def as_json(self) -> dict[str, Any]:
        return {
            "version": version("kvrelay"),
            "findings": [
                {"verdict": found.verdict, "name": found.name.strip(), "text": found.text} for found in self._findings
            ],
            "torch": msgspec.to_builtins(self.facts),
            "connectors": [
                {**msgspec.to_builtins(state), "works": state.speed is not None} for state in self.connectors
            ],
            "problems": self.problems(),
        }


def examine(report: Report, *, measure: bool) -> None:
    from kvrelay_cli import connector_report
    from kvrelay_cli.machine_report import is_linux, look_at_machine

    for finding in look_at_machine():
        report.add(finding)
    if not is_linux():
        return
    survey = connector_report.ConnectorSurvey()
    try:
        failure = ""
        if connector_report.is_installed("torch"):
            try:
                report.facts = survey.facts()
            except (DeadlineError, WorkerLostError) as error:
                failure = f"cannot be looked at: {error.message}"
        for finding in connector_report.look_at_torch(report.facts, failure, connector_report.has_driver()):
            report.add(finding)
        _try_connectors(report, survey, measure=measure)
    finally:
        survey.close()


def _try_connectors(report: Report, survey: Any, *, measure: bool) -> None:
    from kvrelay_cli import connector_report

    for name in connector_report.connector_names():
        state = survey.state_of(name, report.facts, connector_report.is_installed, measure=measure)
        report.connectors.append(state)
        report.add(connector_report.finding_of(state))
    if report.facts is not None:
        for finding in connector_report.auto_findings(report.facts):
            report.add(finding)
