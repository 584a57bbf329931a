"""Chooses the photographs of a training list that recipes are screened on: fixed, with all classes and sources."""

import random
import re
from collections import Counter


def source_of(file_name: str) -> str:
    """voc2007, voc2012 or coco: VOC2012's photographs are named by their year, those of COCO by coco_."""
    return "coco" if file_name.startswith("coco_") else "voc2012" if re.match(r"20\d\d_", file_name) else "voc2007"


def screening_ids(content: dict, count: int, per_class: int, seed: int = 0) -> set[int]:
    """Ids of images of a data list: at least per_class objects of each class, and of each source its share.

    Images are drawn in one random order. The rarest class comes first and takes images that show it until it has
    per_class objects; then each source is filled up to its share of count.

    Args:
        content: JSON of a data list.
        count: images to take; a few more or less where the first pass took more than a share, or shares are rounded.
        per_class: least number of objects of each class.
        seed: of the random order.
    """
    sources = {image["id"]: source_of(image["file_name"]) for image in content["images"]}
    order = random.Random(seed).sample(sorted(sources), len(sources))
    classes_of: dict[int, Counter] = {image_id: Counter() for image_id in order}
    for annotation in content["annotations"]:
        classes_of[annotation["image_id"]][annotation["category_id"]] += 1
    objects = sum(classes_of.values(), Counter())
    taken: set[int] = set()
    for category in sorted(objects, key=lambda category: objects[category]):
        have = sum(classes_of[image_id][category] for image_id in taken)
        for image_id in order:
            if have >= per_class:
                break
            if image_id not in taken and classes_of[image_id][category]:
                taken.add(image_id)
                have += classes_of[image_id][category]
    for source, images in Counter(sources.values()).items():
        missing = round(count * images / len(sources)) - sum(sources[image_id] == source for image_id in taken)
        of_source = [image_id for image_id in order if sources[image_id] == source and image_id not in taken]
        taken.update(of_source[: max(missing, 0)])
    return taken
