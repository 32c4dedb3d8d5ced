"""An audit as files: JSON for programs, HTML for people, and a signature over both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from jwt import PyJWS

from common.files import canonical_json, write_atomic
from common.keys import SigningKey
from common.software import software
from simulations.audit.attacks import sections
from simulations.audit.conformance import FALSE_ALARM
from simulations.audit.lower_bound import CONFIDENCE
from simulations.audit.run import Audit

SIGNED_TYPE = "fedward-audit+jws"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; }
body { margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: .9rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.verdict { font-size: 1.3rem; font-weight: 600; padding: .6rem 1rem; }
.verdict { border-left: .4rem solid #2c7a4b; background: #eef7f1; }
.verdict.no { border-color: #b3261e; background: #fbeeed; }
tr.no td { background: #fbeeed; }
summary { cursor: pointer; }
svg { max-width: 100%; height: auto; }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""


def as_json(found: Audit) -> dict[str, Any]:
    """The audit as plain values."""
    step, used = found.plan.step, software()
    return {
        "format": 1,
        "made": datetime.now(UTC).replace(microsecond=0).isoformat(),
        "study": {"name": found.study.name, "title": found.study.title, "digest": found.study.digest},
        "software": {"version": used.version, "package": used.package},
        "deployed": found.deployed,
        "sound": found.sound,
        "claim": {
            "epsilon": found.study.privacy.epsilon,
            "delta": found.plan.delta,
            "unit": "patient, added or removed with all records",
            "noise_multiplier": step.noise_multiplier,
            "sample_rate": step.sample_rate,
            "clipping_norm": step.clipping_norm,
            "steps": found.plan.steps_per_round * found.plan.rounds,
        },
        "watched_steps": found.steps,
        "false_alarm": FALSE_ALARM,
        "checks": [
            {"site": c.site, "claim": c.name, "p": c.p, "told": c.told,
             "alarm": not c.p >= found.conformance.level}
            for c in found.conformance.checks
        ],
        "confidence": CONFIDENCE,
        "lower_bounds": [
            {"site": b.site, "delta": b.delta, "claimed": b.claimed, "by_noise": b.by_noise,
             "by_trade_off": b.by_trade_off, "one_run": b.one_run, "canaries": b.canaries,
             "refuted": b.refuted}
            for b in found.bounds
        ],
        "differences": [{**asdict(d), "sound": d.sound} for d in found.differences],
        "final_model": asdict(found.final_model),
        "cases": [case.as_json() for case in found.cases],
        "attacks": found.attacks.as_json() if found.attacks else None,
        "untested": list(found.untested),
        "seconds": round(found.seconds, 1),
    }  # fmt: skip


def as_html(told: Mapping[str, Any], more: Iterable[str] = ()) -> str:
    """The page of an audit's JSON; it loads nothing.

    Args:
        more: further HTML, of attacks.
    """
    claim = told["claim"]
    verdict = "Nothing contradicts the claim." if told["sound"] else "The claim does not hold."
    alarms = sum(c["alarm"] for c in told["checks"])
    checks = _checks([c for c in told["checks"] if c["alarm"]]) if alarms else ""
    bounds = _table(
        ("Site", "ε of the steps watched", "at least, by trade-off", "at least, by one run",
         "at least, by the noise", "canaries"),
        [
            ((b["site"], *(f"{b[k]:.3f}" for k in ("claimed", "by_trade_off", "one_run", "by_noise")),
              str(b["canaries"])), b["refuted"])
            for b in told["lower_bounds"]
        ],
        numbers={1, 2, 3, 4, 5},
    )  # fmt: skip
    differences = _table(
        ("What one patient changes", "Measured", "At most"),
        [
            ((d["claim"], f"{d['worst']:.3g}", f"{d['allowed']:g}"), not d["sound"])
            for d in told["differences"]
        ],
        numbers={1, 2},
    )
    last = told["final_model"]
    weak = "; so this test would see little here" if last["unprotected"] < last["claimed"] else ""
    claims = _table(
        ("What", "Value"),
        [
            ((key.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value)), False)
            for key, value in claim.items()
        ],
        numbers=set(),
    )
    how = "served vaults, through their sockets" if told["deployed"] else "vaults in the auditor's process"
    failed = [c for c in told["cases"] if not c["sound"]]
    cases = _cases(failed) if failed else ""
    untested = "".join(f"<li>{escape(line)}</li>" for line in told["untested"])
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Audit of {escape(told["study"]["name"])}</title><style>{STYLE}</style></head><body>
<h1>Audit of “{escape(told["study"]["title"])}”</h1>
<p class="verdict{"" if told["sound"] else " no"}">{verdict}</p>
<p>Study <code>{escape(told["study"]["digest"])}</code><br>
Software {escape(told["software"]["version"])} <code>{escape(told["software"]["package"])}</code><br>
Made {escape(told["made"])} in {told["seconds"]} s, over {told["watched_steps"]} steps, with {how}.</p>
<h2>The claim</h2>{claims}
<h2>Lower bounds on ε</h2>
<p>Each at {told["confidence"]:.0%} confidence. By trade-off: supposes a subsampled Gaussian of the claimed
rate; one run: supposes nothing; by the noise: supposes all but the noise, which is measured.</p>{bounds}
<p>The released model alone, asked about {last["canaries"]} made-up patients of whom half trained, gives away
ε ≥ {last["at_least"]:.3f} of {last["claimed"]:.3f}; trained
without protection, ε ≥ {last["unprotected"]:.3f}{weak}.</p>
<h2>Finite differences, the noise off</h2>
<p>The site's own sums over made-up patients with 1 to 40 records, with and without each of them.</p>
{differences}
<h2>Conformance</h2>
<p>{len(told["checks"])} tests, {alarms} alarms. A sound site raises any with probability
{told["false_alarm"]:.0%} at most.</p>{checks}
<details><summary>All {len(told["checks"])} tests</summary>{_checks(told["checks"])}</details>
<h2>A malicious coordinator</h2>
<p>{len(told["cases"])} attempts, {len(failed)} of them with an outcome that the site does not promise. The
canaries' own study is approved for a large ε, and gets the audited noise by its policy's floor.</p>{cases}
<details><summary>All {len(told["cases"])} attempts</summary>{_cases(told["cases"])}</details>
{"".join(more)}
<h2>Not tested</h2><ul>{untested}</ul>
</body></html>
"""


