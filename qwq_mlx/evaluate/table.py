"""The report as text for a terminal: a line a model, then what votes give, levels and subjects, and the comparisons.

Does not: work anything out (`summary` did).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qwq_mlx.evaluate.summary import QUANTILES, Comparison, Group, ModelSummary, Summary
from qwq_mlx.quality.report import printable, size_text

__all__ = ["percent", "range_text", "settings_text", "summary_text"]

_NAME = 28
_MAX_IDS = 12
_MAX_DISPUTED = 8
_ENDINGS = ("cut", "looped", "unanswered", "failed")


def summary_text(summary: Summary) -> str:
    """All tables, without characters that a terminal would take for commands: ids and answers come from files."""
    if not summary.models:
        return f"{printable(summary.task)}: no samples yet."
    return "\n".join(map(printable, _lines(summary)))


def _lines(summary: Summary) -> Iterator[str]:
    samples = f"{summary.samples} samples" if summary.samples > 1 else "1 sample"
    yield f"{summary.task}: {summary.n_problems:,} problems, {samples} of each"
    setup = summary.setup
    yield f"instruction: {setup['instruction']!r}" if setup["instruction"] else "no instruction behind the questions"
    prompt = "the chat template's" if setup["system_prompt"] is None else repr(setup["system_prompt"])
    yield f"system prompt: {prompt}; seed {setup['settings']['sampling']['seed']}"
    settings = {model.label: settings_text(model.settings) for model in summary.models}
    for text in dict.fromkeys(settings.values()):
        labels = [label for label, other in settings.items() if other == text]
        yield f"settings{'' if len(labels) == len(settings) else ' of ' + ', '.join(labels)}: {text}"
    yield ""
    yield (
        f"{'model':<{_NAME}}{'size':>10}{'bits':>7}{'solved':>16}{'accuracy':>10}{'95 % interval':>15}"
        + "".join(f"{name:>{len(name) + 2}}" for name in _ENDINGS)
        + f"{'tokens':>9}{'per solved':>12}{'math-verify':>13}"
    )
    for model in summary.models:
        yield _model_line(model)
    if any(model.n_samples > 1 for model in summary.models):
        yield from _by_k(summary.models)
    yield from _thinking(summary.models)
    yield from _calibration(summary.models)
    yield from _groups("level", {model.label: model.by_level for model in summary.models})
    yield from _groups("subject", {model.label: model.by_subject for model in summary.models})
    for comparison in summary.comparisons:
        yield from _comparison(comparison)
    if len(summary.comparisons) > 1:
        n = len(summary.comparisons)
        yield f"{n} comparisons are judged one by one; for all together at 5 % ask for p below {0.05 / n:.3g}."
    for model in summary.models:
        yield from _disputed(model)


def settings_text(settings: Mapping[str, Any]) -> str:
    """What of sampling, limits and thinking decides the samples, in a line."""
    sampling, limits, thinking = (settings[name] for name in ("sampling", "limits", "thinking"))
    parts = [f"temperature {sampling['temperature']:g}"]
    if sampling["temperature"]:
        parts += [f"top-p {sampling['top_p']:g}", f"top-k {sampling['top_k']}"]
        parts += [f"min-p {sampling['min_p']:g}"] if sampling["min_p"] else []
    if sampling["repetition_penalty"] != 1:
        parts.append(f"repetition penalty {sampling['repetition_penalty']:g}")
    parts.append(f"at most {limits['max_tokens']:,} tokens" if limits["max_tokens"] else "no limit of tokens")
    if thinking["think_tokens"] is not None:
        parts.append(f"answer asked for after {thinking['think_tokens']:,}")
    parts.append(f"on a loop: {thinking['on_loop']}")
    return ", ".join(parts)


def percent(share: float) -> str:
    """A share in percent: "71.5"."""
    return f"{100 * share:.1f}"


def range_text(low: float, high: float) -> str:
    """A range of shares in percent: "65.2 to 77.1"."""
    return f"{percent(low)} to {percent(high)}"


def _model_line(model: ModelSummary) -> str:
    n = model.n_problems * model.n_samples
    solved = f"{round(model.accuracy * n):,} of {n:,}"
    per_solved = "none" if model.tokens_per_solved is None else f"{model.tokens_per_solved:,.0f}"
    verified = "" if model.math_verify_accuracy is None else percent(model.math_verify_accuracy)
    return (
        f"{_short(model.label):<{_NAME}}{size_text(model.size_bytes):>10}{model.bits_per_weight:>7.2f}{solved:>16}"
        f"{percent(model.accuracy):>10}{range_text(model.interval.low, model.interval.high):>15}"
        + "".join(f"{model.endings.get(name, 0):>{len(name) + 2},}" for name in _ENDINGS)
        + f"{model.tokens_per_sample:>9,.0f}{per_solved:>12}{verified:>13}"
    )


def _by_k(models: Sequence[ModelSummary]) -> Iterator[str]:
    sizes = max((list(model.pass_at_k) for model in models), key=len)  # an unfinished model has fewer
    for title, values in (("pass@k", "pass_at_k"), ("maj@k", "majority_at_k")):
        yield from ("", f"{title + ', all subsets':<{_NAME}}" + "".join(f"{f'k = {k}':>10}" for k in sizes))
        for model in models:
            by_k = getattr(model, values)
            cells = "".join(f"{percent(by_k[k]) if k in by_k else '':>10}" for k in sizes)
            yield f"{_short(model.label):<{_NAME}}{cells}"
    yield from ("", f"{'tokens of a vote':<{_NAME}}{'':<15}" + "".join(f"{f'k = {k}':>10}" for k in sizes))
    for model in models:
        kinds = {"all samples": model.sample_tokens, "ended early": model.vote_tokens}
        for kind, by_k in kinds.items():
            cells = "".join(f"{by_k[k]:>10,.0f}" if k in by_k else f"{'':>10}" for k in sizes)
            yield f"{_short(model.label) if kind == 'all samples' else '':<{_NAME}}{kind:<15}{cells}"


def _thinking(models: Sequence[ModelSummary]) -> Iterator[str]:
    names = [f"{100 * quantile:.0f} %" for quantile in QUANTILES]
    yield from ("", f"{'thinking tokens, quantiles':<{_NAME}}{'':<8}" + "".join(f"{name:>9}" for name in names))
    for model in models:
        for kind, values in (("right", model.thinking_right), ("wrong", model.thinking_wrong)):
            cells = "".join(f"{value:>9,.0f}" for value in values) or f"{'none':>9}"
            yield f"{_short(model.label) if kind == 'right' else '':<{_NAME}}{kind:<8}{cells}"


def _calibration(models: Sequence[ModelSummary]) -> Iterator[str]:
    yield from ("", "confidence of the answers, and the share of them that is right (number)")
    for model in models:
        bins = "  ".join(
            f"{each.confidence:.2f}: {percent(each.accuracy)} % ({each.n:,})" for each in model.calibration
        )
        error = "" if model.calibration_error is None else f"; mean distance {model.calibration_error:.3f}"
        yield f"{_short(model.label):<{_NAME}}{bins or 'no answers'}{error}"


def _groups(title: str, groups: Mapping[str, Sequence[Group]]) -> Iterator[str]:
    names = sorted({group.name for each in groups.values() for group in each})
    if not names:
        return
    yield from ("", f"{'by ' + title:<{_NAME}}" + "".join(f"{_short(label, 22):>24}" for label in groups))
    for name in names:
        cells = []
        for each in groups.values():
            group = next((group for group in each if group.name == name), None)
            interval = "" if group is None else range_text(group.interval.low, group.interval.high)
            cells.append("" if group is None else f"{percent(group.accuracy)} ({interval})")
        n = max(group.n_problems for each in groups.values() for group in each if group.name == name)
        yield f"{_short(name, _NAME - 6)} ({n:,})".ljust(_NAME) + "".join(f"{cell:>24}" for cell in cells)


def _comparison(comparison: Comparison) -> Iterator[str]:
    yield ""
    yield (
        f"{comparison.second} against {comparison.first}, {comparison.n_problems:,} problems: "
        f"{100 * comparison.difference:+.1f} points "
        f"({100 * comparison.interval.low:+.1f} to {100 * comparison.interval.high:+.1f}), p = {comparison.p:.2g} "
        f"({comparison.test}), {'' if comparison.p < 0.05 else 'not '}significant at 5 %"
    )
    yield f"  the smallest difference that so many problems show: {100 * comparison.detectable:.1f} points"
    for who, ids in ((comparison.first, comparison.only_first), (comparison.second, comparison.only_second)):
        shown = ", ".join(map(str, ids[:_MAX_IDS])) + (
            f", and {len(ids) - _MAX_IDS:,} more" if len(ids) > _MAX_IDS else ""
        )
        yield f"  {who} is better in {len(ids):,}{': ' if ids else ''}{shown}"


def _disputed(model: ModelSummary) -> Iterator[str]:
    if not model.disputed:
        return
    yield from ("", f"{model.label}: math-verify judges {len(model.disputed):,} samples otherwise")
    for row in model.disputed[:_MAX_DISPUTED]:
        yield f"  {row.trace}: {row.reason[:100]}; math-verify: {'right' if row.math_verify else 'wrong'}"
    if len(model.disputed) > _MAX_DISPUTED:
        yield f"  and {len(model.disputed) - _MAX_DISPUTED:,} more, in report.json"


def _short(name: str, width: int = _NAME - 1) -> str:
    return name if len(name) <= width else f"…{name[1 - width :]}"
