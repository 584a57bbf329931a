"""A data list, the COCO JSON file that create_data_lists.py writes, as arrays."""

import contextlib
import hashlib
import json
import pickle
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import ijson
import numpy as np
import torch
from PIL import Image

from fpnssd.data.annotations import parse_flag
from fpnssd.data.coco import read_coco_json, stream_coco_json
from fpnssd.data.images import DataError, read_image
from utils import atomic_write, hash_file

ARRAYS_VERSION = 3  # of the fields that such a file holds (see DataList)
ARRAYS_FROM = 32 * 2**20  # bytes of JSON: larger lists keep their arrays in a file beside them
STREAMED_FROM = 64 * 2**20  # bytes of JSON: larger lists are parsed in parts, which is slower and saves gigabytes
PART = 50_000  # annotations


class Strings:
    """A list of strings as two arrays, which worker processes share; each process would copy a list of str."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends  # uint8 (bytes,), UTF-8; int64 (n,)

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        encoded = [string.encode("utf-8") for string in strings]
        ends = np.cumsum([len(piece) for piece in encoded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index > 0 else 0
        return self.data[start : self.ends[index]].tobytes().decode("utf-8")


@dataclass
class DataList:
    """A COCO JSON file, as arrays. Objects of image i are rows first[i]:first[i + 1]."""

    path: str
    image_root: Path
    classes: tuple[str, ...]  # names of labels 1..C
    category_ids: tuple[int, ...]  # their ids in the file
    file_names: Strings  # relative to image_root
    image_ids: np.ndarray | Strings  # (images,) int64; Strings where the file has other ids than integers
    sizes: np.ndarray  # (images, 2) int32, height and width
    apply_exif: np.ndarray  # (images,) bool: sizes and boxes are those of the image turned by its EXIF orientation
    first: np.ndarray  # (images + 1,) int64
    boxes: np.ndarray  # (objects, 4) float32, xyxy in pixels
    labels: np.ndarray  # (objects,) int32, 1..C
    difficult: np.ndarray  # (objects,) bool
    crowd: np.ndarray  # (objects,) bool
    areas: np.ndarray | None = None  # (objects,) float32, square pixels; None if they are the boxes' areas
    truncated: np.ndarray | None = None  # (objects,) int8: 1, 0, or -1 where it is not known; None if it never is
    arrays_file: Path | None = None  # where the arrays are mapped from, if they are

    def __len__(self) -> int:
        """Number of images."""
        return len(self.sizes)

    @property
    def object_images(self) -> np.ndarray:
        """(objects,) int64: the row of each object's image."""
        return np.repeat(np.arange(len(self)), np.diff(self.first))

    @property
    def counted(self) -> np.ndarray:
        """(objects,) bool: neither difficult nor a crowd, so that it counts in metrics."""
        return ~(self.difficult | self.crowd)

    @property
    def object_areas(self) -> np.ndarray:
        """(objects,) square pixels: those of the file, which in COCO are the outlines', or the boxes'."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return sides.prod(axis=1) if self.areas is None else self.areas

    @property
    def content_hash(self) -> str:
        """BLAKE2b hash of the content that affects training, in hexadecimal.

        Classes, image names, sizes, EXIF turns, boxes, labels, difficult and crowd flags and the order of all these
        count. The paths of the list and its images, the images' pixels, ids, areas and truncated flags do not.
        """
        digest = hashlib.blake2b(json.dumps([self.classes, len(self), len(self.boxes)]).encode(), digest_size=16)
        arrays = {
            "<u1": (self.file_names.data, self.apply_exif, self.difficult, self.crowd),
            "<i8": (self.file_names.ends, self.sizes, self.first, self.labels),
            "<f4": (self.boxes,),
        }
        for dtype, group in arrays.items():
            for array in group:
                digest.update(np.ascontiguousarray(array, dtype))
        return digest.hexdigest()

    def image_id(self, index: int) -> int | str:
        """The image's id in the file."""
        image_id = self.image_ids[index]
        return image_id if isinstance(image_id, str) else int(image_id)

    def target(self, index: int) -> dict[str, Any]:
        """The ground truth of an image.

        Returns:
            boxes (n, 4) float32, xyxy in pixels; labels (n,) int64, 1..C; difficult and crowd (n,) bool; image_id; and
            size (height, width) in pixels.
        """
        rows = slice(self.first[index], self.first[index + 1])
        return {
            "boxes": self.boxes[rows],
            "labels": self.labels[rows].astype(np.int64),
            "difficult": self.difficult[rows],
            "crowd": self.crowd[rows],
            "image_id": self.image_id(index),
            "size": tuple(self.sizes[index].tolist()),
        }

    def image_path(self, index: int) -> Path:
        return self.image_root / self.file_names[index]

    def read_image(self, index: int) -> Image.Image:
        """Decodes an image as RGB, turned by its EXIF orientation if the list says so.

        Raises:
            DataError: it is missing, damaged, or of another size than the list says.
        """
        path, (height, width) = self.image_path(index), self.sizes[index]
        try:
            image = read_image(path, self.apply_exif[index])
        except DataError as error:
            sentence = f"{error}; {self.path} lists it (--images FOLDER if the images were moved)"
            raise DataError(sentence, error.kind) from error
        if (image.height, image.width) != (height, width):
            raise DataError(
                f"image {path} is {image.width}x{image.height} pixels, but {self.path} says {width}x{height}: "
                "create the list again"
            )
        return image

    @classmethod
    def load(cls, path: str | Path, images: str | Path | None = None) -> "DataList":
        """Reads a list that create_data_lists.py wrote.

        A large list's arrays are kept in a file beside it, which later calls map into memory instead of reading the
        JSON: parsing a million images takes gigabytes, and worker processes share what is mapped.

        Args:
            path: the COCO JSON file.
            images: the images' folder, in place of info.image_root.

        Raises:
            FileNotFoundError: there is no such file.
            DataError: it is not COCO JSON, an id is unknown or repeated, a box is empty or leaves its image.
        """
        path = Path(path)
        if not path.is_file():
            hint = "python create_data_lists.py creates one"
            if lists := sorted(file.stem for file in path.parent.glob("*.json") if file.name != "check.json"):
                hint = f"{path.parent} has the lists {', '.join(lists)}, python create_data_lists.py creates others"
            if path.parent.is_file():
                hint = f"--data is the folder of data lists: --data {path.parent.parent}"
            raise FileNotFoundError(f"no data list {str(path)!r}: {hint}")
        if path.stat().st_size < ARRAYS_FROM:
            return cls._from_json(path, images)
        arrays_file, file_hash = path.with_suffix(".arrays"), hash_file(path)
        if _stored_hash(arrays_file) != file_hash:
            data_list = cls._from_json(path)
            try:
                data_list._write_arrays(arrays_file, file_hash)
            except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where a disk is full
                print(f"note: cannot write {arrays_file} ({error}): {path} is parsed each time", file=sys.stderr)
                return replace(data_list, image_root=Path(images)) if images else data_list
        return cls._from_arrays(path, images, arrays_file)

    @classmethod
    def _from_json(cls, path: Path, images: str | Path | None = None) -> "DataList":
        try:
            if path.stat().st_size >= STREAMED_FROM:
                with contextlib.suppress(ijson.JSONError):  # not JSON or not UTF-8: handled by the next line
                    return cls.from_coco(path, stream_coco_json(path), images)
            return cls.from_coco(path, read_coco_json(path), images)
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError) as error:
            raise DataError(f"{path} is not a COCO JSON data list ({type(error).__name__}: {error})") from error

    @classmethod
    def from_coco(cls, path: Path, content: dict[str, Any], images: str | Path | None = None) -> "DataList":
        """Makes a data list from the content of a COCO file.

        Args:
            path: where the content is, for messages and for a relative `image_root`.
            content: with `images`, `annotations`, `categories` and `info`, as `create_data_lists.to_coco` makes it.
                Images and annotations may be iterators; PART annotations at a time are in memory.
            images: overrides info.image_root.

        Raises:
            DataError: an id is unknown or repeated, a box is empty or leaves its image, a name or id is unusable.
            Exception: KeyError, TypeError, ValueError and the like if the content has another form; load() turns
                them into a DataError.
        """
        for category in content["categories"]:
            if type(category["id"]) is not int or category["id"] < 0 or not isinstance(category["name"], str):
                raise DataError(f"{path}: category {category} must have an id, a whole number from 0, and a name")
        category_ids = tuple(category["id"] for category in content["categories"])
        label_of = {category_id: label for label, category_id in enumerate(category_ids, start=1)}
        image_ids, file_names, sizes, apply_exif = _image_columns(content["images"])
        row_of = {image_id: row for row, image_id in enumerate(image_ids)}
        if len(row_of) != len(image_ids) or len(label_of) != len(category_ids):
            raise DataError(f"{path} gives the same id to two images or categories")
        annotations = iter(content["annotations"])
        parts = iter(lambda: list(islice(annotations, PART)), [])
        columns = [_object_columns(path, part, row_of, label_of, sizes) for part in parts]
        columns = columns or [_object_columns(path, [], row_of, label_of, sizes)]
        rows = np.concatenate([part["rows"] for part in columns])
        order = np.argsort(rows, kind="stable")

        def column(name: str) -> np.ndarray:
            return np.concatenate([part.pop(name) for part in columns])[order]

        whole = all(isinstance(image_id, int) for image_id in image_ids)
        boxes, areas, truncated = column("boxes"), column("areas"), column("truncated")
        box_areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        areas = np.where(np.isnan(areas), box_areas, areas)
        return cls(
            path=str(path),
            # A relative image root is relative to the folder of the list.
            image_root=Path(images) if images else path.parent / content["info"].get("image_root", "."),
            classes=tuple(category["name"] for category in content["categories"]),
            category_ids=category_ids,
            file_names=file_names,
            image_ids=np.array(image_ids, dtype=np.int64) if whole else Strings.of(map(str, image_ids)),
            sizes=sizes,
            apply_exif=apply_exif,
            first=np.searchsorted(rows[order], np.arange(len(row_of) + 1)),
            boxes=boxes,
            labels=column("labels"),
            difficult=column("difficult"),
            crowd=column("crowd"),
            areas=None if np.allclose(areas, box_areas, rtol=1e-3) else areas,
            truncated=truncated if (truncated >= 0).any() else None,
        )

    def _write_arrays(self, arrays_file: Path, file_hash: str) -> None:
        root, beside = self.image_root, arrays_file.parent
        content = {"version": ARRAYS_VERSION, "file_hash": file_hash}
        content["image_root"] = str(root.relative_to(beside) if root.is_relative_to(beside) else root)
        content |= {"classes": list(self.classes), "category_ids": list(self.category_ids)}
        for name, value in vars(self).items():
            if isinstance(value, Strings):
                content |= {f"{name}.data": torch.tensor(value.data), f"{name}.ends": torch.tensor(value.ends)}
            elif isinstance(value, np.ndarray):
                content[name] = torch.from_numpy(value)
        with atomic_write(arrays_file) as temporary:
            torch.save(content, temporary)

    @classmethod
    def _from_arrays(cls, path: str | Path, images: str | Path | None, arrays_file: Path) -> "DataList":
        content = torch.load(arrays_file, mmap=True, weights_only=True)
        fields = {name: value for name, value in content.items() if not isinstance(value, torch.Tensor)}
        arrays = {name: value.numpy() for name, value in content.items() if isinstance(value, torch.Tensor)}
        for array in arrays.values():
            array.view(np.uint8).max(initial=0)  # one sequential pass now avoids random page faults later
        for name in ("file_names", "image_ids"):
            if f"{name}.data" in arrays:
                arrays[name] = Strings(arrays.pop(f"{name}.data"), arrays.pop(f"{name}.ends"))
        return cls(
            path=str(path),
            image_root=Path(images) if images else Path(path).parent / fields["image_root"],
            classes=tuple(fields["classes"]),
            category_ids=tuple(fields["category_ids"]),
            arrays_file=arrays_file,
            **arrays,
        )

    def __reduce_ex__(self, protocol):
        if self.arrays_file is None:
            return super().__reduce_ex__(protocol)
        # A spawned worker maps the same file: nothing is copied.
        return DataList._from_arrays, (self.path, self.image_root, self.arrays_file)


