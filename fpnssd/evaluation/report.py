"""Pictures of results: the report of an evaluation, and the curves of a run.

    python eval.py runs/lite/best.pth.tar --data data/vocreal --report report.html
    python report.py runs/lite                        # runs/lite/log.csv -> runs/lite/curves.png

A report is one HTML file that needs no network. Its numbers come from metrics.py, intervals.py and error_analysis.py;
the page around them is report_template.html.
"""

import argparse
import base64
import csv
import io
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import ImageDraw

from fpnssd.data.images import DataError
from fpnssd.evaluation import error_analysis
from fpnssd.evaluation.metrics import is_true_of, precision_curve
from model import DETECTION
from utils import InputError, atomic_write, write_text

PROTOCOLS = {
    "voc2007_ap50": "VOC2007: IoU 0.5, mean precision at 11 recalls",
    "voc2010_ap50": "VOC2010 to 2012: IoU 0.5, area under the monotone curve",
    "coco_ap": "COCO: mean over IoU 0.5, 0.55 .. 0.95, 101 recalls, 100 detections a class and image",
    "coco_ap50": "COCO at IoU 0.5",
    "coco_ap75": "COCO at IoU 0.75",
    "coco_ap_small": "COCO, objects of less than 32 x 32 pixels",
    "coco_ap_medium": "COCO, 32 x 32 to 96 x 96 pixels",
    "coco_ap_large": "COCO, larger ones",
    "coco_ar100": "COCO: mean recall with 100 detections a class and image",
}
MOST_CONFUSED = 24  # classes in the confusion matrix
BLUE, ORANGE, GREY = "#1f6fb4", "#e8710a", "#8a8f98"
STYLE = {
    "font.size": 9,
    "text.parse_math": False,  # a class may be called $a_1$
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "report",  # the same file for the same numbers
}
CHART_WIDTH = 4.4  # inches: a phone's width, so that letters stay as large as they are drawn
PICTURE_SIDE = 320  # pixels


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draws RUN/curves.png from RUN/log.csv.")
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/lite")
    args = parser.parse_args(argv)
    try:
        draw_curves(args.run / "log.csv", args.run / "curves.png")
    except (InputError, OSError) as error:
        sys.exit(f"report: {error}")
    print(f"wrote {args.run / 'curves.png'}")


# ---------------------------------------------------------------------------------------------------------------------
# The report


@dataclass
class Chart:
    """A picture with what it says in words, and its numbers as a table."""

    title: str
    image: str  # data: address
    alt: str
    caption: str
    header: tuple = ()
    rows: list = ()


def write_report(path, data_list, ranked, metrics):
    """Writes the report of Ranked detections and their metrics (as eval.py prints them) as one HTML file."""
    errors = error_analysis.find_errors(data_list, ranked)
    charts = []
    with matplotlib.rc_context(STYLE):
        if metrics["objects"]:
            charts = [
                chart_lost(data_list, ranked, errors),
                chart_classes(metrics),
                chart_curves(data_list, ranked, errors, metrics),
                chart_calibration(ranked, errors),
                chart_confusion(data_list, ranked, errors),
                *charts_of_groups(data_list, ranked, errors, metrics),
            ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": lambda value: f"{100 * value:.2f}"}
    html = environment.get_template("report_template.html").render(
        metrics=metrics,
        protocols=PROTOCOLS,
        data_list=data_list,
        charts=[chart for chart in charts if chart],
        false_positives=picture_false_positives(data_list, ranked, errors),
        missed=picture_missed(data_list, ranked, errors),
        error_types=error_analysis.ERROR_TYPES,
        shown_score=DETECTION.min_score,
        colours={"detection": ORANGE, "object": BLUE},
        today=date.today().isoformat(),
    )
    write_text(path, html, "report")


def percent(value):
    return "none" if value is None else f"{100 * value:.1f}"


def chart_lost(data_list, ranked, errors):
    """AP that mending each type of error would add."""
    gains = error_analysis.gains(data_list, ranked, errors)
    figure, axes = new_figure(2.4)
    names = list(gains)[::-1]
    bars = axes.barh(names, [100 * gains[name] for name in names], color=BLUE)
    label_bars(axes, bars, fmt="%.1f")
    axes.set(xlabel="AP gained if mended, points", xlim=(0, 100 * max(*gains.values(), 0.01) * 1.18))
    counts = {name: int(errors.of_type(name).sum()) for name in gains} | {"missed": int(errors.missed.sum())}
    return Chart(
        "Where AP is lost",
        as_svg(figure),
        "Bars: " + ", ".join(f"{name} errors {percent(gain)} points" for name, gain in gains.items()),
        "VOC2010 AP at IoU 0.5 that would be gained if one type of error were mended and all others stayed, as TIDE "
        "defines them (arXiv:2008.08016). The types do not add up to 100.",
        ("error", "points", "number", "what it is"),
        [(name, f"{100 * gains[name]:.2f}", counts[name], said) for name, said in error_analysis.ERROR_TYPES.items()],
    )


def chart_classes(metrics):
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
        "In brackets: objects that count. An AP of few objects is hardly known.",
        ("class", "objects", "detections", *columns, *above),
        [
            (name, row["objects"], row["detections"])
            + tuple(percent(row[column]) for column in columns)
            + tuple(percent(at[what]) for at in row["at_scores"] for what in of_scores)
            for name, row in metrics["per_class"].items()
        ],
    )


