"""What a check found, and how the findings of all nodes are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from megatron_oreal.errors import UserError

Status = Literal["ok", "warning", "fail"]
SHARED = ("nodes", "clocks", "fabric")
"""Checks of all nodes together."""
_ORDER: dict[Status, int] = {"ok": 0, "warning": 1, "fail": 2}


@dataclass(frozen=True)
class Check:
    """One finding. ``detail``: one line; of a warning or a failure it names key or file, value and mend."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class NodeReport:
    """The findings of one node in the order in which they were made."""

    node_rank: int
    host: str
    checks: list[Check]


def ok(name: str, detail: str) -> Check:
    """A finding without a complaint."""
    return Check(name, "ok", detail)


def warning(name: str, detail: str) -> Check:
    """Something that a run survives, slower or with a risk."""
    return Check(name, "warning", detail)


def fail(name: str, detail: str) -> Check:
    """Something that would end a run, or make it worthless."""
    return Check(name, "fail", detail)


def checked(name: str, look: Callable[[], Iterator[Check]]) -> list[Check]:
    """What ``look`` yields; a user's mistake, or a system call that fails, becomes a failure with its words."""
    found: list[Check] = []
    try:
        for check in look():
            found.append(check)  # one by one: what was found before a mistake stays
    except UserError as error:
        found.append(fail(name, _one_line(str(error))))
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        found.append(fail(name, f"{what}{error.strerror or error}"))
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _names_node(reports: Sequence[NodeReport], check: Check) -> bool:
    return len(reports) > 1 and check.name not in SHARED


def failures(reports: Sequence[NodeReport]) -> list[tuple[NodeReport, Check]]:
    """The failed checks of all nodes, those of the first node first."""
    return [(report, check) for report in reports for check in report.checks if check.status == "fail"]


def summary(reports: Sequence[NodeReport]) -> str | None:
    """One line on what failed, None when nothing did. The same check of several nodes is named once."""
    failed = failures(reports)
    if not failed:
        return None
    report, check = failed[0]
    who = f" on node {report.node_rank} ({report.host})" if _names_node(reports, check) else ""
    others = sorted({f"{other.name}" for _, other in failed[1:]} - {check.name})
    more = f" (failed too: {', '.join(others)})" if others else ""
    return f"check {check.name} failed{who}: {check.detail}{more}"


def as_text(reports: Sequence[NodeReport]) -> str:
    """A table. A check that all nodes passed is one line, in the words of the first; complaints name their node."""
    rows: list[tuple[str, Status, str]] = []
    names = list(dict.fromkeys(check.name for report in reports for check in report.checks))
    for name in names:
        found = [(report, check) for report in reports for check in report.checks if check.name == name]
        worst = max(_ORDER[check.status] for _, check in found)
        if worst == 0:
            here = [check for report, check in found if report is found[0][0]]
            rows += [(name, "ok", check.detail) for check in here]
            continue
        for report, check in found:
            if check.status != "ok":
                where = f"node {report.node_rank} ({report.host}): " if _names_node(reports, check) else ""
                rows.append((name, check.status, where + check.detail))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(f"{name:<{width}}  {status:<7}  {detail}" for name, status, detail in rows)


def as_json(reports: Sequence[NodeReport]) -> str:
    """A list with one object a node."""
    return json.dumps([asdict(report) for report in reports], indent=2)
