"""Finds the label files of images in YOLO format, in any of the usual folder layouts."""

import os
from collections import defaultdict
from pathlib import Path

from fpnssd.data.images import is_image_name

IMAGE_FOLDERS = {"images", "image", "imgs", "img", "jpegimages", "photos", "pictures", "frames"}
LABEL_FOLDERS = {"labels", "label"}


class LabelFinder:
    """Finds label files; each folder is listed only once.

    The label file of root/a/images/b/x.jpg is x.txt, or x.jpg.txt, in the first of these folders that has it:
    root/a/labels/b, for the last part of the path that is called images, imgs, JPEGImages or the like, in any case;
    the same with any other part in place of `images`, from the last to the first; a folder `labels` beside the image;
    the image's own folder; root/a/labels; the same for the target of a symbolic link. Parts of the root itself
    do not count.
    """

    def __init__(self, root: Path):
        self.root = root
        self.used: set[Path] = set()  # the label files that were found for an image
        self._folders: dict[Path, list[Path]] = {}  # folder of images -> the folders that may have their labels
        self._names: dict[Path, dict[str, Path]] = {}  # folder -> {name without .txt: label file}
        self._sources: dict[Path, set[Path]] = defaultdict(set)  # folder of labels -> folders of images

    def find(self, image: Path) -> list[Path]:
        """The label files of an image, in order of preference; usually one, or none."""
        files = []
        for folder in self._folders_of(image.parent):
            names = self._label_files(folder)
            file = names.get(image.stem) or names.get(image.name)
            if file is not None and file not in files:
                files.append(file)
        self.used.update(files)
        return files

    def places(self, image: Path) -> list[Path]:
        """The paths at which the label file of an image is expected, for messages."""
        parts, tried = image.parent.parts, []
        for index in self._replaceable(image.parent)[:2]:
            tried.append(Path(*parts[:index], "labels", *parts[index + 1 :]))
        return [folder / f"{image.stem}.txt" for folder in (*tried, image.parent / "labels", image.parent)]

    def without_image(self) -> list[Path]:
        """The label files without an image, in the folders that were searched.

        Label files of another split's images are left out, and text files that do not start like labels.
        """
        found = []
        for folder, sources in self._sources.items():
            files = [file for file in self._label_files(folder).values() if file not in self.used]
            if not files:
                continue
            images = {Path(name) for source in sources for name in os.listdir(source) if is_image_name(name)}
            names = {name for image in images for name in (image.stem, image.name)}
            found += [file for file in files if file.stem not in names and _starts_as_labels(file)]
        return sorted(found)

    def _replaceable(self, folder: Path) -> list[int]:
        """Indices of the parts of a folder's path that `labels` may replace, likeliest first."""
        parts = folder.parts
        named = [index for index, part in enumerate(parts) if part.lower() in IMAGE_FOLDERS]
        if folder.is_relative_to(self.root):  # including the root itself, if the data set's file is beside its images
            first = len(self.root.parts) - (self.root.name.lower() in IMAGE_FOLDERS)
        else:
            first = min([max(1, len(parts) - 2), *named[-1:]])
        inner_first = list(range(len(parts) - 1, first - 1, -1))
        last_named = [index for index in inner_first if index in named][:1]
        return list(dict.fromkeys([*last_named, *inner_first]))

    def _folders_of(self, folder: Path) -> list[Path]:
        if folder not in self._folders:
            parts, nested, flat = folder.parts, [], []
            for index in self._replaceable(folder):
                for labels in _label_folders(Path(*parts[:index])):
                    nested.append(labels.joinpath(*parts[index + 1 :]))
                    flat.append(labels)
            nested += [*_label_folders(folder), folder]
            if (real := Path(os.path.realpath(folder))) != folder:  # a link, whose labels may be beside its target
                flat += self._folders_of(real)
            for labels in nested:
                if labels.is_dir():
                    self._sources[labels].add(folder)
            self._folders[folder] = list(dict.fromkeys(path for path in (*nested, *flat) if path.is_dir()))
        return self._folders[folder]

    def _label_files(self, folder: Path) -> dict[str, Path]:
        if folder not in self._names:
            names = [name for name in sorted(os.listdir(folder)) if name.lower().endswith(".txt")]
            self._names[folder] = {name[:-4]: folder / name for name in names if not name.startswith(".")}
        return self._names[folder]


def _label_folders(folder: Path) -> list[Path]:
    """The folders called labels in a folder."""
    if not folder.is_dir():
        return []
    return [folder / name for name in sorted(os.listdir(folder)) if name.lower() in LABEL_FOLDERS]


def _starts_as_labels(file: Path) -> bool:
    """Whether a file's first line is five numbers or more."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        words = next(lines, "").split()
    try:
        return len([float(word) for word in words]) >= 5
    except ValueError:
        return False
