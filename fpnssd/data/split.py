"""Divides a data set that has no splits into train and val.

    names = split_to_divide(["default"])                      # "default": which of its splits is to be divided
    groups = group_images(images)                       # near-duplicates and frames of one video are one group
    in_val = divide_groups(groups, counts, 0.2, seed)   # each class gets its share, and no group is cut

A random division is not enough. Two frames of a video, one in train and one in val, make a validation score too good,
and a rare class may have no image in val at all.
"""

import posixpath
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from fpnssd.data.annotations import ALL, SplitAnnotations
from fpnssd.data.checks import CheckedImage, CheckResult, Split, collect_results
from fpnssd.data.images import DataError
from fpnssd.data.near_duplicates import group_near
from fpnssd.data.yolo_config import SAME_SPLIT

VAL_SHARE = 0.2
# Neighbours in a series of numbered names need less similarity than SAME_SCENE to be frames of one video. Of 1,562 such
# neighbours that are independent photographs (1,200 of VOC and COCO, 364 of blood cells) none but a true copy has a
# similarity above 0.3.
SAME_VIDEO = 0.4
RUNS = 10  # into which a scene is cut if it has more than half of the images


def split_to_divide(names: Collection[str]) -> str | None:
    """The split of a data set that has to be divided into train and val.

    Args:
        names: the splits that the data set has.

    Returns:
        ALL where it has none; `train` or `trainval` where it has no val, or the only one; None where it has train and
        val, or others.
    """
    if not names:
        return ALL
    if "train" in names and any(name in names for name in SAME_SPLIT):
        return None
    usual = next((name for name in ("train", "trainval") if name in names), None)
    return next(iter(names)) if usual is None and len(names) == 1 else usual


