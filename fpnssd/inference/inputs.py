"""The inputs of detect.py: images, folders, globs, videos, cameras and standard input."""

import glob
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from PIL import Image

from fpnssd.data.images import IMAGE_SUFFIXES, find_images, load_image
from fpnssd.inference.video import VIDEO_SUFFIXES, is_video
from utils import InputError


@dataclass(frozen=True)
class Source:
    """An input of the command line, and the name of what is written for it."""

    path: str  # a file, "camera:0", or "-"
    name: PurePath  # below each output folder; unique even without its ending
    number: int  # position among the inputs, from 1

    @property
    def is_video(self) -> bool:
        return is_video(self.path)

    def load(self) -> Image.Image:
        """The image as RGB, upright."""
        return load_image(sys.stdin.buffer.read(), "standard input") if self.path == "-" else load_image(self.path)


def find_sources(arguments: Sequence[str], output_folders: Sequence[Path] = ()) -> list[Source]:
    """Expands the command line's inputs.

    Args:
        arguments: images, videos, cameras and "-"; folders, searched recursively for images and videos; globs.
        output_folders: folders whose content is skipped if they are inside a folder that is searched.

    Returns:
        The inputs in the order given, folders sorted. Names of those from folders keep the subfolders.

    Raises:
        InputError: for a folder or glob without images.
    """
    used_names: set[str] = set()
    sources: list[Source] = []
    for argument in arguments:
        for path, name in _expand(argument, output_folders):
            if is_video(path):
                name = name.with_name(f"{name.stem}.mp4")
            unused = unused_name(name, used_names)
            used_names.add(str(unused.with_suffix("")).casefold())
            sources.append(Source(path, unused, len(sources) + 1))
    return sources


def _expand(argument: str, output_folders: Sequence[Path]) -> Iterator[tuple[str, PurePath]]:
    """(path, name) of each input that an argument stands for."""
    if argument == "-":
        yield argument, PurePath("stdin.jpg")
    elif Path(argument).is_dir():
        for path in _images_inside(argument, output_folders):
            yield str(path), path.relative_to(argument)
    elif not Path(argument).exists() and glob.has_magic(argument):
        matching = [match for match in sorted(glob.glob(argument, recursive=True)) if not Path(match).is_dir()]
        if not matching:
            raise InputError(f"nothing matches {argument!r}")
        for match in matching:
            yield match, PurePath(PurePath(match).name)
    else:
        yield argument, PurePath(PurePath(argument).name.replace(":", ""))


def _images_inside(folder: str, output_folders: Sequence[Path]) -> list[Path]:
    """The images and videos in a folder and its subfolders; prints the numbers of skipped files to stderr."""
    paths, skipped = find_images(folder, IMAGE_SUFFIXES | VIDEO_SUFFIXES)
    inside = Path(folder).resolve()
    for output in {path.resolve() for path in output_folders}:
        if inside in output.parents:  # what an earlier run wrote
            kept = [path for path in paths if output not in path.resolve().parents]
            skipped[f"in {output.name}"] += len(paths) - len(kept)
            paths = kept
    others = ", ".join(f"{count} {ending}" for ending, count in sorted((+skipped).items()))
    if not paths:
        raise InputError(f"folder {folder} has no image or video" + (f" (skipped: {others})" if others else ""))
    if others:
        print(f"detect: {folder}: skipped {others}", file=sys.stderr)
    return paths


def unused_name(name: PurePath, used_names: set[str]) -> PurePath:
    """The name, with a number if another input has it already. Endings are not compared, as each kind of output has its
    own, nor is case, as some file systems do not distinguish a.jpg and A.JPG."""
    number, numbered = 1, name
    while str(numbered.with_suffix("")).casefold() in used_names:
        number += 1
        numbered = name.with_name(f"{name.stem}_{number}{name.suffix}")
    return numbered