def _image_columns(images: Iterable[dict]) -> tuple[list, Strings, np.ndarray, np.ndarray]:
    """The images of a COCO file as columns: ids, file names, sizes (n, 2) int32 of height and width, apply_exif (n,).

    One pass, so that the dicts of an iterator, 230 MB for a million images, are not held together.
    """
    ids, names, sizes, flags = [], [], [], []
    for image in images:
        ids.append(image["id"])
        names.append(image["file_name"])
        sizes.append((image["height"], image["width"]))
        flags.append(bool(parse_flag(image.get("apply_exif"))))
    return ids, Strings.of(names), np.array(sizes, dtype=np.int32).reshape(-1, 2), np.array(flags, dtype=bool)


def _object_columns(
    path: Path, objects: list[dict], row_of: dict, label_of: dict, sizes: np.ndarray
) -> dict[str, np.ndarray]:
    """The annotations of a COCO file as arrays, in their order.

    Args:
        path: of the file, for messages.
        objects: the annotations.
        row_of: {image id: row}.
        label_of: {category id: label}.
        sizes: (images, 2), height and width.

    Raises:
        DataError: an id is unknown, or a box is empty or leaves its image.
    """
    for entry in objects:
        for key, known in (("image_id", row_of), ("category_id", label_of)):
            if entry[key] not in known:
                raise DataError(f"{path}: annotation {entry.get('id')} names {key} {entry[key]!r}, not in the file")
    rows = np.fromiter((row_of[entry["image_id"]] for entry in objects), np.int64, len(objects))
    boxes = np.array([entry["bbox"] for entry in objects], dtype=np.float32).reshape(len(objects), 4)
    boxes[:, 2:] += boxes[:, :2]
    limits = sizes[rows][:, [1, 0, 1, 0]]  # (n, 4): width, height, width, height
    # NaN counts as bad too. Rounding may add a hundredth of a pixel.
    good = (boxes >= -0.01).all(axis=1) & (boxes <= limits + 0.01).all(axis=1)
    bad = ~(good & (boxes[:, 2:] > boxes[:, :2]).all(axis=1))
    if bad.any():
        entry = objects[bad.argmax()]
        problem = f"annotation {entry.get('id')} has a box {entry['bbox']} that is empty or leaves its image"
        raise DataError(f"{path}: {problem}; create the list again")

    def column(values: Iterable, dtype: type) -> np.ndarray:
        return np.fromiter(values, dtype, len(objects))

    truncated = (parse_flag(entry.get("truncated")) for entry in objects)
    return {
        "rows": rows,
        "boxes": boxes,
        "areas": column((entry.get("area", np.nan) for entry in objects), np.float32),
        "labels": column((label_of[entry["category_id"]] for entry in objects), np.int32),
        "difficult": column((bool(parse_flag(entry.get("difficult"))) for entry in objects), bool),
        "crowd": column((bool(parse_flag(entry.get("iscrowd"))) for entry in objects), bool),
        "truncated": column((-1 if flag is None else flag for flag in truncated), np.int8),
    }


def _stored_hash(arrays_file: Path) -> str | None:
    """The hash of the JSON from which an arrays file was made; None if the file is missing or incomplete."""
    try:
        content = torch.load(arrays_file, mmap=True, weights_only=True)
        return content["file_hash"] if content["version"] == ARRAYS_VERSION else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, pickle.UnpicklingError):
        return None


def evenly_spaced(length, count):
    """At most `count` of the rows 0..length - 1, from the first to the last."""
    count = min(count, length)
    return [round(k * (length - 1) / max(count - 1, 1)) for k in range(count)]
