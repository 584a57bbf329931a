"""The report of an evaluation: one HTML file with its numbers, charts and pictures of mistakes.

    python eval.py runs/lite/best.pth.tar --data data/vocreal --report report.html
    python -m fpnssd.evaluation.report runs/lite                        # runs/lite/log.csv -> runs/lite/curves.png

The file needs no network. Its charts are in charts.py, the page around them is report_template.html.
"""

import argparse
import base64
import io
import sys
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import ImageDraw

from fpnssd.data.data_list import DataList
from fpnssd.data.images import DataError
from fpnssd.evaluation import error_analysis
from fpnssd.evaluation.charts import BLUE, ORANGE, all_charts
from fpnssd.evaluation.error_analysis import Errors
from fpnssd.evaluation.metrics import Ranked, is_above, percent
from fpnssd.training.pictures import draw_curves
from model import DETECTION
from utils import InputError, write_text

PROTOCOLS = {
    "voc2007_ap50": "VOC2007: IoU 0.5, mean precision at 11 recalls",
    "voc2010_ap50": "VOC2010 to 2012: IoU 0.5, area under the interpolated curve",
    "coco_ap": "COCO: mean over IoU 0.5, 0.55 .. 0.95, 101 recalls, 100 detections per class and image",
    "coco_ap50": "COCO at IoU 0.5",
    "coco_ap75": "COCO at IoU 0.75",
    "coco_ap_small": "COCO, objects of less than 32 x 32 pixels",
    "coco_ap_medium": "COCO, 32 x 32 to 96 x 96 pixels",
    "coco_ap_large": "COCO, larger ones",
    "coco_ar100": "COCO: mean recall with 100 detections per class and image",
}
PICTURE_SIDE = 320  # pixels


def write_report(path: str | Path, data_list: DataList, ranked: Ranked, metrics: dict[str, Any]) -> None:
    """Writes the report of an evaluation.

    Args:
        path: of the HTML file.
        data_list: the ground truth.
        ranked: the detections.
        metrics: compute_metrics of them, with the settings and seconds of eval.py.
    """
    errors = error_analysis.find_errors(data_list, ranked)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent}
    false_positives = picture_false_positives(data_list, ranked, errors)
    missed = picture_missed(data_list, ranked, errors)
    unread = [entry["file_name"] for entry in (*false_positives, *missed) if entry["image"] is None]
    if unread:
        count = len(false_positives) + len(missed)
        reason = "cannot be read; --images names the folder of the images"
        print(
            f"warning: {path}: {len(unread)} of {count} pictures, the first of {unread[0]}, {reason}", file=sys.stderr
        )
    html = environment.get_template("report_template.html").render(
        metrics=metrics,
        protocols=PROTOCOLS,
        data_list=data_list,
        charts=all_charts(data_list, ranked, errors, metrics),
        false_positives=false_positives,
        missed=missed,
        min_score=DETECTION.min_score,
        colours={"detection": ORANGE, "object": BLUE},
        today=date.today().isoformat(),
    )
    write_text(path, html, "report")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures of mistakes


def picture_false_positives(data_list: DataList, ranked: Ranked, errors: Errors) -> list[dict[str, Any]]:
    """`picture` of the false positives that lower the mean AP most."""
    pictures = []
    for row, cost in error_analysis.costliest_false_positives(data_list, ranked, errors):
        image_row, name = int(ranked.images[row]), data_list.classes[ranked.labels[row] - 1]
        title = f"{name} {ranked.scores[row]:.2f}: {errors.types[row]}"
        object_row = errors.objects[row]
        text = "" if object_row < 0 else f"of {data_list.classes[data_list.labels[object_row] - 1]}; "
        text += f"costs {100 * cost:.2f} points"
        pictures.append(picture(data_list, image_row, title, text, ranked.boxes[row], [ranked.boxes[row]]))
    return pictures


def picture_missed(data_list: DataList, ranked: Ranked, errors: Errors) -> list[dict[str, Any]]:
    """`picture` of the missed objects that lower the mean AP most."""
    pictures = []
    images = data_list.object_images
    shown = np.flatnonzero(is_above(ranked.scores, DETECTION.min_score))
    for row, cost in error_analysis.costliest_missed(data_list, errors):
        sides = data_list.boxes[row, 2:] - data_list.boxes[row, :2]
        title = data_list.classes[data_list.labels[row] - 1]
        text = f"{sides[0]:.0f} x {sides[1]:.0f} pixels; costs {100 * cost:.2f} points or more"
        detected = ranked.boxes[shown[ranked.images[shown] == images[row]]]
        pictures.append(picture(data_list, int(images[row]), title, text, data_list.boxes[row], detected, row))
    return pictures


def picture(
    data_list: DataList,
    image_row: int,
    title: str,
    text: str,
    box: Sequence[float] | np.ndarray,
    detected: Iterable[np.ndarray],
    missed: int | None = None,
) -> dict[str, Any]:
    """The part of an image around a box, with its ground-truth boxes and detections.

    Args:
        data_list: the images.
        image_row: of the image.
        title, text: of the picture.
        box: xyxy in pixels; it lies in the middle.
        detected: boxes of detections.
        missed: a ground-truth box to draw wider.

    Returns:
        title, text, file_name, image (a data: address, or None if the image cannot be read), alt, size.
    """
    file_name = data_list.file_names[image_row]
    entry = {"title": title, "text": text, "file_name": file_name, "image": None, "alt": "", "size": (0, 0)}
    try:
        image = data_list.read_image(image_row)
    except DataError as error:
        return {**entry, "text": f"{text}; not shown: {error}"}
    view = view_around(box, image.size)
    part = image.crop(view)
    scale = PICTURE_SIDE / max(part.size)
    part = part.resize((max(1, round(part.width * scale)), max(1, round(part.height * scale))))
    draw = ImageDraw.Draw(part)
    objects = range(data_list.first[image_row], data_list.first[image_row + 1])
    outlines = [(data_list.boxes[k], BLUE, 4 if k == missed else 2) for k in objects]
    for edges, colour, width in [*outlines, *((edges, ORANGE, 2) for edges in detected)]:
        left, top, right, bottom = ((float(edge) - view[k % 2]) * scale for k, edge in enumerate(edges))
        draw.rectangle((left, top, right, bottom), outline=colour, width=width)
    buffer = io.BytesIO()
    part.save(buffer, "JPEG", quality=80)
    address = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {**entry, "image": address, "alt": f"Part of {file_name} around {title}", "size": part.size}


def view_around(box: Sequence[float] | np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of an image that shows a box in its middle: twice as large as the box, and at least 160 pixels.

    Args:
        box: xyxy in pixels.
        size: (width, height) of the image.

    Returns:
        left, top, right, bottom, in whole pixels.
    """
    side = max(2 * float(max(box[2] - box[0], box[3] - box[1])), 160)
    view = []
    for low, high, most in ((box[0], box[2], size[0]), (box[1], box[3], size[1])):
        length = min(side, most)
        start = min(max((float(low) + float(high) - length) / 2, 0), most - length)
        view.append((int(start), int(start + length)))
    return view[0][0], view[1][0], view[0][1], view[1][1]


def main(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Draws RUN/curves.png from RUN/log.csv.")
    parser.add_argument("run", type=Path, help="folder of a run, such as runs/lite")
    args = parser.parse_args(argv)
    try:
        draw_curves(args.run / "log.csv", args.run / "curves.png")
    except (InputError, OSError) as error:
        sys.exit(f"report: {error}")
    print(f"wrote {args.run / 'curves.png'}")


if __name__ == "__main__":
    main()
