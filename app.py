"""A web page to try a detector on, and an HTTP endpoint that answers with JSON. Needs requirements-app.txt.

    python app.py --checkpoint runs/lite/best.pth.tar        # http://127.0.0.1:7860
    curl --data-binary @photo.jpg "http://127.0.0.1:7860/detect?min_score=0.3"

Only this machine can reach it unless --host says otherwise, and neither the page nor the server asks anybody else for
anything. Turning the knobs of decoding does not ask the network again: what it said of the latest pictures is kept.
"""

import argparse
import io
import secrets
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass

import anyio
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from fpnssd.data.images import MAX_PIXELS, DataError, load_image
from fpnssd.inference.detector import MIN_SCORE, RUNTIMES, load_detector
from fpnssd.inference.draw import annotate
from fpnssd.inference.page import mount_page
from model import DEFAULT_CHECKPOINT
from utils import InputError, error_message, whole_number

PREVIEW_SIDE = 1280  # longer side of the picture on the page, in pixels
KEPT_BYTES = 256 * 2**20  # of pictures and answers, so that knobs can be turned
# Nothing from anywhere else; the page's own scripts are inline, and make functions of templates.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'self'"


def main(argv=None):
    args = parse_args(argv)
    try:
        detector = load_detector(args.checkpoint, args.device, args.runtime, args.precision)
    except (InputError, OSError) as error:
        sys.exit(f"app: {error_message(error)}")
    app = build_app(detector, Limits(args.max_mb * 10**6, args.max_megapixels * 10**6))
    print(f"http://{args.host}:{args.port} (Ctrl-C ends it)", flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="or an exported .onnx or .xml file")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; there is no password")
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--max-mb", type=whole_number(1), default=20, help="largest file taken, in millions of bytes")
    parser.add_argument("--max-megapixels", type=whole_number(1), default=50, help="largest picture taken")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--runtime", default="auto", choices=RUNTIMES)
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    args = parser.parse_args(argv)
    if args.max_megapixels * 10**6 > MAX_PIXELS:
        parser.error(f"--max-megapixels can be {MAX_PIXELS // 10**6} at most")
    return args


@dataclass(frozen=True)
class Limits:
    """What is refused before it is decoded, and how many pictures are worked on at a time."""

    file_bytes: int = 20 * 10**6
    pixels: int = 50 * 10**6
    at_once: int = 2  # one is decoded while the network looks at another


def build_app(detector, limits=Limits()):  # noqa: B008 (frozen)
    """The ASGI application: POST /detect, the page at /, and the files that the page links to."""
    app = FastAPI(title="FPN-SSD", openapi_url=None)
    answers, limiter = Answers(detector, limits), anyio.CapacityLimiter(limits.at_once)
    add_endpoint(app, answers, limiter)
    add_files(app, answers, limiter)
    mount_page(app, answers)
    app.add_middleware(OwnSourcesOnly)
    return app