def write_report(folder: Path, found: Audit, key: SigningKey) -> Path:
    """Write audit.json, audit.html and audit.jws (a signature over the digests of both); returns the page.

    Raises:
        OSError: if the folder can't be written.
    """
    told = as_json(found)
    more = sections(found.attacks) if found.attacks else ()
    content, page = canonical_json(told), as_html(told, more).encode()
    folder.mkdir(parents=True, exist_ok=True)
    digests = {"audit.json": _digest(content), "audit.html": _digest(page), "made": told["made"]}
    headers = {"typ": SIGNED_TYPE, "kid": key.public.fingerprint}
    token = PyJWS(algorithms=["EdDSA"]).encode(canonical_json(digests), key.native, "EdDSA", headers=headers)
    write_atomic(folder / "audit.json", content, mode=0o644)
    write_atomic(folder / "audit.html", page, mode=0o644)
    write_atomic(folder / "audit.jws", token.encode(), mode=0o644)
    return folder / "audit.html"


def _checks(told: Iterable[Mapping[str, Any]]) -> str:
    rows: list[tuple[tuple[str, ...], bool]] = [
        ((c["site"], c["claim"], f"{c['p']:.2g}", c["told"]), c["alarm"]) for c in told
    ]
    return _table(("Site", "Claim", "p", "Measured"), rows, numbers={2})


def _cases(told: Iterable[Mapping[str, Any]]) -> str:
    rows: list[tuple[tuple[str, ...], bool]] = [
        ((c["name"].replace("-", " "), c["tried"], c["outcome"], _number(c["before"]), _number(c["after"])),
         not c["sound"])
        for c in told
    ]  # fmt: skip
    return _table(("Tried", "How", "Outcome", "ε spent before", "after"), rows, numbers={3, 4})


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _table(header: tuple[str, ...], rows: list[tuple[tuple[str, ...], bool]], numbers: set[int]) -> str:
    """HTML of rows with a mark where something is wrong."""

    def cell(i: int, text: str, tag: str) -> str:
        return f"<{tag}{' class=n' if i in numbers else ''}>{escape(text)}</{tag}>"

    head = "".join(cell(i, text, "th") for i, text in enumerate(header))
    body = ""
    for cells, wrong in rows:
        line = "".join(cell(i, text, "td") for i, text in enumerate(cells))
        body += f"<tr{' class=no' if wrong else ''}>{line}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