def chart_curves(data_list, ranked, errors, metrics):
    """Precision over recall, a small one a class."""
    names = [name for name, row in metrics["per_class"].items() if row["objects"]]
    columns = 4
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(CHART_WIDTH, 0.5 + 1.05 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for number, axes in enumerate(grid.flat):
        if number >= len(names):
            axes.axis("off")
            continue
        row = metrics["per_class"][names[number]]
        label = data_list.classes.index(names[number]) + 1
        true_so_far, precision = precision_curve(is_true_of(errors.status[ranked.of(label)]))
        monotone = np.maximum.accumulate(precision[::-1])[::-1]
        at_right = np.flatnonzero(np.diff(true_so_far, prepend=0))  # where recall rises: nothing else can be seen
        recall = true_so_far[at_right] / row["objects"]
        recall, precision = np.append(0, recall), np.append(monotone[:1], monotone[at_right])
        if len(at_right):
            axes.fill_between(recall, precision, step="pre", color=BLUE, alpha=0.2)
            axes.step(recall, precision, where="pre", color=BLUE, linewidth=1)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        axes.set_title(f"{shortened(names[number], 12)} {percent(row['voc2010_ap50'])}", fontsize=7, pad=3)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.supxlabel("recall", fontsize=9)
    figure.supylabel("precision, made monotone", fontsize=9)
    return Chart(
        "Precision and recall",
        as_svg(figure),
        f"Precision over recall for each of {len(names)} classes; the area under each is its AP, given in the table "
        "of AP by class.",
        "At IoU 0.5, a curve a class; its area, VOC2010's AP, stands beside its name.",
    )


def chart_calibration(ranked, errors):
    bins = error_analysis.calibration(ranked, errors)
    known = [(number, one) for number, one in enumerate(bins) if one]
    figure = Figure(figsize=(CHART_WIDTH, 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--", label="as the score says")
    upper.plot(
        [one["score"] for _, one in known], [one["right"] for _, one in known], marker="o", color=BLUE, label="measured"
    )
    upper.set(ylabel="share that is right", ylim=(0, 1.02), xlim=(0, 1))
    upper.legend(fontsize=8)
    width = 1 / len(bins)
    lower.bar([(number + 0.5) * width for number, _ in known], [one["detections"] for _, one in known], width * 0.9)
    lower.set(xlabel="score", ylabel="detections", yscale="log")
    lower.yaxis.set_major_formatter("{x:,.0f}")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    return Chart(
        "What a score means",
        as_svg(figure),
        "Share of detections that are right, by score: "
        + ", ".join(f"{one['score']:.2f}: {percent(one['right'])} percent" for _, one in known),
        "Above the dashed line the detector is too modest, below it too sure. Right is IoU 0.5 and the first of its "
        "object.",
        ("scores", "mean score", "right, percent", "detections"),
        [
            (f"{number * width:.1f} to {(number + 1) * width:.1f}", f"{one['score']:.3f}", percent(one["right"]),
             one["detections"])
            for number, one in known
        ],
    )  # fmt: skip


def chart_confusion(data_list, ranked, errors):
    matrix = error_analysis.confusion(data_list, ranked, errors, DETECTION.min_score)
    names = ["background", *data_list.classes]
    wrong = matrix - np.diag(np.diag(matrix))
    shown = np.arange(len(names))
    if len(names) > MOST_CONFUSED + 1:
        others = 1 + np.argsort(-(wrong.sum(axis=0) + wrong.sum(axis=1))[1:], kind="stable")[:MOST_CONFUSED]
        shown = np.array([0, *np.sort(others)])
    part = matrix[np.ix_(shown, shown)]
    shares = part / np.maximum(matrix[shown].sum(axis=1, keepdims=True), 1)
    side = CHART_WIDTH + 0.1 * max(0, len(shown) - 12)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    labels = [shortened(names[label], 14) for label in shown]
    axes.set_xticks(range(len(shown)), labels, rotation=90)
    axes.set_yticks(range(len(shown)), labels)
    axes.set(xlabel="detected as", ylabel="is")
    axes.spines[:].set_visible(False)
    for row, column in zip(*np.nonzero(part), strict=True):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, part[row, column], ha="center", va="center", fontsize=7, color=colour)
    pairs = [(wrong[i, j], names[i], names[j]) for i, j in zip(*np.nonzero(wrong), strict=True)]
    pairs.sort(key=lambda pair: -pair[0])
    between = [pair for pair in pairs if "background" not in pair[1:]]
    left_out = "" if len(shown) == len(names) else f" The {MOST_CONFUSED} classes with most confusions are shown."
    return Chart(
        "Confusions",
        as_svg(figure),
        f"Confusion matrix of {len(shown)} classes with background. Most common between classes: "
        + (", ".join(f"{count} x {true} taken for {said}" for count, true, said in between[:5]) or "none"),
        f"Detections with a score of {DETECTION.min_score} or more at IoU 0.5; colour is the share of a row. The row "
        "“background” counts detections of nothing, of the wrong place or of what was found already, the column "
        f"“background” objects that nothing found.{left_out}",
        ("is", "detected as", "number"),
        [(true, said, count) for count, true, said in pairs[:20]],
    )


def charts_of_groups(data_list, ranked, errors, metrics):
    """AP by size, aspect, and truncation where it is known."""
    kinds = {
        "size": (error_analysis.size_groups(data_list), "square root of the area, in pixels of the original image"),
        "aspect": (error_analysis.aspect_groups(data_list), "width / height"),
        "truncation": (error_analysis.truncation_groups(data_list), "is a part of it out of sight?"),
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
            f"By {unit}; in brackets: objects. At IoU 0.5, precision taken as if each group had all of a class's "
            "objects, so that groups can be compared (Hoiem et al. 2012).",
            (kind, "normalised AP", "objects"),
            [(name, percent(ap), count) for name, (ap, count) in zip(names, aps, strict=True)],
        )


def new_figure(height):
    figure = Figure(figsize=(CHART_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def label_bars(axes, bars, **what):
    axes.bar_label(bars, padding=2, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5}, **what)


def shortened(name, most):
    return name if len(name) <= most else name[: most - 1] + "…"


def as_svg(figure):
    """A Figure as a data: address."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of mistakes


def picture_false_positives(data_list, ranked, errors):
    """[dict of image (data: address or None), alt, title, text], the costliest first."""
    pictures = []
    for row, cost in error_analysis.costliest_false_positives(data_list, ranked, errors):
        image_row, name = int(ranked.images[row]), data_list.classes[ranked.labels[row] - 1]
        title = f"{name} {ranked.scores[row]:.2f}: {errors.types[row]}"
        meant = errors.objects[row]
        text = "" if meant < 0 else f"meant: {data_list.classes[data_list.labels[meant] - 1]}; "
        text += f"costs {100 * cost:.2f} points"
        drawn = [(ranked.boxes[row], ORANGE)]
        pictures.append(picture(data_list, image_row, title, text, ranked.boxes[row], drawn))
    return pictures


def picture_missed(data_list, ranked, errors):
    pictures = []
    images = data_list.object_images
    shown = np.flatnonzero(ranked.scores > DETECTION.min_score)
    for row, cost in error_analysis.costliest_missed(data_list, errors):
        sides = data_list.boxes[row, 2:] - data_list.boxes[row, :2]
        text = f"{sides[0]:.0f} x {sides[1]:.0f} pixels; costs {100 * cost:.2f} points or more"
        drawn = [(ranked.boxes[k], ORANGE) for k in shown[ranked.images[shown] == images[row]]]
        title = data_list.classes[data_list.labels[row] - 1]
        pictures.append(picture(data_list, int(images[row]), title, text, data_list.boxes[row], drawn, of_object=row))
    return pictures


def picture(data_list, image_row, title, text, box, drawn, of_object=None):
    """The part of an image around a box, with the image's objects and `drawn` [(box, colour)] on it."""
    file_name = data_list.file_names[image_row]
    entry = {"title": title, "text": text, "file_name": file_name, "image": None}
    try:
        image = data_list.read_image(image_row)
    except DataError as error:
        return {**entry, "text": f"{text}; not shown: {error}", "alt": ""}
    view = view_around(box, image.size)
    part = image.crop(view)
    scale = PICTURE_SIDE / max(part.size)
    part = part.resize([max(1, round(side * scale)) for side in part.size])
    draw = ImageDraw.Draw(part)
    objects = range(data_list.first[image_row], data_list.first[image_row + 1])
    outlines = [(data_list.boxes[k], BLUE, 4 if k == of_object else 2) for k in objects]
    for edges, colour, width in [*outlines, *((edges, colour, 2) for edges, colour in drawn)]:
        shifted = [(float(edge) - view[k % 2]) * scale for k, edge in enumerate(edges)]
        draw.rectangle(shifted, outline=colour, width=width)
    buffer = io.BytesIO()
    part.save(buffer, "JPEG", quality=80)
    entry["image"] = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    entry["alt"] = f"Part of {file_name} around {title}"
    entry["size"] = part.size
    return entry


def view_around(box, size):
    """(left, top, right, bottom), whole pixels, in an image of `size` (width, height); the box lies in its middle."""
    side = max(2 * float(max(box[2] - box[0], box[3] - box[1])), 160)
    view = []
    for low, high, most in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        length = min(side, most)
        start = min(max((float(low) + float(high) - length) / 2, 0), most - length)
        view.append((int(start), int(start + length)))
    return view[0][0], view[1][0], view[0][1], view[1][1]


# ---------------------------------------------------------------------------------------------------------------------
# The curves


def read_log(path):
    """{column: ([epoch, ..], [value, ..])} of a log.csv, without the rows in which a column is empty."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows or "epoch" not in rows[0]:
        raise InputError(f"{path} is no log of a training: it has no row with an epoch")
    columns = {}
    for row in rows:
        for name, text in row.items():
            try:
                value, epoch = float(text), float(row["epoch"])
            except (TypeError, ValueError):
                continue  # empty: not evaluated after this epoch
            epochs, values = columns.setdefault(name, ([], []))
            epochs.append(epoch)
            values.append(value)
    return columns


def draw_curves(log, picture):
    """Losses, scores in percent and learning rate over the epochs of a log.csv, as a PNG."""
    columns = read_log(log)
    figure = Figure(figsize=(13, 4), layout="constrained")
    losses, scores, rate = figure.subplots(1, 3)
    for name, (epochs, values) in columns.items():
        marker = "o" if len(epochs) < 30 else None
        if name.startswith("loss_"):
            losses.plot(epochs, values, marker=marker, markersize=3, label=name.removeprefix("loss_"))
        elif name in ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50", "coco_ap75"):
            scores.plot(epochs, [100 * value for value in values], marker=marker, markersize=3, label=name)
        elif name == "lr":
            rate.plot(epochs, values, label="at the epoch's end")
    losses.set(title="training loss", ylabel="mean of an epoch")
    scores.set(title="scores on the evaluation split", ylabel="AP, percent")
    rate.set(title="learning rate (of all but the backbone)")
    for axis in (losses, scores, rate):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    with atomic_write(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()
