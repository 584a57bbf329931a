"""Finds objects in photographs: annotated copies and a list of what is where.

    python detect.py photo.jpg --checkpoint runs/lite/best.pth.tar --min-score 0.25

writes detected_img/photo.jpg. In Python, with torch's safe loading left on:

    from detect import detect
    checkpoint = torch.load("runs/lite/best.pth.tar")
    model = checkpoint["model"].to(device)
    annotated = detect(image, min_score=0.25, max_overlap=0.5, top_k=200)  # PIL in, PIL out; model=... optional
"""

import argparse
import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from datasets import DataError, fit_image, read_image, to_rgb
from model import DEFAULT_CHECKPOINT, FPNSSD, last_loaded_model, load_checkpoint, postprocess
from utils import InputError, autocast, class_colour, pick_device, pick_precision, whole_number, written_whole

_model_in_use = None


def main(argv=None):
    args = parse_args(argv)
    try:
        model = load_checkpoint(args.checkpoint)["model"].to(pick_device(args.device))
    except (InputError, OSError) as error:
        sys.exit(f"detect: {error}")
    failures, taken = 0, set()
    photographs = {Path(name).resolve() for name in args.images}
    for name in args.images:
        try:
            image = read_image(name, apply_exif=True)
            detections = find_objects(image, model, args.min_score, args.max_overlap, args.top_k)
            written = Path(args.out) / free_name(Path(name).name, taken)
            if written.resolve() in photographs:
                raise DataError(f"{written} is itself one of the photographs: choose another --out")
            with written_whole(written) as temporary:
                annotate(image, detections, model.config.classes).save(temporary, picture_format(written), quality=92)
        except (InputError, OSError) as error:
            failures += 1
            print(f"detect: {error}", file=sys.stderr)
            continue
        print(f"{name} -> {written}: {len(detections['scores'])} objects")
        for line in describe(detections, model.config.classes):
            print(f"  {line}")
    return sys.exit(1) if failures else None


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--out", default="detected_img", help="folder that gets the annotated copies")
    parser.add_argument("--min-score", type=float, default=0.25)
    parser.add_argument("--max-overlap", type=float, default=0.5)
    parser.add_argument("--top-k", type=whole_number(1), default=200)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    return parser.parse_args(argv)


def free_name(file_name, taken):
    """The file name, numbered if another photograph of this call has it already."""
    path, number = Path(file_name), 1
    while file_name in taken:
        number += 1
        file_name = f"{path.stem}_{number}{path.suffix}"
    taken.add(file_name)
    return file_name


def picture_format(path):
    """PIL's format by the file's ending; JPEG for endings it cannot write."""
    Image.init()
    name = Image.registered_extensions().get(path.suffix.lower(), "JPEG")
    return name if name in Image.SAVE else "JPEG"


# ---------------------------------------------------------------------------------------------------------------------
# Detecting


def detect(image, min_score=0.25, max_overlap=0.5, top_k=200, suppress=None, model=None):
    """An annotated copy of a PIL image.

    suppress: names of classes to leave out. model: an FPNSSD; without it the one last loaded in this process, else the
    one that ships, and which one it is gets printed when it changes.
    """
    model = model if model is not None else _default_model()
    unknown = sorted(set(suppress or ()) - set(model.config.classes))
    if unknown:
        raise InputError(f"cannot suppress {', '.join(unknown)}: the model knows {', '.join(model.config.classes)}")
    image = to_rgb(ImageOps.exif_transpose(image))
    detections = find_objects(image, model, min_score, max_overlap, top_k, suppress)
    return annotate(image, detections, model.config.classes)


def _default_model():
    global _model_in_use
    model, source = last_loaded_model(), "the model last loaded"
    if model is None:
        model, source = load_checkpoint(DEFAULT_CHECKPOINT)["model"], DEFAULT_CHECKPOINT
    if model is not _model_in_use:
        print(f"detect: using {source} ({model.config.trunk}, {len(model.config.classes)} classes)", file=sys.stderr)
    _model_in_use = model
    return model


@torch.no_grad()
def find_objects(image, model: FPNSSD, min_score=0.25, max_overlap=0.5, top_k=200, suppress=None):
    """Detections in an RGB PIL image: boxes (m, 4) in its pixels, scores, labels (m,), best first, on the CPU."""
    device = model.priors.device
    was_training = model.training
    model.eval()
    try:
        with autocast(device, pick_precision("auto", device)):
            offsets, logits = model(fit_image(image, model.config.image_size)[None].to(device))
    finally:
        model.train(was_training)
    for name in suppress or ():
        # Its share goes to background: spread over the other classes it would raise their scores.
        label = model.config.classes.index(name) + 1
        logits[..., 0] = torch.logaddexp(logits[..., 0], logits[..., label])
        logits[..., label] = -torch.inf
    size = (image.height, image.width)
    (detections,) = postprocess(offsets, logits, model.priors, [size], min_score, max_overlap, top_k)
    return {name: tensor.cpu() for name, tensor in detections.items()}


def describe(detections, classes):
    """A line an object: 'dog 0.93 at 12,40,200,310' (left, top, right, bottom in pixels)."""
    for box, score, label in _rows(detections):
        yield f"{classes[label - 1]} {score:.2f} at {','.join(str(round(edge)) for edge in box)}"


def _rows(detections):
    return zip(detections["boxes"].tolist(), detections["scores"].tolist(), detections["labels"].tolist(), strict=True)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def annotate(image, detections, classes):
    """A copy of the PIL image with boxes and labels, drawn to scale; the best detection is drawn last, on top."""
    picture = image.convert("RGB").copy()
    draw = ImageDraw.Draw(picture)
    unit = max(picture.width, picture.height)
    line, font = max(2, round(unit / 250)), ImageFont.load_default(size=max(11, round(unit / 40)))
    for box, score, label in reversed(list(_rows(detections))):
        colour = class_colour(label)
        draw.rectangle(box, outline=colour, width=line)
        text = f"{classes[label - 1]} {score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 2 * line, bottom - top + 2 * line
        x = max(0, min(box[0], picture.width - width))
        y = box[1] - height if box[1] >= height else min(box[1], picture.height - height)  # above, else just inside
        draw.rectangle([x, y, x + width, y + height], fill=colour)
        luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        draw.text((x + line - left, y + line - top), text, font=font, fill="black" if luma > 128 else "white")
    return picture


if __name__ == "__main__":
    main()
