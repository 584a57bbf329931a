"""A web page to try a detector in a browser, and an HTTP endpoint that returns JSON. Needs the extra `app`.

    python app.py --checkpoint runs/lite/best.pth.tar        # http://127.0.0.1:7860
    curl --data-binary @photo.jpg "http://127.0.0.1:7860/detect?min_score=0.3"

Only this machine can reach it unless --host says otherwise, and neither the page nor the server fetches anything from
elsewhere. Moving a slider does not run the network again: the outputs for the latest pictures are kept.

    GET  /                              the page (fpnssd/inference/page.html, .css, .js)
    POST /detect                        picture as the body -> detections as JSON; nothing is kept
    POST /pictures                      the same, and the outputs are kept under a random id, for:
    GET  /pictures/ID/detections.json   decoded again with other thresholds
    GET  /pictures/ID/annotated.jpg     the picture with its detections drawn, at full size
    GET  /pictures/ID/preview.jpg       the picture alone, small
    GET  /about.json, /examples/NUMBER  the initial content of the page

Requests that return detections take min_score, max_overlap, top_k and suppress (class names, with commas between).
Errors are {"error": message} with a 4xx status.
"""

import argparse
import io
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image

try:
    import anyio
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import FileResponse, JSONResponse, Response
    from starlette.routing import Route

    from fpnssd.inference.http_server import Bodies, Guard, Kept, Unread, listen, make_server
except ImportError as error:
    sys.exit(f"app: {error.name} is not installed: pip install -e '.[app]'")

from fpnssd.data.images import MAX_PIXELS, load_image
from fpnssd.inference.detector import RUNTIMES, Detections, Detector, load_detector
from fpnssd.inference.draw import annotate, class_colour
from model import DEFAULT_CHECKPOINT, DETECTION
from utils import HelpFormatter, InputError, error_message, whole_number

