"""Reads the description of a data set in YOLO format: a data.yaml, Darknet's obj.data, or a list of class names.

config = read_config(Path("mydata"))  # or the file itself
config.classes  # {0: "mug", 1: "key"}
images, passed_over = config.find_split("train")  # paths; counts of other files by ending
"""

import os
import re
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from fpnssd.data.annotations import ALL, read_lines, read_text
from fpnssd.data.images import DataError, find_images

MAX_BYTES = 2**20  # of a data.yaml; PyYAML reads about 100 kB a second
SAME_SPLIT = ("val", "valid", "validation")  # names of the same split, depending on the exporter
YAML_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "data_config.yaml")
NO_SPLITS = {"names", "nc", "path", "kpt_shape", "flip_idx", "colors", "download"}  # keys of a data.yaml
CLASS_FILES = ("classes.txt", "obj.names")


class _WordLoader(yaml.BaseLoader):
    """Loads all scalars except null as strings: a class may be called yes, off, 1.0 or 2024-01-01."""

    def construct_mapping(self, node, deep=False):
        keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"it has the key {key!r} twice", node.start_mark)
        return super().construct_mapping(node, deep)


_WordLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_WordLoader.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)


@dataclass
class YoloConfig:
    """A data set's classes, and where its splits are."""

    path: Path  # the file that was read
    root: Path  # the folder that its paths start from
    classes: dict[int, str]  # id in the label files -> name
    # Name -> folders, or text files that list images. If empty, splits are searched for as folders of their names.
    splits: dict[str, list[str]] = field(default_factory=dict)
    kpt_shape: tuple[int, int] | None = None  # key points of each object, numbers of each (2 or 3)
    kpt_shape_given: bool = False  # whether the file has the key, even as null

    @property
    def folders(self) -> list[Path]:
        """The folders that paths may be relative to, likeliest first."""
        return list(dict.fromkeys((self.root, self.path.parent)))

    def find_split(self, name: str, others: int = 0) -> tuple[list[Path], Counter[str]]:
        """Finds the images of a split.

        Args:
            name: of the split.
            others: number of other splits that are read; if 0, a data set without named splits is one split as a whole.

        Returns:
            The images, in order, repeated if they are named twice; and the number of skipped files by ending.

        Raises:
            DataError: there is no such split, no such place, or no image in it.
        """
        places = self._places(name, others)
        images: list[Path] = []
        skipped: Counter[str] = Counter()
        for place in places:
            path = locate(place, self.folders)
            if path is None or not (path.is_dir() or (path.is_file() and path.suffix == ".txt")):
                where = path or self.root / place.replace("\\", "/")
                raise DataError(f"{self.path} names {where}, which is neither a folder nor a text file")
            if path not in [normalize_path(folder / place.replace("\\", "/")) for folder in self.folders]:
                note = f"note: {self.path} names {place}, which does not exist (usual in Roboflow exports)"
                print(f"{note}: reading {path}")
            if path.is_dir():
                part, skipped_here = find_images(path)
                skipped += skipped_here
            else:
                part = listed_images(path, self.folders)
                if part and not any(image.is_file() for image in part):
                    raise DataError(f"{path} lists {len(part)} images, none of which exists, such as {part[0]}")
            images += part
        if not images:
            endings = ", ".join(f"{count} x {ending}" for ending, count in skipped.most_common(5))
            hint = f" (files that are not images: {endings})" if endings else ""
            raise DataError(f"split {name!r} is empty: no image in {', '.join(places)} below {self.root}{hint}")
        return images, skipped

    def _places(self, name: str, others: int) -> list[str]:
        """The folders and text files of a split, as written in the file."""
        aliases = (name, *SAME_SPLIT) if name in SAME_SPLIT else (name,)
        if self.splits:
            key = next((key for key in aliases if self.splits.get(key)), None)
            if key is None:
                raise DataError(f"no split {name!r} in {self.path}; it has {', '.join(self.splits)}")
            return self.splits[key]
        if name == ALL:
            return ["."]
        place = next((place for alias in aliases if (place := self.folder_of(alias))), None)
        if place is None and others:
            raise DataError(
                f"no split {name!r}: {self.path} names only classes, and {self.root} has no {name} or "
                f"images/{name} or {name}.txt; --splits with one name takes all images as that split"
            )
        return [place or "."]

    def folder_of(self, name: str) -> str | None:
        """The folder or list of images, relative to the root, that is named like a split; None if there is none."""
        options = (name, f"images/{name}", f"{name}.txt")
        return next((option for option in options if (self.root / option).exists()), None)


