"""Pictures of results: the curves of a run.

python report.py runs/lite                        # runs/lite/log.csv -> runs/lite/curves.png
"""

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure

from utils import InputError, written_whole


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draws RUN/curves.png from RUN/log.csv.")
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/lite")
    args = parser.parse_args(argv)
    try:
        draw_curves(args.run / "log.csv", args.run / "curves.png")
    except (InputError, OSError) as error:
        sys.exit(f"report: {error}")
    print(f"wrote {args.run / 'curves.png'}")


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
    rate.set(title="learning rate (of all but the trunk)")
    for axis in (losses, scores, rate):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    with written_whole(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


if __name__ == "__main__":
    main()
