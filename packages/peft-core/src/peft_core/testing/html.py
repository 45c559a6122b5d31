"""The conformance report as one self-contained HTML page: no scripts, fonts or pictures. Imports no torch."""

from __future__ import annotations

from html import escape
from typing import Any

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b1f24; background: #fff; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; }
caption { text-align: left; padding: .4rem 0; color: #57606a; }
th, td { border: 1px solid #d0d7de; padding: .35rem .6rem; text-align: left; vertical-align: top; }
thead th { background: #f6f8fa; }
tbody th { font-weight: normal; min-width: 22rem; }
code { font-size: .92em; }
small { color: #57606a; display: block; }
td.passed { background: #e6f6ea; }
td.failed { background: #ffe3e0; font-weight: bold; }
td.expected { background: #fff4d6; }
td.not { background: #f3f4f6; color: #57606a; }
pre { white-space: pre-wrap; background: #f6f8fa; padding: .6rem; }
@media (prefers-color-scheme: dark) {
  body { background: #0d1117; color: #e6edf3; }
  thead th, pre { background: #161b22; }
  th, td { border-color: #30363d; }
  small, caption { color: #9198a1; }
  td.passed { background: #12351f; }
  td.failed { background: #5a1e1e; }
  td.expected { background: #4a3a10; }
  td.not { background: #21262d; color: #9198a1; }
}
"""
#: outcome of a check → its text on the page; the list of reasons is in this order
_LABELS = {"passed": "pass", "failed": "fail", "expected failure": "expected failure", "not run": "not run"}


def page(report: dict[str, Any]) -> str:
    """Return the HTML page for a report, the dict that `Reporter.report` returns."""
    body = "".join(_suite(suite) for suite in report["suites"]) or "<p>No check of a conformance suite ran.</p>"
    versions = ", ".join(f"{escape(name)} {escape(version)}" for name, version in report["versions"].items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Conformance</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>Conformance</h1>\n<p>{versions}</p>\n{body}</body>\n</html>\n"
    )


def _suite(suite: dict[str, Any]) -> str:
    tuner = suite["tuner"]
    counts = ", ".join(f"{number} {escape(_LABELS[outcome])}" for outcome, number in suite["counts"].items())
    declared = ", ".join(f"<code>{escape(name)}</code>" for name in tuner["capabilities"]) or "none"
    cells = {(result["check"], result["config"]): result for result in suite["results"]}
    head = "".join(f'<th scope="col" title="{escape(_config_tooltip(fields))}">{escape(name)}</th>' for name, fields in suite["configs"].items())
    rows = "".join(_row(check, [cells[check["check"], name] for name in suite["configs"]]) for check in suite["checks"])
    source = " ".join(part for part in (tuner["distribution"], tuner["version"]) if part)
    return (
        f"<h2>{escape(tuner['peft_type'])}</h2>\n<p>{escape(source)}; suite <code>{escape(suite['suite'])}</code>; declares {declared}.<br>"
        f"{counts}; {suite['seconds']:.1f} s.</p>\n"
        '<div class="scroll"><table>\n<caption>Outcome of each check with each config, and its time in seconds.</caption>\n'
        f'<thead><tr><th scope="col">check</th>{head}</tr></thead>\n<tbody>\n{rows}</tbody>\n</table></div>\n{_reasons(suite)}'
    )


def _row(check: dict[str, str], cells: list[dict[str, Any]]) -> str:
    protection = f"<small>Protects from {escape(check['protects_from'])}</small>" if check["protects_from"] else ""
    return f'<tr><th scope="row"><code>{escape(check["check"])}</code>{protection}</th>{"".join(map(_cell, cells))}</tr>\n'


def _cell(cell: dict[str, Any]) -> str:
    css_class = cell["outcome"].split()[0]
    seconds = "" if cell["outcome"] == "not run" else f" <small>{cell['seconds']:.2f}</small>"
    title = f' title="{escape(cell["reason"])}"' if cell["reason"] else ""
    return f'<td class="{css_class}"{title}>{escape(_LABELS[cell["outcome"]])}{seconds}</td>'


def _reasons(suite: dict[str, Any]) -> str:
    """Return a list of the reasons of all cells that did not pass, for readers who can't use the tooltips of the cells."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for result in suite["results"]:
        if result["reason"]:
            found.setdefault((result["outcome"], result["check"], result["reason"]), []).append(result["config"])
    order = sorted(found.items(), key=lambda item: list(_LABELS).index(item[0][0]))
    items = "".join(
        f"<li>{escape(_LABELS[outcome])}: <code>{escape(check)}</code> on {escape(', '.join(names))}<pre>{escape(reason)}</pre></li>\n"
        for (outcome, check, reason), names in order
    )
    return f"<details><summary>Reasons</summary>\n<ul>\n{items}</ul></details>\n" if items else ""


def _config_tooltip(fields: dict[str, str]) -> str:
    return ", ".join(f"{key}: {value}" for key, value in fields.items()) or "defaults"