PAGE_FILES = Path(__file__).parent / "fpnssd" / "inference"
PREVIEW_SIDE = 1280  # longer side of the picture on the page, in pixels
JPEG_SIDE = 65_500  # longest side of a JPEG file
NAME_LENGTH = 255  # characters kept of an upload's name
MAX_TOP_K = 1000
OWN_NAMES = ("localhost", "127.0.0.1", "[::1]")
THRESHOLDS = {  # name: (type, default, least, most)
    "min_score": (float, DETECTION.min_score, 0, 1),
    "max_overlap": (float, DETECTION.max_overlap, 0, 1),
    "top_k": (int, DETECTION.top_k, 1, MAX_TOP_K),
}


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may send, and on the memory and time that they get."""

    file_bytes: int = 20 * 10**6  # of one picture
    pixels: int = 50 * 10**6  # of one picture
    decoding_bytes: int = 270 * 10**6  # memory to decode one picture, 5.4 a pixel: some formats need more
    at_once: int = 2  # pictures decoded at a time: the network runs on one while another is read
    bodies: int = 64  # requests whose body is in memory
    body_seconds: float = 30.0  # in which a body has to arrive
    kept_bytes: int = 256 * 2**20  # of pictures and outputs kept for the page
    unread_bytes: int = 256 * 2**20  # of annotated pictures that clients have not read yet


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        listener = listen(args.host, args.port)
        detector = load_detector(args.checkpoint, args.device, args.runtime, args.precision)
    except (InputError, OSError) as error:
        sys.exit(f"app: {error_message(error)}")
    limits = limits_of(args)
    app = build_app(Service(detector, limits), [*OWN_NAMES, args.host, *args.allowed_host])
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"http://{host}:{listener.getsockname()[1]} (Ctrl-C to stop)", flush=True)
    make_server(app).run(sockets=[listener])


def limits_of(args: argparse.Namespace) -> Limits:
    """The limits of a command line; memory for decoding grows with the pixels that JPEG files may have."""
    pixels = args.max_megapixels * 10**6
    return Limits(args.max_mb * 10**6, pixels, decoding_bytes=max(Limits.decoding_bytes, int(5.4 * pixels)))


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="checkpoint, or exported .onnx or .xml file")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 admits other machines, without a password")
    parser.add_argument("--port", type=whole_number(0), default=7860, help="0 chooses a free port")
    parser.add_argument(
        "--allowed-host", metavar="NAME", nargs="+", default=[],
        help="host names or addresses that browsers use besides --host: of this machine or a proxy",
    )  # fmt: skip
    parser.add_argument(
        "--max-mb", type=whole_number(1), default=20, help="largest file accepted, in millions of bytes"
    )
    parser.add_argument("--max-megapixels", type=whole_number(1), default=50, help="largest picture accepted")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    parser.add_argument("--runtime", default="auto", choices=RUNTIMES, help="onnx and openvino need an exported file")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    args = parser.parse_args(argv)
    if args.max_megapixels * 10**6 > MAX_PIXELS:
        parser.error(f"--max-megapixels can be {MAX_PIXELS // 10**6} at most")
    return args


def build_app(service: "Service", names: Sequence[str] = OWN_NAMES) -> Guard:
    """The ASGI application, which answers to these host names."""
    routes = [
        file_route("/", PAGE_FILES / "page.html"),
        file_route("/page.css", PAGE_FILES / "page.css"),
        file_route("/page.js", PAGE_FILES / "page.js"),
        *(file_route(f"/examples/{number}", path) for number, path in enumerate(service.examples)),
        Route("/about.json", service.about),
        Route("/detect", service.detect, methods=["POST"]),
        Route("/pictures", service.add_picture, methods=["POST"]),
        Route("/pictures/{id}/detections.json", service.detections),
        Route("/pictures/{id}/annotated.jpg", service.annotated),
        Route("/pictures/{id}/preview.jpg", service.preview),
    ]
    errors: dict[Any, Callable[[Request, Any], Response]] = {
        InputError: lambda _, error: JSONResponse({"error": error_message(error)}, 400),
        HTTPException: lambda _, error: JSONResponse({"error": error.detail}, error.status_code, error.headers),
        MemoryError: lambda *_: JSONResponse({"error": "not enough memory for this picture"}, 503),
        ClientDisconnect: lambda *_: Response(status_code=400),  # the client does not receive it
    }
    return Guard(Starlette(routes=routes, exception_handlers=errors), names)


@dataclass
class Outputs:
    """A picture as it was sent, a smaller copy, and the network's outputs for it."""

    name: str
    data: bytes
    preview: bytes  # JPEG
    size: tuple[int, int]  # (height, width)
    offsets: torch.Tensor  # (1, P, 4)
    logits: torch.Tensor  # (1, P, C + 1)
    seconds: float  # for reading the picture and running the network

    @property
    def num_bytes(self) -> int:
        return len(self.data) + len(self.preview) + self.offsets.nbytes + self.logits.nbytes