class OwnSourcesOnly:
    """Tells browsers to fetch nothing for this page from elsewhere."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)


# ---------------------------------------------------------------------------------------------------------------------
# Answers that are kept


@dataclass
class Answer:
    """A picture as it came, a smaller copy for the page, and what the network said of it."""

    name: str
    data: bytes
    preview: bytes  # JPEG
    size: tuple  # (height, width)
    offsets: torch.Tensor  # (1, P, 4)
    logits: torch.Tensor  # (1, P, C + 1)
    seconds: float  # that it took

    @property
    def num_bytes(self):
        return len(self.data) + len(self.preview) + self.offsets.nbytes + self.logits.nbytes


class Answers:
    """Asks a detector, and keeps its latest answers up to KEPT_BYTES; safe for threads."""

    def __init__(self, detector, limits):
        self.detector, self.limits = detector, limits
        self._kept, self._lock = OrderedDict(), threading.Lock()

    def add(self, data, name):
        """The key of the answer to a picture in bytes."""
        begun = time.perf_counter()
        picture = self.read(data, name)
        offsets, logits = self.detector.look([picture])
        seconds, small, stream = time.perf_counter() - begun, picture.copy(), io.BytesIO()
        small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        small.save(stream, "JPEG", quality=88)
        answer = Answer(
            name, data, stream.getvalue(), (picture.height, picture.width), offsets.cpu(), logits.cpu(), seconds
        )
        key = secrets.token_urlsafe(16)  # pictures are for those who sent them
        with self._lock:
            self._kept[key] = answer
            while sum(one.num_bytes for one in self._kept.values()) > KEPT_BYTES and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return key

    def read(self, data, name):
        """A picture in bytes as an upright RGB image, if it is within the limits."""
        if len(data) > self.limits.file_bytes:
            raise DataError(
                f"{name} has {len(data) / 1e6:.1f} MB; at most {self.limits.file_bytes / 1e6:.0f} are taken"
            )
        return load_image(data, name, self.limits.pixels)

    def get(self, key):
        with self._lock:
            if key not in self._kept:
                raise DataError("this picture is no longer kept: send it again")
            self._kept.move_to_end(key)
            return self._kept[key]

    def decode(self, answer, min_score, max_overlap, top_k):
        """Detections of an Answer."""
        knobs = {"min_score": float(min_score), "max_overlap": float(max_overlap), "top_k": int(top_k)}
        (found,) = self.detector.decode(answer.offsets, answer.logits, [answer.size], [answer.name], **knobs)
        return found


# ---------------------------------------------------------------------------------------------------------------------
# HTTP


def add_endpoint(app, answers, limiter):
    def ask(data, knobs, suppress):
        picture = answers.read(data, "that was sent")
        return answers.detector.predict(picture, **knobs, suppress=suppress).to_dict()

    @app.post("/detect")
    async def detect(
        request: Request, min_score: float = MIN_SCORE, max_overlap: float = 0.5, top_k: int = 200, suppress: str = ""
    ):
        """A picture as the body; suppress: names of classes to leave out, with commas between."""
        try:
            check_kind(request.headers.get("content-type", ""))
            data = await read_body(request, answers.limits.file_bytes)
            knobs = {"min_score": min_score, "max_overlap": max_overlap, "top_k": top_k}
            names = [name for name in suppress.split(",") if name]
            return JSONResponse(await anyio.to_thread.run_sync(ask, data, knobs, names, limiter=limiter))
        except InputError as error:
            status = 413 if isinstance(error, TooLarge) else 400
            return JSONResponse({"error": error_message(error)}, status)


class TooLarge(InputError):
    """A body beyond the limit."""


def check_kind(content_type):
    if content_type.startswith("multipart/"):
        raise InputError("send the picture alone as the body (curl --data-binary @photo.jpg), not as a form")


async def read_body(request, most):
    """The bytes of a request; TooLarge as soon as there are more than `most`."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise TooLarge(f"the picture has more than the {most / 1e6:.0f} MB that are taken")
    if not data:
        raise InputError("the body is empty: POST a picture, as curl --data-binary @photo.jpg does")
    return bytes(data)


def add_files(app, answers, limiter):
    """What the page shows and lets download."""

    def answered(make):
        try:
            return make()
        except InputError as error:
            return JSONResponse({"error": error_message(error)}, 404)

    @app.get("/answers/{key}/preview.jpg")
    def preview(key: str):
        return answered(lambda: Response(answers.get(key).preview, media_type="image/jpeg"))

    @app.get("/answers/{key}/detections.json")
    def detections(key: str, min_score: float, max_overlap: float, top_k: int):
        return answered(lambda: JSONResponse(answers.decode(answers.get(key), min_score, max_overlap, top_k).to_dict()))

    @app.get("/answers/{key}/annotated.jpg")
    async def annotated(key: str, min_score: float, max_overlap: float, top_k: int):
        def make():
            answer, stream = answers.get(key), io.BytesIO()
            picture = annotate(load_image(answer.data), answers.decode(answer, min_score, max_overlap, top_k))
            picture.save(stream, "JPEG", quality=92)
            return Response(stream.getvalue(), media_type="image/jpeg")

        return await anyio.to_thread.run_sync(answered, make, limiter=limiter)


if __name__ == "__main__":
    main()
