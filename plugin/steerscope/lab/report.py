"""The lab's reports as Markdown with pictures, for people; the JSON beside them is for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from steerscope.lab import markdown, plots
from steerscope.lab.calibrate import Calibrated
from steerscope.lab.causal import Controls
from steerscope.lab.discover import Discovery
from steerscope.lab.doses import GroupCurve, PolicyReport
from steerscope.lab.evaluate import Evaluation, SignalReport
from steerscope.lab.sheet import Row, applying
from steerscope.lab.statistics import Estimate, ScoreReport, roc_band

MAX_CURVES = 4
OUTCOMES = ("correct", "wrong", "answered", "declined", "malformed")
_METRICS = {
    "auroc": "AUROC",
    "auprc": "AUPRC",
    "tpr_at_1pct_fpr": "TPR at 1% FPR",
    "tpr_at_5pct_fpr": "TPR at 5% FPR",
    "brier": "Brier score",
    "ece": "ECE",
}


def write_evaluation(folder: Path, evaluation: Evaluation, rows: Sequence[Row], title: str) -> None:
    """``evaluation.json``, ``README.md`` and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "evaluation.json", evaluation)
    parts = [f"# {markdown.text(title)}", _what(evaluation), _outcome_table(evaluation)]
    for name, report in evaluation.signals.items():
        parts.append(_signal(folder, name, report, rows))
    for name, policy in evaluation.steering.items():
        parts.append(_policy(folder, name, policy))
    if evaluation.notes:
        notes = (f"- {markdown.text(note)}" for note in evaluation.notes)
        parts.append("## Notes\n\n" + "\n".join(notes))
    parts.append(_NOT_SHOWN)
    (folder / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_json(path: Path, tree: Any) -> None:
    """The report for programs; numbers as they are."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(tree), indent=1) + b"\n")


def estimate(value: Estimate | None, digits: int = 3) -> str:
    """``0.931 (0.910 to 0.950)``; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value.value:.{digits}f} ({value.low:.{digits}f} to {value.high:.{digits}f})"


_NOT_SHOWN = """## What this does not show

- Detection is not control: a signal may read perfectly a feature that changes nothing when edited.
- The intervals resample names; they say nothing of other phrasings, languages or domains.
- A threshold's false positive rate holds for cases drawn as these were. Real traffic differs."""


def _what(evaluation: Evaluation) -> str:
    splits = ", ".join(f"{n} {split}" for split, n in evaluation.split_counts.items())
    return (
        f"Catalog {markdown.text(evaluation.catalog)} version "
        f"{markdown.text(evaluation.catalog_version)} (digest `{evaluation.catalog_digest[:16]}`), "
        f"model {markdown.text(evaluation.model)}. {evaluation.num_cases} cases were asked; the "
        f"file holds {splits} (split digest `{evaluation.split_digest[:16]}`). Intervals are 95%, "
        "by resampling names."
    )


def _outcome_table(evaluation: Evaluation) -> str:
    present = [o for o in OUTCOMES if any(o in told for told in evaluation.outcomes.values())]
    rows = []
    for group, shares in evaluation.outcomes.items():
        n = next(iter(shares.values())).n
        cells = [_3(shares[o].share if o in shares else 0.0) for o in present]
        rows.append([markdown.text(group), str(n), *cells])
    return "## What the model did, unsteered\n\n" + markdown.table(["group", "n", *present], rows)


def _signal(folder: Path, name: str, report: SignalReport, rows: Sequence[Row]) -> str:
    head = ["score", *_METRICS.values()]
    lines = [_scores(f"**{name}**", report.score)]
    lines += [_scores(markdown.text(n), b.score) for n, b in report.baselines.items()]
    parts = [
        f"## {name}",
        _predicts(report),
        markdown.table(head, lines),
        _differences(report),
        markdown.table(
            ["group", "mean probability"],
            [[markdown.text(g), _3(p)] for g, p in report.by_group.items()],
        ),
    ]
    parts += _signal_pictures(folder, name, report, rows)
    return "\n\n".join(part for part in parts if part)


def _predicts(report: SignalReport) -> str:
    score, among = report.score, report.predicts.among
    without = score.num_without_score
    return (
        f"Predicts **{report.predicts.label}**{f' among {among} cases' if among else ''}: holds in "
        f"{score.num_positive} of {score.num_cases} scored cases of {score.num_groups} names"
        + (f"; {without} more had no score." if without else ".")
    )


def _signal_pictures(
    folder: Path, name: str, report: SignalReport, rows: Sequence[Row]
) -> list[str]:
    made = []
    if report.score.reliability:
        curve = plots.Reliability(name, report.score.reliability)
        picture = plots.reliability_diagram([curve], f"Reliability of {name}")
        made.append(_picture(folder, f"{name}-reliability.png", picture, f"Reliability of {name}"))
    curves = _roc_curves(name, report, rows)
    if curves:
        picture = plots.roc(curves, f"{name} beside confidences that need no catalog")
        made.append(_picture(folder, f"{name}-roc.png", picture, f"ROC of {name}"))
    return made