class Service:
    """The routes of the application and what they share; the methods that are not async run in threads."""

    def __init__(self, detector: Detector, limits: Limits):
        self.detector, self.limits = detector, limits
        self.kept: Kept[Outputs] = Kept(limits.kept_bytes)
        self.bodies = Bodies(limits.file_bytes, limits.bodies, limits.body_seconds)
        self.unread = Unread(limits.unread_bytes)
        self.limiter = anyio.CapacityLimiter(limits.at_once)
        self.examples = example_pictures()

    def run_network(self, data: bytes, name: str) -> Outputs:
        start = time.perf_counter()
        picture = load_image(data, name or "that was sent", self.limits.pixels, self.limits.decoding_bytes)
        offsets, logits = self.detector.run_network([picture])
        seconds, size = time.perf_counter() - start, (picture.height, picture.width)
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        return Outputs(name, data, to_jpeg(picture, 88), size, offsets.cpu(), logits.cpu(), seconds)

    def decode(self, outputs: Outputs, thresholds: dict[str, Any]) -> Detections:
        image = {"sizes": [outputs.size], "sources": [outputs.name]}
        (detections,) = self.detector.postprocess(outputs.offsets, outputs.logits, **image, **thresholds)
        return detections

    def draw(self, outputs: Outputs, thresholds: dict[str, Any]) -> bytes:
        picture = load_image(outputs.data, outputs.name, self.limits.pixels, self.limits.decoding_bytes)
        return to_jpeg(annotate(picture, self.decode(outputs, thresholds)), 92)

    async def in_thread(self, request: Request, function: Callable[..., Any], *args: Any) -> Any:
        """function(*args) off the event loop, for `limits.at_once` requests at a time."""
        async with self.limiter:
            if await request.is_disconnected():
                raise ClientDisconnect
            return await anyio.to_thread.run_sync(function, *args)

    async def receive_picture(self, request: Request, name: str, thresholds: dict[str, Any]) -> tuple[Outputs, dict]:
        """The outputs for the picture in a request's body, and its detections for JSON."""
        async with self.bodies.receive(request) as data:
            outputs = await self.in_thread(request, self.run_network, data, name)
        return outputs, (await self.in_thread(request, self.decode, outputs, thresholds)).to_dict()

    async def about(self, request: Request) -> Response:
        config, info = self.detector.config, self.detector.info
        run = f"{info['runtime']} on {info['device']}, {info['precision']}"
        content: dict[str, Any] = {name: default for name, (_, default, _, _) in THRESHOLDS.items()}
        content["model"] = f"{Path(info['source']).name}: {config.backbone}, {config.image_size} px, {run}"
        content["classes"] = [
            {"name": name, "colour": class_colour(k)} for k, name in enumerate(config.classes, start=1)
        ]
        content["examples"] = [path.name for path in self.examples]
        content["max_bytes"] = self.limits.file_bytes
        return JSONResponse(content)

    async def detect(self, request: Request) -> Response:
        _, detections = await self.receive_picture(request, "", self.thresholds_of(request))
        return JSONResponse(detections)

    async def add_picture(self, request: Request) -> Response:
        name = request.query_params.get("name", "picture")[:NAME_LENGTH]
        outputs, detections = await self.receive_picture(request, name, self.thresholds_of(request, "name"))
        return JSONResponse({"id": self.kept.add(outputs), "seconds": outputs.seconds, **detections}, 201)

    async def detections(self, request: Request) -> Response:
        thresholds, outputs = self.thresholds_of(request), self.kept.get(request.path_params["id"])
        return JSONResponse((await self.in_thread(request, self.decode, outputs, thresholds)).to_dict())

    async def annotated(self, request: Request) -> Response:
        thresholds, outputs = self.thresholds_of(request), self.kept.get(request.path_params["id"])
        return self.unread.response(await self.in_thread(request, self.draw, outputs, thresholds), "image/jpeg")

    async def preview(self, request: Request) -> Response:
        return Response(self.kept.get(request.path_params["id"]).preview, media_type="image/jpeg")

    def thresholds_of(self, request: Request, *others: str) -> dict[str, Any]:
        """Arguments for `decode` from a query; InputError for what is out of bounds or unknown."""
        query, thresholds = request.query_params, {}
        if unknown := sorted(set(query) - {*THRESHOLDS, "suppress", *others}):
            raise InputError(f"unknown parameter {unknown[0][:40]!r}; known are {', '.join([*THRESHOLDS, 'suppress'])}")
        for name, (kind, default, least, most) in THRESHOLDS.items():
            try:
                value = thresholds[name] = kind(query.get(name, default))
            except ValueError:
                raise InputError(f"{name} is {query[name][:40]!r}; it must be a number in {least}..{most}") from None
            if not least <= value <= most:
                raise InputError(f"{name} is {value}; it must lie in {least}..{most}")
        classes = self.detector.classes
        texts = query.getlist("suppress")  # each a class, whose name may have commas, or several with commas between
        names = [name for text in texts for name in ([text] if text in classes else text.split(",")) if name]
        if unknown := [name[:40] for name in names if name not in classes]:
            raise InputError(f"cannot suppress {unknown[0]}: the classes are {', '.join(classes)}")
        return {**thresholds, "suppress": names}


def file_route(address: str, path: Path) -> Route:
    return Route(address, lambda _: FileResponse(path))


def to_jpeg(picture: Image.Image, quality: int) -> bytes:
    """An RGB image as a JPEG file; the image is shrunk in place if it is longer than such files can be."""
    stream = io.BytesIO()
    picture.thumbnail((JPEG_SIDE, JPEG_SIDE))
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def example_pictures() -> list[Path]:
    """Photographs under free licences from scikit-image, if it is installed."""
    spec = find_spec("skimage")
    folder = Path(spec.origin).parent / "data" if spec and spec.origin else Path()
    return [folder / name for name in ("astronaut.png", "chelsea.png", "coffee.png") if (folder / name).is_file()]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C acts as SIGTERM does: no traceback, no slow teardown
    main()
