"""The charts of a report: where average precision is lost, by class, curves, calibration, confusions, groups.

Each function returns a Chart for report_template.html. A new one is added to `all_charts`.
"""

import base64
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpnssd.data.data_list import DataList
from fpnssd.evaluation import error_analysis
from fpnssd.evaluation.error_analysis import Errors
from fpnssd.evaluation.metrics import Ranked, percent, precision_curve, true_positives
from model import DETECTION

MAX_CONFUSED = 24  # classes in the confusion matrix
BLUE, ORANGE, GREY = "#1f6fb4", "#e8710a", "#8a8f98"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.parse_math": False,  # a class may be called $a_1$
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "report",  # the same file for the same numbers
}
CHART_WIDTH = 4.4  # inches; about a phone's width, so that text is not scaled down


@dataclass
class Chart:
    """A picture, what it shows in words, and its numbers as a table."""

    title: str
    image: str  # data: address
    alt: str
    caption: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()


def all_charts(data_list: DataList, ranked: Ranked, errors: Errors, metrics: dict[str, Any]) -> list[Chart]:
    """The charts of a report in their order.

    Args:
        data_list: the ground truth.
        ranked: the detections.
        errors: find_errors of them.
        metrics: compute_metrics of them.
    """
    if not metrics["objects"]:
        return []
    # Where the charts' font lacks a character, the reader's fonts draw all text.
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    own_fonts = all(font.get_char_index(ord(character)) for character in "".join(data_list.classes))
    with matplotlib.rc_context(STYLE | {"svg.fonttype": "path" if own_fonts else "none"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        return [
            chart_gains(data_list, ranked, errors, metrics),
            chart_classes(metrics),
            chart_curves(data_list, ranked, errors, metrics),
            chart_calibration(ranked, errors),
            chart_confusion(data_list, ranked, errors),
            *charts_of_groups(data_list, ranked, errors, metrics),
        ]


def chart_gains(data_list: DataList, ranked: Ranked, errors: Errors, metrics: dict[str, Any]) -> Chart:
    """AP that correcting each type of error would add."""
    gains = {name: gain or 0.0 for name, gain in error_analysis.gains(data_list, ranked, errors).items()}
    lowest = metrics.get("settings", {}).get("min_score")
    figure, axes = new_figure(2.4)
    names = list(gains)[::-1]
    bars = axes.barh(names, [100 * gains[name] for name in names], color=BLUE)
    label_bars(axes, bars, fmt="%.1f")
    axes.set(xlabel="AP gained if corrected, points", xlim=(0, 100 * max(*gains.values(), 0.01) * 1.18))
    counts = {name: int(errors.of_type(name).sum()) for name in gains} | {"missed": int(errors.missed.sum())}
    return Chart(
        "Where AP is lost",
        as_svg(figure),
        "Bars: " + ", ".join(f"{name} errors {percent(gain)} points" for name, gain in gains.items()),
        "VOC2010 AP at IoU 0.5 gained by correcting one type of error and no other, as TIDE defines them "
        "(arXiv:2008.08016). The types do not add up to 100. All detections that were evaluated count "
        f"({'those above a score of ' + format(lowest, 'g') if lowest else 'whatever their score'}), so an object with "
        "a detection of a low score is not missed here.",
        ("error", "points", "number", "what it is"),
        [(name, f"{100 * gains[name]:.2f}", counts[name], text) for name, text in error_analysis.ERROR_TYPES.items()],
    )


def chart_classes(metrics: dict[str, Any]) -> Chart:
    """AP of each class; the table has the other numbers too."""
    rows = {name: row for name, row in metrics["per_class"].items() if row["objects"]}
    names = sorted(rows, key=lambda name: rows[name]["voc2010_ap50"])
    figure, axes = new_figure(0.8 + 0.21 * len(names))
    bars = axes.barh(
        [f"{name} ({rows[name]['objects']})" for name in names],
        [100 * rows[name]["voc2010_ap50"] for name in names],
        color=BLUE,
    )
    label_bars(axes, bars, fmt="%.0f")
    axes.margins(y=0.01)
    mean = 100 * metrics["voc2010_ap50"]
    axes.axvline(mean, color=GREY, linewidth=1, linestyle="--")
    axes.set(xlabel=f"VOC2010 AP at IoU 0.5, percent (dashed: mean {mean:.1f})", xlim=(0, 108))
    worst, best = names[0], names[-1]
    columns = ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50")
    of_scores = ("precision", "recall", "f1")
    above = [f"{what} above {at['min_score']:.2f}" for at in metrics["at_scores"] for what in of_scores]
    return Chart(
        "AP by class",
        as_svg(figure),
        f"Bars of {len(names)} classes, from {worst} with {percent(rows[worst]['voc2010_ap50'])} to {best} with "
        f"{percent(rows[best]['voc2010_ap50'])} percent; mean {mean:.1f}.",
        "In brackets: number of objects, without difficult ones. AP of few objects is unreliable.",
        ("class", "objects", "detections", *columns, *above),
        [
            (name, row["objects"], row["detections"])
            + tuple(percent(row[column]) for column in columns)
            + tuple(percent(at[what]) for at in row["at_scores"] for what in of_scores)
            for name, row in metrics["per_class"].items()
        ],
    )


def chart_curves(data_list: DataList, ranked: Ranked, errors: Errors, metrics: dict[str, Any]) -> Chart:
    """Interpolated precision over recall, a small curve for each class."""
    names = [name for name, row in metrics["per_class"].items() if row["objects"]]
    columns = 4
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(CHART_WIDTH, 0.5 + 1.05 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[len(names) :]:
        axes.axis("off")
    for name, axes in zip(names, grid.flat, strict=False):
        row = metrics["per_class"][name]
        num_tp, precision = precision_curve(true_positives(errors.status[ranked.of(data_list.classes.index(name) + 1)]))
        interpolated = np.maximum.accumulate(precision[::-1])[::-1]
        rises = np.flatnonzero(np.diff(num_tp, prepend=0))  # between these the curve is flat
        recall = np.append(0, num_tp[rises] / row["objects"])
        if len(rises):
            precision = np.append(interpolated[:1], interpolated[rises])
            axes.fill_between(recall, precision, step="pre", color=BLUE, alpha=0.2)
            axes.step(recall, precision, where="pre", color=BLUE, linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_title(f"{shortened(name, 12)} {percent(row['voc2010_ap50'])}", fontsize=7, pad=3)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("interpolated precision", fontsize=9)
    return Chart(
        "Precision and recall",
        as_svg(figure),
        f"Precision over recall for each of {len(names)} classes; the area under each is its AP, given in the table "
        "of AP by class.",
        "At IoU 0.5, a curve for each class. The area under it, VOC2010's AP, stands beside the name.",
    )


def chart_calibration(ranked: Ranked, errors: Errors) -> Chart:
    """Precision of the detections in ten ranges of scores."""
    bins = error_analysis.calibration(ranked, errors)
    filled = [(number, entry) for number, entry in enumerate(bins) if entry]
    figure = Figure(figsize=(CHART_WIDTH, 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="perfectly calibrated")
    scores, precisions = [entry["score"] for _, entry in filled], [entry["precision"] for _, entry in filled]
    upper.plot(scores, precisions, marker="o", color=BLUE, label="measured")
    upper.set(ylabel="precision", ylim=(0, 1.02), xlim=(0, 1))
    upper.legend(fontsize=8)
    width = 1 / len(bins)
    lower.bar(
        [(number + 0.5) * width for number, _ in filled], [entry["detections"] for _, entry in filled], width * 0.9
    )
    lower.set(xlabel="score", ylabel="detections", yscale="log")
    lower.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return Chart(
        "What a score means",
        as_svg(figure),
        "Precision by score: "
        + ", ".join(f"{entry['score']:.2f}: {percent(entry['precision'])} percent" for _, entry in filled),
        "Above the dashed line scores are too low, below it too high. A detection is right at IoU 0.5, the first of "
        "its object.",
        ("scores", "mean score", "precision, percent", "detections"),
        [
            (f"{number * width:.1f} to {(number + 1) * width:.1f}", f"{entry['score']:.3f}",
             percent(entry["precision"]), entry["detections"])
            for number, entry in filled
        ],
    )  # fmt: skip


def chart_confusion(data_list: DataList, ranked: Ranked, errors: Errors) -> Chart:
    """Which classes are taken for which others."""
    matrix = error_analysis.confusion(data_list, ranked, errors, DETECTION.min_score)
    names = ["background", *data_list.classes]
    wrong = matrix - np.diag(np.diag(matrix))
    shown = np.arange(len(names))
    if len(names) > MAX_CONFUSED + 1:
        others = 1 + np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1))[1:], kind="stable")[:MAX_CONFUSED]
        shown = np.array([0, *np.sort(others)])
    pairs = [(wrong[i, j], names[i], names[j]) for i, j in zip(*np.nonzero(wrong), strict=True)]
    pairs.sort(key=lambda pair: -pair[0])
    between = [pair for pair in pairs if "background" not in pair[1:]]
    left_out = "" if len(shown) == len(names) else f" The {MAX_CONFUSED} classes with most confusions are shown."
    return Chart(
        "Confusions",
        as_svg(draw_matrix(matrix, names, shown)),
        f"Confusion matrix of {len(shown)} classes with background. Most common between classes: "
        + (", ".join(f"{count} x {name} taken for {other}" for count, name, other in between[:5]) or "none"),
        f"Detections with a score above {DETECTION.min_score} at IoU 0.5; the colour is the share of the row. The row "
        "“background” counts detections of the background, inaccurate boxes and duplicates, the column “background” "
        f"objects without a detection.{left_out}",
        ("object", "detected as", "number"),
        [(name, other, count) for count, name, other in pairs[:20]],
    )


def draw_matrix(matrix: np.ndarray, names: Sequence[str], shown: np.ndarray) -> Figure:
    """A confusion matrix (C + 1, C + 1), of the rows and columns `shown`."""
    part = matrix[np.ix_(shown, shown)]
    shares = part / np.maximum(matrix[shown].sum(axis=1, keepdims=True), 1)
    side = CHART_WIDTH + 0.1 * max(0, len(shown) - 12)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [shortened(names[label], 14) for label in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=90)
    axes.set_yticks(range(len(shown)), labels)
    axes.set(xlabel="detected as", ylabel="object")
    axes.spines[:].set_visible(False)
    for row, column in zip(*np.nonzero(part), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, part[row, column], ha="center", va="center", fontsize=7, color=colour)
    return figure


def charts_of_groups(data_list: DataList, ranked: Ranked, errors: Errors, metrics: dict[str, Any]) -> Iterator[Chart]:
    """AP by size, by aspect, and by truncation where it is known."""
    kinds = {
        "size": (error_analysis.size_groups(data_list), "square root of the area, in pixels of the original image"),
        "aspect": (error_analysis.aspect_groups(data_list), "width / height"),
        "truncation": (error_analysis.truncation_groups(data_list), "is part of it outside the image?"),
    }
    for kind, (groups, unit) in kinds.items():
        if groups is None:
            continue
        names = groups[0]
        aps = error_analysis.ap_by_group(data_list, ranked, errors, groups)
        figure, axes = new_figure(0.9 + 0.32 * len(names))
        labels = [f"{name} ({count})" for name, (_, count) in zip(names, aps, strict=True)]
        bars = axes.barh(labels[::-1], [100 * (ap or 0) for ap, _ in aps[::-1]], color=BLUE)
        label_bars(axes, bars, labels=[percent(ap) for ap, _ in aps[::-1]])
        axes.axvline(100 * metrics["voc2010_ap50"], color=GREY, linewidth=1, linestyle="--")
        axes.set(
            xlabel="normalised AP, percent (dashed: AP of all)", ylabel=unit if len(unit) < 30 else "", xlim=(0, 112)
        )
        yield Chart(
            f"AP by {kind}",
            as_svg(figure),
            "Bars: " + ", ".join(f"{name} {percent(ap)} percent" for name, (ap, _) in zip(names, aps, strict=True)),
            f"By {unit}; in brackets: number of objects. At IoU 0.5, precision computed as if each group had all "
            "objects of its class, so that groups can be compared (Hoiem et al. 2012).",
            (kind, "normalised AP", "objects"),
            [(name, percent(ap), count) for name, (ap, count) in zip(names, aps, strict=True)],
        )


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of one chart; height in inches."""
    figure = Figure(figsize=(CHART_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def label_bars(axes: Axes, bars: Any, **options: Any) -> None:
    """Writes the values beside the bars."""
    axes.bar_label(bars, padding=2, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, **options)


def shortened(text: str, most: int) -> str:
    """The text in at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


def as_svg(figure: Figure) -> str:
    """A figure as a data: address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
