"""Video files and cameras as pictures, one after the other, and annotated ones as a video file again.

Needs PyAV: pip install av. A camera is camera:0 (the first one); on macOS also camera: and a device's name, on Windows
only that.
"""

import contextlib
import sys
from fractions import Fraction
from pathlib import Path

from fpnssd.data.images import DataError
from utils import InputError, atomic_write

SUFFIXES = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}
# What a camera's number means, and the format that FFmpeg reads it as.
CAMERAS = {"linux": ("/dev/video{}", "v4l2"), "darwin": ("{}", "avfoundation"), "win32": ("video={}", "dshow")}
ENCODERS = ("libx264", "mpeg4")  # the first that PyAV was built with


def is_video(source):
    return source.startswith("camera:") or Path(source).suffix.lower() in SUFFIXES


def need_av():
    try:
        import av
    except ImportError:
        raise InputError("videos need PyAV: pip install av") from None
    return av


class Video:
    """An opened video: num_frames (0 if it is not known), rate and time_base, and its frames to iterate over once."""

    def __init__(self, source):
        av, self.source = need_av(), source
        path, options = source, {}
        if source.startswith("camera:"):
            name, kind = CAMERAS[sys.platform]
            path, options = name.format(source.removeprefix("camera:")), {"format": kind}
        try:
            self._container = av.open(path, **options)
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, OSError) as error:
            raise DataError(f"video {source} cannot be opened: {error}") from error
        except IndexError:
            raise DataError(f"video {source} has no pictures in it") from None
        self._stream.thread_type = "AUTO"
        self.num_frames, self.time_base = self._stream.frames, self._stream.time_base
        self.rate = self._stream.average_rate or Fraction(25)

    def __iter__(self):
        """(RGB PIL image, upright; its time in units of time_base, ever later); DataError where the file is damaged."""
        av, count, time = need_av(), 0, None
        step = max(1, round(1 / (self.rate * self.time_base)))
        with self._container:
            try:
                for frame in self._container.decode(self._stream):
                    count += 1
                    picture, before = frame.to_image(), time
                    time = frame.pts  # which damaged and old files leave out, or give out of order
                    if before is not None and (time is None or time <= before):
                        time = before + (step if time is None else 1)
                    time = time or 0
                    yield (picture.rotate(frame.rotation, expand=True) if frame.rotation else picture), time
            except av.FFmpegError as error:
                raise DataError(f"video {self.source} is damaged after frame {count}: {error}") from error


@contextlib.contextmanager
def written_video(path, like):
    """For a with block: a function(picture, time) that adds a frame to the file, at the times of the Video `like`.

    The file is there, whole, when the block ends well; DataError if no frame came, or FFmpeg cannot write it.
    """
    av, container, stream = need_av(), None, None
    with atomic_write(path) as temporary, contextlib.ExitStack() as stack:

        def write(picture, time):
            nonlocal container, stream
            width, height = (side // 2 * 2 for side in picture.size)  # what the encoders take
            if container is None:
                container = stack.enter_context(av.open(temporary, "w", format="mp4"))
                encoder = next(name for name in ENCODERS if name in av.codecs_available)
                stream = container.add_stream(encoder, rate=like.rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = like.time_base
            frame = av.VideoFrame.from_image(picture.crop((0, 0, width, height)))
            frame.pts, frame.time_base = time, like.time_base
            container.mux(stream.encode(frame))

        try:
            yield write
            if container is None:
                raise DataError(f"video {like.source} has no picture that can be read")
            container.mux(stream.encode())
            container.close()
        except av.FFmpegError as error:
            raise DataError(f"video {path} cannot be written: {error}") from error
