"""Reads video files and cameras frame by frame, and writes annotated ones as MP4.

Needs PyAV: pip install av. A camera is camera:0 (the first one); on macOS also camera:NAME with the name of a device,
on Windows only that.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from fpnssd.data.images import DataError
from utils import InputError, atomic_write

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"})
# What a camera's number means, and the format that FFmpeg reads it as.
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation"), "win32": ("video={}", "dshow")}
ENCODERS = ("libx264", "mpeg4")  # the first that PyAV was built with


def is_video(source: str) -> bool:
    """Whether an input is a camera, or a file whose name ends as a video's does."""
    return source.startswith("camera:") or Path(source).suffix.lower() in VIDEO_SUFFIXES


def import_av() -> ModuleType:
    """Imports PyAV; InputError says how to install it."""
    try:
        import av
    except ImportError:
        raise InputError("videos need PyAV: pip install av") from None
    return av


class Video:
    """An opened video file or camera, to be iterated over once: (frame, time) of each frame.

    A frame is an RGB PIL image, upright; its time is in units of time_base, and increases from frame to frame.

    Args:
        source: a file's path, or "camera:0".

    Attributes:
        num_frames: 0 if it is not known.
        rate: frames per second.
        time_base: seconds.

    Raises:
        DataError: if it cannot be opened; and while iterating, where it is damaged.
    """

    def __init__(self, source: str) -> None:
        av, self.source = import_av(), source
        path, options = source, {}
        if source.startswith("camera:"):
            name, kind = CAMERAS.get(sys.platform, CAMERAS["linux"])
            path, options = name.format(source.removeprefix("camera:")), {"format": kind}
        try:
            self._container = av.open(path, **options)
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, OSError) as error:
            raise DataError(f"video {source} cannot be opened: {error}") from error
        except IndexError:
            raise DataError(f"video {source} has no video stream") from None
        self._stream.thread_type = "AUTO"
        self.num_frames: int = self._stream.frames
        self.time_base: Fraction = self._stream.time_base
        self.rate: Fraction = self._stream.average_rate or Fraction(25)

    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        av = import_av()
        step = max(1, round(1 / (self.rate * self.time_base)))
        count, clock = 0, FrameClock(step, round(1 / self.time_base), self.source.startswith("camera:"))
        with self._container:
            try:
                for frame in self._container.decode(self._stream):
                    count += 1
                    image, time = frame.to_image(), clock.time_of(frame.pts)
                    yield (image.rotate(frame.rotation, expand=True) if frame.rotation else image), time
            except av.FFmpegError as error:
                raise DataError(f"video {self.source} is damaged after frame {count}: {error}") from error
        if not count:
            raise DataError(f"video {self.source} has no readable frame")


class FrameClock:
    """Times of frames that always grow, from timestamps that may be missing, out of order or start again.

    Args:
        step: usual time between two frames, in ticks.
        second: ticks of a second.
        from_zero: whether the first frame is at 0; cameras start at the uptime of the machine.
    """

    def __init__(self, step: int, second: int, from_zero: bool = False) -> None:
        self.step, self.second, self.from_zero = step, second, from_zero
        self.offset = self.former_offset = 0  # added to timestamps, and what it was before they started again
        self.time: int | None = None  # of the last frame

    def time_of(self, timestamp: int | None) -> int:
        """The time of the next frame."""
        before = self.time
        if before is None:
            self.offset = -(timestamp or 0) if self.from_zero else 0
            self.time = (timestamp or 0) + self.offset
        elif timestamp is None:  # in damaged and old files
            self.time = before + self.step
        else:
            former = timestamp + self.former_offset
            if timestamp + self.offset > before + self.second and before < former <= before + self.second:
                self.offset = self.former_offset  # it was one bad timestamp, and no new start
            elif timestamp + self.offset < before - self.second:  # they start again, as where two files were joined
                self.former_offset, self.offset = self.offset, before + self.step - timestamp
            self.time = max(timestamp + self.offset, before + 1)
        return self.time


@contextlib.contextmanager
def write_video(path: Path, like: Video) -> Iterator[Callable[[Image.Image, int], None]]:
    """A context manager that yields a function(image, time), which adds a frame to an MP4 file.

    The complete file appears when the block ends; there is none if the block raises or adds no frame.

    Args:
        path: the file to write.
        like: gives the frame rate, and the unit of the times.

    Raises:
        DataError: if FFmpeg cannot write it.
    """
    av = import_av()
    container: Any = None
    stream: Any = None
    with contextlib.ExitStack() as stack:

        def write(image: Image.Image, time: int) -> None:
            nonlocal container, stream
            width, height = (side // 2 * 2 for side in image.size)  # encoders need even sides
            if container is None:
                temporary = stack.enter_context(atomic_write(path, "video"))
                container = stack.enter_context(av.open(temporary, "w", format="mp4"))
                stream = _add_stream(container, width, height, like)
            frame = av.VideoFrame.from_image(image.crop((0, 0, width, height)))
            frame.pts, frame.time_base = time, like.time_base
            container.mux(stream.encode(frame))

        try:
            yield write
            if container is not None:
                container.mux(stream.encode())
                container.close()
        except av.FFmpegError as error:
            raise DataError(f"video {path} cannot be written: {error}") from error


def _add_stream(container: Any, width: int, height: int, like: Video) -> Any:
    encoder = next(name for name in ENCODERS if name in import_av().codecs_available)
    stream = container.add_stream(encoder, rate=like.rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.codec_context.time_base = like.time_base
    return stream
