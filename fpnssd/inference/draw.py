"""Boxes and labels on a picture, to its scale, legible on any background."""

import colorsys

from PIL import ImageDraw, ImageFont


def class_colour(label):
    """An RGB colour for a label, far in hue from its neighbours' (steps of the golden ratio)."""
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, 0.85, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)


def annotate(image, detections):
    """A copy of an RGB PIL image with its Detections drawn, better ones on top."""
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    unit = max(picture.size)
    line, font = max(2, round(unit / 250)), ImageFont.load_default(size=max(11, round(unit / 40)))
    plates, rows = [], detections.rows()
    for _, score, _, name in rows:  # better ones choose their place first
        left, top, right, bottom = draw.textbbox((0, 0), f"{name} {score:.2f}", font=font)
        size = (right - left + 2 * line, bottom - top + 2 * line)
        plates.append(place_label(rows[len(plates)][0], size, picture.size, plates))
    for (box, score, label, name), plate in reversed(list(zip(rows, plates, strict=True))):
        colour, text = class_colour(label), f"{name} {score:.2f}"
        draw.rectangle(box, outline=colour, width=line)
        draw.rectangle(plate, fill=colour)
        left, top, _, _ = draw.textbbox((0, 0), text, font=font)
        luma = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
        place = (plate[0] + line - left, plate[1] + line - top)
        draw.text(place, text, font=font, fill="black" if luma > 128 else "white")
    return picture


def place_label(box, size, picture_size, taken):
    """(left, top, right, bottom) for a label of `size`: at the box, in the picture, off the labels in `taken`.

    Above the box, else inside its upper edge, below it, inside its lower edge; where all are taken, the first again.
    """
    places = []
    for x, y in (
        (box[0], box[1] - size[1]),
        (box[0], box[1]),
        (box[2] - size[0], box[1]),
        (box[0], box[3]),
        (box[0], box[3] - size[1]),
    ):
        x, y = max(0, min(x, picture_size[0] - size[0])), max(0, min(y, picture_size[1] - size[1]))
        place = (x, y, x + size[0], y + size[1])
        if not any(overlap(place, other) for other in taken):
            return place
        places.append(place)
    return places[0]


def overlap(a, b):
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