def read_config(path: Path) -> YoloConfig:
    """Reads the description of a data set.

    Args:
        path: a data.yaml, Darknet's obj.data, a text file of class names; or a folder that has one of them.

    Raises:
        DataError: there is none, or it cannot be used.
    """
    path = Path(path)
    root = path if path.is_dir() else path.parent
    if path.is_dir():
        path = _config_in(path)
    elif not path.is_file():
        raise DataError(f"{path} is missing; --yolo also takes a folder with data.yaml, obj.data or classes.txt")
    if path.suffix == ".data":
        return _read_darknet(path)
    if path.suffix in (".txt", ".names"):
        if root == path.parent and root.name.lower() in ("labels", "label"):
            root = root.parent
        return YoloConfig(path, normalize_path(root), check_classes(path, enumerate(read_names(path))))
    return _read_yaml(path)


def _config_in(folder: Path) -> Path:
    """The file of a folder that describes its data set."""
    yamls = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".yaml", ".yml"))
    named = [file for name in YAML_NAMES for file in yamls if file.name == name]
    if named or len(yamls) == 1:
        return (named or yamls)[0]
    if yamls:
        raise DataError(f"{folder} has {', '.join(file.name for file in yamls)}: pass one of them")
    if darknet := sorted(folder.glob("*.data")):
        return darknet[0]
    lists = [file for name in CLASS_FILES for depth in ("", "*/", "*/*/") for file in sorted(folder.glob(depth + name))]
    if not lists:
        raise DataError(f"{folder} has no data.yaml, obj.data or classes.txt that names the classes")
    for other in lists[1:]:
        if read_names(other) != read_names(lists[0]):
            raise DataError(f"{lists[0]} and {other} name different classes: pass one of them")
    return lists[0]


# ---------------------------------------------------------------------------------------------------------------------
# The three kinds of files


def _read_yaml(path: Path) -> YoloConfig:
    content = load_yaml(path)
    names = content.get("names") if isinstance(content, dict) else None
    if not isinstance(names, list | dict) or not names:
        raise DataError(f"{path} is not a data.yaml with `names`: a list of class names, or a mapping from id to name")
    if isinstance(names, dict) and not all(isinstance(key, str) and re.fullmatch("[0-9]{1,9}", key) for key in names):
        raise DataError(f"{path} is not a data.yaml with `names`: its keys must be the ids, as in `0: cat`")
    pairs = [(int(key), name) for key, name in names.items()] if isinstance(names, dict) else list(enumerate(names))
    classes = check_classes(path, pairs, content.get("nc"))
    splits = {}
    for key, value in content.items():
        entries = value if isinstance(value, list) else [value]
        if key not in NO_SPLITS and entries and all(isinstance(entry, str) and entry for entry in entries):
            splits[key] = entries
    folder = content.get("path") or "."
    if not isinstance(folder, str):
        raise DataError(f"{path}: `path` must be a folder, not {reprlib.repr(folder):.80}")
    root = path.parent / folder
    if not os.path.exists(root):
        root = path.parent
        print(f"note: {path} names the folder {folder}, which does not exist: {root} is used instead")
    kpt_shape = _kpt_shape(path, content.get("kpt_shape"))
    return YoloConfig(path, normalize_path(root), classes, splits, kpt_shape, "kpt_shape" in content)


