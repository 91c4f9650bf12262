"""What an evaluation says, in sentences: each with the figure, its interval, and no more than the data show."""

from __future__ import annotations

from collections.abc import Iterator

from backtest.bootstrap import Estimate
from backtest.comparison import Comparison
from backtest.evaluation import AblationPoint, ArmEvaluation, Evaluation
from online_trainer.prequential import ALL

METRIC_NAMES = {
    "hr_at_1": "HR@1", "hr_at_10": "HR@10", "hr_at_20": "HR@20", "hr_at_50": "HR@50", "ndcg_at_10": "NDCG@10",
    "ndcg_at_20": "NDCG@20", "mrr": "MRR", "auc": "AUC",
}  # fmt: skip

MINUS = "\N{MINUS SIGN}"
_UNITS = ((86_400_000, "d"), (3_600_000, "h"), (60_000, "min"), (1_000, "s"), (1, "ms"))


def findings(evaluation: Evaluation, metric: str) -> Iterator[str]:
    """The reference against every other arm that is no point of a freshness curve, then the curves."""
    name = METRIC_NAMES[metric]
    reference = evaluation.arm(evaluation.reference)
    own = reference.metrics[ALL][metric]
    if own.mean is None:
        return
    yield f"{arm_title(reference)} reaches {name} {figure(own.mean)} {interval(own)}."
    for arm in sorted(evaluation.arms, key=lambda arm: -(arm.metrics[ALL][metric].mean or 0.0)):
        if arm.info.ablation is None and arm.info.name != evaluation.reference:
            yield _against(arm, metric)
    for kind, points in evaluation.ablations.items():
        yield _ablation(kind, points, metric)


def _against(arm: ArmEvaluation, metric: str) -> str:
    difference, own = arm.against_reference[metric], arm.metrics[ALL][metric]
    title = arm_title(arm)
    if difference.mean is None or difference.low is None or difference.high is None or own.mean is None:
        return f"{title} was not measured."
    gain = Estimate(-difference.mean, -difference.high, -difference.low)
    against = f"{title} ({figure(own.mean)})"
    if difference.low <= 0 <= difference.high:
        return f"The data show no difference to {against}: {figure(-difference.mean, signed=True)} {interval(gain)}."
    relative = f", {-difference.mean / own.mean:+.1%}" if own.mean > 0 else ""
    place = "ahead of" if difference.mean < 0 else "behind"
    return f"It is {place} {against}: {figure(-difference.mean, signed=True)} {interval(gain)}{relative}."


def _ablation(kind: str, points: list[AblationPoint], metric: str) -> str:
    what, costs = {
        "publish_every": ("Publishing less often", "costs"),
        "weights_lag": ("Weights that come late", "cost"),
        "histories_lag": ("Histories that come late", "cost"),
    }[kind]
    for point in points[1:]:
        loss = point.against_freshest[metric]
        if loss.mean is not None and loss.high is not None and loss.high < 0:
            return (
                f"{what} {costs} {METRIC_NAMES[metric]} from {age_text(kind, point.age_ms)} on: "
                f"{figure(loss.mean, signed=True)} {interval(loss)} against {age_text(kind, points[0].age_ms)}."
            )
    return f"{what}, up to {age_text(kind, points[-1].age_ms)}, {costs} no {METRIC_NAMES[metric]} that the data show."


def comparison_text(found: Comparison, metric: str) -> str:
    """Two runs, A and B, for a terminal."""
    name, (num_first, num_second) = METRIC_NAMES[metric], found.num_queries
    how = (
        f"the same {num_first:,} queries, paired"
        if found.is_paired
        else (f"other queries ({num_first:,} and {num_second:,}): compared as independent samples")
    )
    width = max(len("arm"), *(len(arm.arm) for arm in found.arms))
    lines = [f"{name}, {how}", f"{'arm':<{width}}  {'A':>6}  {'B':>6}  B {MINUS} A"]
    for arm in found.arms:
        first, second, difference = (estimates[metric] for estimates in (arm.first, arm.second, arm.difference))
        shows = ""
        if difference.low is not None and difference.high is not None and not difference.low <= 0 <= difference.high:
            shows = " B is better" if difference.low > 0 else " A is better"
        lines.append(
            f"{arm.arm:<{width}}  {figure(first.mean):>6}  {figure(second.mean):>6}  "
            f"{figure(difference.mean, signed=True)} {interval(difference)}{shows}"
        )
    for run, only in (("A", found.only_first), ("B", found.only_second)):
        if only:
            lines.append(f"only in {run}: {', '.join(only)}")
    lines += [f"{one.name}: {one.first!r} in A, {one.second!r} in B" for one in found.settings]
    return "\n".join(lines)


def arm_title(arm: ArmEvaluation) -> str:
    """Its title, or its name."""
    return arm.info.title or arm.info.name


def age_text(kind: str, age_ms: int | None) -> str:
    """60,000 → `1 min`; None: never; 0: every batch, of a lag none."""
    if age_ms is None:
        return "never"
    if age_ms == 0:
        return "every batch" if kind == "publish_every" else "no lag"
    size, unit = next((size, unit) for size, unit in _UNITS if age_ms >= size)
    return f"{age_ms / size:.3g} {unit}"


def figure(value: float | None, *, signed: bool = False) -> str:
    """Four places, as metrics are written."""
    if value is None:
        return "–"
    rounded = round(value, 4) or 0.0  # no sign before a zero
    return (f"{rounded:+.4f}" if signed and rounded else f"{rounded:.4f}").replace("-", MINUS)


def interval(estimate: Estimate) -> str:
    """`[low, high]`."""
    return f"[{figure(estimate.low)}, {figure(estimate.high)}]" if estimate.low is not None else ""