def divide_results(
    annotations: SplitAnnotations, results: Sequence[CheckResult], val_share: float = VAL_SHARE, seed: int = 0
) -> list[Split]:
    """Divides a checked data set into train and val, and prints the numbers.

    Args:
        annotations: what the reader returned. Its problems go to train, as do those of images that cannot be used.
        results: of all its images.
        val_share: of the objects of each class, in 0..1.
        seed: of the division, which does not depend on the order of the images.

    Returns:
        The splits train and val, images in the order of `results`.

    Raises:
        DataError: there are fewer than two groups of images.
    """
    named = sorted((image.file_name, place) for place, (image, *_) in enumerate(results) if image is not None)
    usable = [place for _, place in named]
    images = [image for place in usable if (image := results[place][0]) is not None]
    if not images:
        return [collect_results("train", annotations, results)]
    groups = group_images(images)
    if len(set(groups.tolist())) < 2:
        raise DataError(
            f"{len(images)} usable images cannot be divided into train and val: add images, or write one list of all "
            "with --splits and one name"
        )
    in_val = np.zeros(len(results), bool)
    in_val[usable] = divide_groups(groups, count_objects(images), val_share, seed)
    print(
        f"{annotations.name}: {len(images)} images are divided into train ({len(images) - in_val.sum()}) and val "
        f"({in_val.sum()}), {100 * val_share:g} % of each class as far as possible (--val-share, --seed). They are "
        f"{len(set(groups.tolist()))} groups: near-duplicates and frames of one video stay together"
    )
    train, val = ([result for result, is_val in zip(results, in_val, strict=True) if is_val == part] for part in (0, 1))
    return [
        collect_results("train", annotations, train),
        collect_results("val", replace(annotations, problems=[]), val),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Groups of images


def group_images(images: Sequence[CheckedImage]) -> np.ndarray:
    """Groups images that must not be in two splits.

    Two images are in one group if

    - their pixels are the same;
    - Roboflow made both of one photograph: NAME_jpg.rf.HASH.jpg, with one NAME;
    - they are near-duplicates (near_duplicates.SAME_SCENE), mirrored or not;
    - they are frames of one video: their names differ in the number at the end alone, no other number lies between
      these, and their similarity is SAME_VIDEO or more. Names alone do not tell: cameras number photographs as well;

    or if other images link them in this way. Where one group holds more than half of all images, as with a camera that
    does not move, it is cut into RUNS runs of consecutive names, which is printed.

    Args:
        images: checked, in the order of their names.

    Returns:
        (n,) int64, the number of each image's group.
    """
    groups = np.arange(len(images))
    if not images:
        return groups
    descriptors = np.stack([image.descriptor for image in images])
    names = source_names([image.file_name for image in images])
    _join_equal(groups, [image.digest for image in images])
    _join_equal(groups, [source if augmented else place for place, (source, augmented) in enumerate(names)])
    series = defaultdict(list)
    for place, (source, _) in enumerate(names):
        if match := re.fullmatch(r"(.*?)(\d+)", source):
            series[match[1]].append((int(match[2]), place))
    for numbered in series.values():
        numbered.sort()
        for (_, first), (_, second) in zip(numbered, numbered[1:], strict=False):
            if descriptors[first].astype(np.float32) @ descriptors[second].astype(np.float32) >= SAME_VIDEO:
                groups[groups == max(groups[[first, second]])] = min(groups[[first, second]])
    groups = group_near(descriptors, groups)
    numbers, counts = np.unique(groups, return_counts=True)
    if len(images) > 2 and counts.max() > len(images) / 2:
        scene = np.flatnonzero(groups == numbers[counts.argmax()])
        scene = np.array(sorted(scene, key=lambda place: natural_key(names[place][0])))
        print(
            f"note: {len(scene)} of {len(images)} images show nearly the same scene, such as "
            f"{images[scene[0]].file_name}: they are cut into {min(RUNS, len(scene))} runs of consecutive "
            "names, and val is not independent of train",
            file=sys.stderr,
        )
        runs = np.arange(len(scene)) * RUNS // len(scene)
        groups[scene] = scene[np.searchsorted(runs, runs)]  # the first image of each run
    return groups


def source_names(file_names: Sequence[str]) -> list[tuple[str, bool]]:
    """The files' names without ending and without what tools add, and whether Roboflow added something.

    Roboflow writes NAME_jpg.rf.HASH.jpg, Label Studio HASH-NAME.jpg with 8 hexadecimal digits before each name.
    """
    names = [re.sub(r"\.[^./]+$", "", name) for name in file_names]
    prefixes = [re.match(r"([0-9a-f]{8})-.", posixpath.basename(name)) for name in names]
    if all(prefixes) and not all(prefix[1].isdigit() for prefix in prefixes if prefix):  # digits alone are dates
        names = [re.sub(r"[0-9a-f]{8}-([^/]+)$", r"\1", name) for name in names]
    sources = []
    for name in names:
        source, augmented, _ = name.partition(".rf.")
        if augmented:
            source = re.sub(r"_(jpe?g|png|bmp|webp|tiff?)$", "", source, flags=re.IGNORECASE)
        sources.append((source, bool(augmented)))
    return sources


def natural_key(name: str) -> list[tuple[str, int]]:
    """A key that sorts frame_2 before frame_10."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", name)]


def _join_equal(groups: np.ndarray, keys: Iterable[Hashable]) -> None:
    """Joins the groups of images with equal keys, in place."""
    first: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        other = groups[first.setdefault(key, place)]
        if other != groups[place]:
            low, high = sorted((other, groups[place]))
            groups[groups == high] = low


# ---------------------------------------------------------------------------------------------------------------------
# Groups of val


def count_objects(images: Sequence[CheckedImage]) -> np.ndarray:
    """(images, classes) int64: objects of each class, in the order of their names."""
    classes = {
        name: label for label, name in enumerate(sorted({obj.name for image in images for obj in image.objects}))
    }
    counts = np.zeros((len(images), len(classes)), np.int64)
    for row, image in zip(counts, images, strict=True):
        for obj in image.objects:
            row[classes[obj.name]] += 1
    return counts


def divide_groups(groups: np.ndarray, counts: np.ndarray, val_share: float, seed: int = 0) -> np.ndarray:
    """Chooses the images of val: whole groups, such that each class has its share of objects there.

    Images without objects are divided like a class.

    This is iterative stratification (Sechidis et al., On the Stratification of Multi-Label Data, 2011) over groups: the
    class with the fewest groups comes first, and each of its groups goes to the part that lacks most of the class. If
    each group has one class alone, the objects of a class in val differ from its share by at most half of its largest
    group, or by what the next rule takes: a class of two or more groups is in both parts. With several classes
    in a group, both hold as far as these steps allow. The only group of a class goes to train.

    Args:
        groups: (n,) int64, the group of each image.
        counts: (n, classes) int64, objects of each image.
        val_share: in 0..1.
        seed: of the order in which groups are placed.

    Returns:
        (n,) bool: which images are in val.
    """
    counts = np.column_stack([counts, counts.sum(axis=1) == 0])
    numbers, member = np.unique(groups, return_inverse=True)
    objects = np.zeros((len(numbers), counts.shape[1]), np.int64)
    np.add.at(objects, member, counts)
    present = objects > 0
    part = np.full(len(numbers), -1)  # 0 train, 1 val
    images = np.bincount(member)
    shares = np.array([1 - val_share, val_share])
    lacking = shares[:, None] * objects.sum(axis=0)  # (2, classes) objects
    lacking_images = shares * len(groups)
    order = np.random.default_rng(seed).permutation(len(numbers))
    while (part < 0).any():
        left = (present & (part < 0)[:, None]).sum(axis=0)
        label = np.where(left > 0, left, len(numbers) + 1).argmin()
        placing = order[(part[order] < 0) & present[order, label]]
        for place, group in enumerate(placing):
            chosen = max((0, 1), key=lambda side: (lacking[side, label], lacking_images[side]))
            if place == len(placing) - 1:
                has = [(present[:, label] & (part == side)).any() for side in (0, 1)]
                chosen = chosen if has[0] == has[1] else has.index(False)
                chosen = chosen if any(has) else 0
            part[group] = chosen
            lacking[chosen] -= objects[group]
            lacking_images[chosen] -= images[group]
    _put_classes_in_both(present, part, images)
    return part[member] == 1


def _put_classes_in_both(present: np.ndarray, part: np.ndarray, images: np.ndarray) -> None:
    """Moves groups, in place, so that classes of two or more groups are in both parts, if moving one group suffices.

    Args:
        present: (groups, classes) bool: which classes a group has.
        part: (groups,) 0 or 1.
        images: (groups,) their number.
    """
    for label in np.flatnonzero(present.sum(axis=0) > 1):
        parts_of_class = part[present[:, label]]
        if parts_of_class.min() != parts_of_class.max():
            continue
        source = parts_of_class[0]
        last = present[part == source].sum(axis=0) == 1  # classes that would be absent from the source in their turn
        free = np.flatnonzero(present[:, label] & ~(present & last).any(axis=1))
        if len(free):
            part[free[images[free].argmin()]] = 1 - source