def _roc_curves(name: str, report: SignalReport, rows: Sequence[Row]) -> list[plots.Roc]:
    """The signal's and those of up to three baselines that have scores."""
    scored = applying(rows, report.predicts)
    scores = {name: (scored.probability(name), report.score)}
    for baseline, told in report.baselines.items():
        scores[baseline] = (scored.baseline(baseline, report.predicts), told.score)
    return [
        plots.Roc(what, told.auroc, roc_band(s_N, scored.labels, scored.names, seed=0))
        for what, (s_N, told) in scores.items()
        if told.auroc is not None
    ][:MAX_CURVES]


def _scores(name: str, report: ScoreReport) -> list[str]:
    if report.num_cases == 0:
        return [name, *("-" for _ in _METRICS)]
    return [name, *(estimate(getattr(report, metric)) for metric in _METRICS)]


def _differences(report: SignalReport) -> str:
    lines = [
        f"- AUROC minus that of {markdown.text(name)}, on the cases that both score: "
        f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
        for name, baseline in report.baselines.items()
        if (difference := baseline.against.difference) is not None
    ]
    return "\n".join(lines)


def _policy(folder: Path, name: str, report: PolicyReport) -> str:
    head = ["group", "amount", "dose", "edited", "answered", "control mean, max", "declined",
            "control mean, max", "malformed", "changed"]  # fmt: skip
    lines: list[list[str]] = []
    for group, curve in report.groups.items():
        u = curve.unsteered
        told = markdown.text(group)
        lines.append([told, "0", "0", "0", _3(u.answered), "", _3(u.declined), "",
                      _3(u.malformed), "0"])  # fmt: skip
        for point in curve.points:
            e = point.effect
            lines.append([told, f"{point.amount:g}", f"{e.dose:.2f}", _3(e.edited),
                          _3(e.answered), _control(point.controls.get("answered")), _3(e.declined),
                          _control(point.controls.get("declined")), _3(e.malformed),
                          _3(e.changed)])  # fmt: skip
    parts = [
        f"## Steering: {name}",
        f"Edits {', '.join(report.features)}. Amount 1 is the policy as declared; the dose is the "
        "mean relative size of the change at changed tokens, measured; edited is the share of "
        "cases with such a token, changed that of other answers than unsteered. Controls make the "
        "same edit along random directions of the same norm; a dictionary's rows with a cosine "
        "above .7 to the feature are not drawn, as they may be other versions of it.",
        markdown.table(head, lines),
    ]
    for n, (group, curve) in enumerate(report.groups.items(), 1):
        picture = plots.dose_response(*_curve(curve), f"{name} on {group}")
        file = f"{name}-{n}-{markdown.file_name(group)}.png"
        parts.append(_picture(folder, file, picture, f"{name} on {markdown.text(group)}"))
    parts.append(_collateral(folder, name, report))
    return "\n\n".join(part for part in parts if part)


def _curve(curve: GroupCurve) -> tuple[list[plots.DosePoint], list[plots.ControlPoint]]:
    told = [
        plots.DosePoint(e.dose, e.num_cases, e.answered, e.declined, e.malformed)
        for e in (curve.unsteered, *(point.effect for point in curve.points))
    ]
    controls = [
        plots.ControlPoint(
            point.effect.dose,
            *(
                (point.controls[share].mean, point.controls[share].max)
                for share in ("answered", "declined", "malformed")
            ),
        )
        for point in curve.points
        if point.controls
    ]
    return told, controls


def _collateral(folder: Path, name: str, report: PolicyReport) -> str:
    if not report.collateral:
        return ""
    lines = [
        [
            markdown.text(group),
            str(c.num_cases),
            _3(c.changed),
            _control(c.controls_changed),
            _3(c.correct_before),
            _3(c.correct_after),
        ]
        for group, c in report.collateral.items()
    ]
    head = ["unrelated", "n", "changed", "control mean, max", "correct before", "correct after"]
    damage = [
        plots.Damage(g, c.num_cases, c.changed, c.controls_changed.mean, c.controls_changed.max)
        for g, c in report.collateral.items()
    ]
    picture = plots.collateral_damage(damage, f"Unrelated answers under {name}")
    shown = _picture(folder, f"{name}-collateral.png", picture, f"Collateral damage of {name}")
    told = f"Unrelated answers under the policy as declared:\n\n{markdown.table(head, lines)}"
    return f"{told}\n\n{shown}"