def load_yaml(path: Path):
    """The content of a YAML file as dicts, lists, strings and None.

    Raises:
        DataError: it does not parse, or is larger than MAX_BYTES.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise DataError(f"{path} is larger than {MAX_BYTES} bytes: that is not a data.yaml")
        return yaml.load(data.decode("utf-8-sig"), _WordLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())  # PyYAML's messages have several lines
        raise DataError(f"{path} is not a data.yaml with `names`: {reason:.300}") from error


def _kpt_shape(path: Path, value) -> tuple[int, int] | None:
    if value is None:
        return None
    if isinstance(value, list) and len(value) == 2 and all(isinstance(n, str) and n.isdecimal() for n in value):
        points, numbers = map(int, value)
        if points > 0 and numbers in (2, 3):
            return points, numbers
    raise DataError(f"{path}: kpt_shape must be [number of key points, 2 or 3], not {reprlib.repr(value):.80}")


def _read_darknet(path: Path) -> YoloConfig:
    """Darknet's obj.data: lines `key = value`, of which `names` is a file with one class name per line."""
    pairs = [line.partition("=") for line in read_lines(path)]
    content = {key.strip(): value.strip() for key, _, value in pairs}
    names = locate(content.pop("names", ""), [path.parent]) or path.parent / "obj.names"
    if not names.is_file():
        raise DataError(f"{path} names no existing file of class names (`names = obj.names`)")
    classes = check_classes(names, enumerate(read_names(names)), content.pop("classes", None))
    content.pop("backup", None)
    return YoloConfig(
        path, normalize_path(path.parent), classes, {key: [value] for key, value in content.items() if value}
    )


def read_names(path: Path) -> list[str]:
    """The class names of a text file, one per line; an empty line between them would shift the ids after it."""
    lines = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if not all(lines):
        raise DataError(f"{path}: line {lines.index('') + 1} is empty: is it a class without a name?")
    return lines


def check_classes(path: Path, pairs: Iterable[tuple[int, str]], count: str | None = None) -> dict[int, str]:
    """{id: name}, by id.

    Args:
        path: the file that names them, for messages.
        pairs: (id, name) of each class.
        count: their number, if the file states it.

    Raises:
        DataError: a name is not a string, two are the same, or their number is not `count`.
    """
    classes: dict[int, str] = {}
    for number, name in sorted(pairs, key=lambda pair: pair[0]):
        if not isinstance(name, str) or not name.strip():
            raise DataError(
                f"{path}: class {number} has {reprlib.repr(name):.80} in place of a name; quote it if it is one"
            )
        if not name.isprintable():
            raise DataError(f"{path}: the name of class {number} has characters that cannot be printed: {name!r:.80}")
        if number in classes or name.strip() in classes.values():
            raise DataError(f"{path} names the class {name!r:.80} or its id {number} twice")
        classes[number] = name.strip()
    if not classes:
        raise DataError(f"{path} names no class")
    if isinstance(count, str) and count.isdecimal() and int(count) not in (len(classes), max(classes) + 1):
        raise DataError(f"{path} says {count} classes and names {len(classes)}")
    return classes


# ---------------------------------------------------------------------------------------------------------------------
# Paths


def locate(name: str, folders: Iterable[Path], exists: Callable[[Path], bool] = os.path.exists) -> Path | None:
    """Finds a file or folder by a path of data.yaml or of a list, even if the data set was moved or renamed.

    Roboflow writes `../train/images` beside `train`, CVAT `data/obj_train_data/a.jpg` beside `obj_train_data`, a
    notebook `/content/kitchen/train/images`: a path that does not exist is searched for by its trailing parts.

    Args:
        name: an absolute or relative path, with slashes or backslashes.
        folders: what it may be relative to.
        exists: the test that a path has to pass.

    Returns:
        The first of the folders joined with the name, or with its longest end, that exists; None if none does.
    """
    name = name.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    for end in (name, *("/".join(parts[start:]) for start in range(len(parts)))):
        for folder in folders:
            if exists(folder / end):
                return normalize_path(folder / end)
    return None


def normalize_path(path: Path) -> Path:
    """The absolute path without `..`; symbolic links stay, except those followed by `..`."""
    flat = Path(os.path.abspath(path))
    if ".." not in path.parts or (flat.exists() and os.path.samefile(flat, path)):
        return flat
    return Path(os.path.realpath(path))


def listed_images(file: Path, folders: list[Path]) -> list[Path]:
    """The images that a text file lists, one per line; including missing ones, which are reported later."""
    lines = [line.strip("\"'") for line in read_lines(file)]
    folders = list(dict.fromkeys((file.parent, *folders)))
    return [locate(line, folders, os.path.isfile) or file.parent / line for line in lines if line]
