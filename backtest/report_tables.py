"""The tables of the report, as HTML."""

from __future__ import annotations

from html import escape
from typing import Final

from backtest.evaluation import Evaluation
from backtest.list_evaluation import DEPTH
from backtest.report_html import age, bytes_text, cell, cells, seconds, table, whisker
from backtest.report_svg import interval_cell
from backtest.report_words import METRIC_NAMES, arm_title, figure, interval
from backtest.run_files import RunManifest
from backtest.vector_gains import NEVER
from online_trainer.prequential import ALL, ITEM_KINDS, USER_KINDS

MAIN_METRIC: Final = "ndcg_at_20"
_TABLE_METRICS: Final = ("hr_at_10", "mrr", "auc")


def arms_table(evaluation: Evaluation, slots: dict[str, int]) -> str:
    """Every arm with its difference to the reference, the best first."""
    name = METRIC_NAMES[MAIN_METRIC]
    differences = [whisker("", arm.against_reference.get(MAIN_METRIC)) for arm in evaluation.arms]
    known = [one for one in differences if one is not None]
    span = (min([0.0, *(one.low for one in known)]), max([0.0, *(one.high for one in known)]))
    rows = []
    for arm in sorted(evaluation.arms, key=lambda arm: -(arm.metrics[ALL][MAIN_METRIC].mean or 0.0)):
        own, difference = arm.metrics[ALL], arm.against_reference.get(MAIN_METRIC)
        shown = whisker(f"{arm_title(arm)} minus the reference", difference)
        cells = [
            cell(own[MAIN_METRIC]),
            f"<td>{figure(difference.mean, signed=True)} <small>{interval(difference)}</small></td>"
            if difference
            else "<td></td>",
            f'<td class="cell">{interval_cell(shown, span, slots.get(arm.info.name, 7)) if shown else ""}</td>',
            *(f"<td>{figure(own[metric].mean)}</td>" for metric in _TABLE_METRICS),
        ]
        kind = ' class="reference"' if arm.info.name == evaluation.reference else ""
        rows.append(f'<tr{kind}><th scope="row">{escape(arm_title(arm))}</th>{"".join(cells)}</tr>')
    heads = [name, "difference to the reference", "", *(METRIC_NAMES[metric] for metric in _TABLE_METRICS)]
    return table(["arm", *heads], rows, f"{evaluation.num_queries:,} queries each; differences are paired")


def slices_table(evaluation: Evaluation) -> str:
    """Every arm by kinds of items and users."""
    # An item that is not in the catalogue yet is a miss for every arm: its count says it all.
    unknown, *groups = (*ITEM_KINDS, *USER_KINDS)
    counts = evaluation.arms[0].num_queries
    heads = [f"{group.replace('_', ' ')}<br><small>{counts[group]:,}</small>" for group in groups]
    rows = [
        f'<tr><th scope="row">{escape(arm_title(arm))}</th>'
        + "".join(f"<td>{figure(arm.metrics[group][MAIN_METRIC].mean)}</td>" for group in groups)
        + "</tr>"
        for arm in evaluation.arms
    ]
    note = (
        f"{METRIC_NAMES[MAIN_METRIC]} by kind, with the number of queries; intervals are in report.json. New: fewer "
        f"interactions than trainer.metrics_new_below. Beside these, {counts[unknown]:,} queries were for items that "
        "were not in the catalogue yet, which nobody can hit"
    )
    return table(["arm", *heads], rows, note)


def lists_table(evaluation: Evaluation) -> str:
    """Every arm's lists: coverage, novelty, churn, probabilities."""

    def churn(value: float | None) -> str:
        return "–" if value is None else f"{value:.1%}"

    rows = []
    num_lists = max((arm.lists.num_lists for arm in evaluation.arms if arm.lists), default=0)
    for arm in evaluation.arms:
        if (lists := arm.lists) is None:
            continue
        shown = lists.shown
        values = [
            f"{lists.coverage:.1%}",
            "–" if lists.novelty_bits is None else f"{lists.novelty_bits:.2f}",
            churn(lists.churn_from_reference),
            churn(lists.churn_between_versions),
            churn(lists.churn_within_version),
            *(
                "–" if shown is None or value is None else f"{value:.3f}"
                for value in ((shown.ne, shown.auc, shown.calibration) if shown else (None, None, None))
            ),
        ]
        rows.append(f'<tr><th scope="row">{escape(arm_title(arm))}</th>{cells(values)}</tr>')
    if not rows:
        return '<p class="note">The run kept no lists.</p>'
    heads = [
        "arm", "coverage", "novelty, bits", "differs from reference", "churn, new version", "churn, same version", "NE",
        "AUC", "calibration",
    ]  # fmt: skip
    note = (
        f"{len(rows)} arms, {num_lists:,} sampled lists each, their first {DEPTH} items. Novelty: "
        "\N{MINUS SIGN}log2 of the share of users who had met the item before, in bits. Churn: "
        "share of a user's list that was not in the list before. NE, AUC, calibration: of the shown items' "
        "probabilities against what came next"
    )
    return table(heads, rows, note)


def costs_table(manifest: RunManifest, evaluation: Evaluation) -> str:
    """What every arm took and published."""
    rows = []
    if (shared := manifest.costs.get("shared")) is not None:
        rows.append(
            f'<tr><th scope="row">shared by all arms</th>{cells([seconds(shared.cpu_s), "", "", "", "", ""])}</tr>'
        )
    for arm in evaluation.arms:
        costs = arm.costs
        each = costs.num_bytes_published / costs.num_publications if costs.num_publications else None
        values = [
            seconds(costs.cpu_s),
            f"{costs.num_publications:,}",
            bytes_text(costs.num_bytes_published),
            "–" if each is None else bytes_text(each),
            age(arm.weights_age_p50_ms),
            age(arm.weights_age_p95_ms),
        ]
        rows.append(f'<tr><th scope="row">{escape(arm_title(arm))}</th>{cells(values)}</tr>')
    heads = ["arm", "CPU", "publications", "published", "each", "weights' age, median", "95th percentile"]
    note = (
        f"{manifest.num_events:,} events in {seconds(manifest.wall_s)}, {seconds(manifest.cpu_s)} of CPU. An arm's CPU "
        "is what it took beyond what arms share"
    )
    return table(heads, rows, note)


def vectors_table(manifest: RunManifest) -> str:
    """What users' vectors bring each task of the ranker, by how late they come."""
    rows = []
    for task, rankers in manifest.vectors["gains"].items():
        for lag, found in rankers.items():
            gain = f"{found['gain_percent']:+.2f} ± {found['standard_error']:.2f} %" if "gain_percent" in found else ""
            how = "none" if lag == NEVER else f"{lag} after they were computed"
            values = [how, f"{found['count']:,.0f}", figure(found["normalised_loss"]), gain]
            rows.append(f'<tr><th scope="row">{escape(task)}</th>{cells(values)}</tr>')
    upstream = manifest.vectors["upstream"]
    note = (
        f"{upstream['vectors']:,} vectors of {upstream['versions']:,} versions of the upstream model. Rankers trained "
        "on the same steps, which predicted each interaction before they learned it; loss over that of predicting the "
        "mean, and the gain over no vectors in percent of it, with the standard error of paired differences over "
        "interactions, which leaves out what another seed would change"
    )
    return table(["task", "vectors", "interactions", "normalised loss", "gain"], rows, note)