def write_calibration(folder: Path, found: Calibrated) -> None:
    """``calibration.json`` and ``CALIBRATION.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "calibration.json", found)
    parts = ["# Calibration", "Judged on cases that the map never saw."]
    for name, fitted in found.signals.items():
        both = (fitted.before, fitted.after)
        rows = [
            [_METRICS[metric], *(estimate(getattr(report, metric)) for report in both)]
            for metric in ("ece", "brier", "auroc")
        ]
        parts += [f"## {name}", markdown.table(["metric", "before", "after"], rows)]
        told = [
            f"- At most {t.max_fpr:g} of negatives score above {t.score:.4f}, by "
            f"{t.num_negatives} negative names; of the judged negatives, "
            f"{fitted.fpr_at_thresholds[f'{t.max_fpr:g}']:.3f} did."
            for t in fitted.calibration.thresholds
        ]
        told += [f"- No threshold for {b}: {why}." for b, why in fitted.without_threshold.items()]
        parts += ["\n".join(told)] if told else []
    (folder / "CALIBRATION.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_discovery(folder: Path, found: Discovery, tree: Mapping[str, Any]) -> None:
    """``discovery.json`` and ``DISCOVERY.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "discovery.json", tree)
    parts = [
        "# Discovery",
        f"Split digest `{found.split_digest[:16]}`; "
        + ", ".join(f"{n} {split}" for split, n in found.split_counts.items())
        + ". Everything was chosen on dev; the numbers below are on the test split, whose names "
        "and phrasings nothing was fitted or chosen on.",
        "## How well it reads",
        markdown.table(
            ["candidate", "site", "tokens", "dev AUROC", "test AUROC", "test TPR at 5% FPR"],
            [
                [
                    _candidate_name(r.candidate.kind.value, r.candidate.source),
                    str(r.candidate.key),
                    r.candidate.choice.value,
                    f"{r.candidate.strength:.3f}",
                    estimate(r.test.auroc),
                    estimate(r.test.tpr_at_5pct_fpr),
                ]
                for r in found.readings
            ],
        ),
        "## What editing it does",
        _confirmed(found),
        "## Who else was tried",
        "Shares of dev cases that turned, at each strength, and of unrelated dev answers that "
        "changed with them. Reading well and turning answers are "
        "different things: what reads best may turn nothing.",
        _turned(found),
        _NOT_SHOWN,
    ]
    (folder / "DISCOVERY.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _confirmed(found: Discovery) -> str:
    rows = []
    ways = zip(("toward positive", "toward negative"), found.chosen, found.confirmed,
               found.contrast.shares, strict=True)  # fmt: skip
    for way, turned, comparison, share in ways:
        control = comparison.control(share)
        rows.append([
            way, f"{turned.strength:g}", share, _3(getattr(comparison.baseline, share)),
            _3(getattr(comparison.edit, share)), _control(control),
            _3(comparison.edit.malformed), f"{comparison.edit.dose:.2f}",
            str(comparison.edit.num_cases),
        ])  # fmt: skip
    head = ["edit", "strength", "share", "unsteered", "edited", "control mean, max", "malformed",
            "dose", "n"]  # fmt: skip
    side = ""
    if found.side:
        side = (
            f"\n\nUnrelated test answers changed: {found.side[0]:.3f} of them by the first edit, "
            f"{found.side[1]:.3f} by the second."
        )
    told = (
        "Each edit makes cases of one class look like the other; the share is that of their "
        "answers. Controls make the same edit along other directions of the same norm.\n\n"
    )
    return told + markdown.table(head, rows) + side


def _turned(found: Discovery) -> str:
    strengths = sorted({t.strength for t in found.turned})
    rows = []
    for finalist in dict.fromkeys(t.finalist for t in found.turned):
        candidate = finalist.candidate
        cells = [
            " / ".join(
                f"{t.flipped:.2f} ({t.damaged:.2f})"
                for strength in strengths
                for t in found.turned
                if t.finalist is finalist and t.toward_positive is way and t.strength == strength
            )
            for way in (True, False)
        ]
        name = _candidate_name(candidate.kind.value, candidate.source)
        chosen = " (chosen)" if finalist is found.finalist else ""
        rows.append([
            name + chosen, str(candidate.key), candidate.choice.value,
            f"{candidate.strength:.3f}", *cells,
        ])  # fmt: skip
    at = " / ".join(f"{strength:g}" for strength in strengths)
    head = ["candidate", "site", "tokens", "dev AUROC", f"toward positive at {at}",
            f"toward negative at {at}"]  # fmt: skip
    return markdown.table(head, rows)


def _candidate_name(kind: str, source: Mapping[str, str]) -> str:
    latent = source.get("latent")
    if latent is None:
        return f"{kind}: {markdown.text(source.get('fit', ''))}"
    return f"{kind} {latent} of {markdown.text(source.get('sae', ''))}"


def _control(controls: Controls | None) -> str:
    return f"{controls.mean:.3f}, {controls.max:.3f}" if controls and controls.each else "-"


def _picture(folder: Path, name: str, picture: bytes, alt: str) -> str:
    (folder / name).write_bytes(picture)
    return f"![{alt}]({name})"


def _3(share: float) -> str:
    return f"{share:.3f}"
