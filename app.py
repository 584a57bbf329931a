"""A web page to try a detector on, and an HTTP endpoint that answers with JSON. Needs requirements-app.txt.

    python app.py --checkpoint runs/lite/best.pth.tar        # http://127.0.0.1:7860
    curl --data-binary @photo.jpg "http://127.0.0.1:7860/detect?min_score=0.3"

Only this machine can reach it unless --host says otherwise, and neither the page nor the server asks anybody else for
anything. Turning the knobs of decoding does not ask the network again: what it said of the latest pictures is kept.
"""

import argparse
import html
import io
import math
import os
import secrets
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

import anyio
import gradio as gr
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from gradio.utils import get_upload_folder

from detector import MIN_SCORE, RUNTIMES, as_image, load_detector
from draw import annotate
from images import MAX_PIXELS, DataError
from model import DEFAULT_CHECKPOINT
from utils import InputError, class_colour, explain, whole_number

PREVIEW_SIDE = 1280  # longer side of the picture on the page, in pixels
KEPT_BYTES = 256 * 2**20  # of pictures and answers, so that knobs can be turned
AT_ONCE = 2  # pictures: one is decoded while the network looks at another
KEEP_UPLOADS = 3600  # seconds
# Nothing from anywhere else; the page's own scripts are inline, and make functions of templates.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; frame-ancestors 'self'"


def main(argv=None):
    args = parse_args(argv)
    try:
        detector = load_detector(args.checkpoint, args.device, args.runtime, args.precision, pictures=math.inf)
    except (InputError, OSError) as error:
        sys.exit(f"app: {explain(error)}")
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
    """What is refused before it is decoded."""

    file_bytes: int = 20 * 10**6
    pixels: int = 50 * 10**6


def build_app(detector, limits=Limits()):  # noqa: B008 (frozen)
    """The ASGI application: POST /detect, the page at /, and the files that the page links to."""
    app = FastAPI(title="FPN-SSD", openapi_url=None)
    answers = Answers(detector, limits)
    add_endpoint(app, answers)
    add_files(app, answers)
    page = build_page(answers)
    gr.mount_gradio_app(
        app, page, path="/", show_error=True, max_file_size=limits.file_bytes, footer_links=[], ssr_mode=False,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]), css=CSS,
    )  # fmt: skip
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
        return as_image(data, name, self.limits.pixels)

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


def add_endpoint(app, answers):
    limiter = anyio.CapacityLimiter(AT_ONCE)

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
            return JSONResponse({"error": explain(error)}, status)


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


def add_files(app, answers):
    """What the page shows and lets download."""

    def answered(make):
        try:
            return make()
        except InputError as error:
            return JSONResponse({"error": explain(error)}, 404)

    @app.get("/answers/{key}/preview.jpg")
    def preview(key: str):
        return answered(lambda: Response(answers.get(key).preview, media_type="image/jpeg"))

    @app.get("/answers/{key}/detections.json")
    def detections(key: str, min_score: float, max_overlap: float, top_k: int):
        return answered(lambda: JSONResponse(answers.decode(answers.get(key), min_score, max_overlap, top_k).to_dict()))

    @app.get("/answers/{key}/annotated.jpg")
    def annotated(key: str, min_score: float, max_overlap: float, top_k: int):
        def make():
            answer, stream = answers.get(key), io.BytesIO()
            picture = annotate(as_image(answer.data), answers.decode(answer, min_score, max_overlap, top_k))
            picture.save(stream, "JPEG", quality=92)
            return Response(stream.getvalue(), media_type="image/jpeg")

        return answered(make)


# ---------------------------------------------------------------------------------------------------------------------
# The page

CSS = """
.fpnssd .stage { position: relative; line-height: 0; overflow: hidden; max-width: 100%; display: inline-block }
.fpnssd .stage img { max-width: 100%; max-height: 75vh; height: auto; display: block }
.fpnssd .box { position: absolute; border: 2px solid var(--c); box-sizing: border-box; border-radius: 2px }
.fpnssd .box b { position: absolute; left: 0; top: 0; font: 600 12px/16px system-ui, sans-serif; padding: 0 4px;
  background: var(--c); color: var(--t); white-space: nowrap; pointer-events: none }
.fpnssd .box.right b { left: auto; right: 0 }
.fpnssd .lit.box { border-width: 4px; background: color-mix(in srgb, var(--c) 30%, transparent); z-index: 2 }
.fpnssd .stage:has(.lit) .box:not(.lit) { opacity: .35 }
.fpnssd table { border-collapse: collapse; width: 100%; font-size: 14px }
.fpnssd caption { caption-side: bottom; text-align: left; padding: 4px 8px; font-size: 12px; opacity: .7 }
.fpnssd p { margin: 8px 0 }
.fpnssd th, .fpnssd td { text-align: left; padding: 4px 8px; border-bottom: 1px solid var(--border-color-primary) }
.fpnssd td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.fpnssd tr.lit td { background: color-mix(in srgb, var(--c) 30%, transparent) }
.fpnssd tr:focus-visible { outline: 3px solid var(--c); outline-offset: -3px }
.fpnssd .swatch { display: inline-block; width: 12px; height: 12px; background: var(--c); margin-right: 6px }
.fpnssd .links a { margin-right: 16px; text-decoration: underline }
.fpnssd .refused { padding: 12px; border: 2px solid #b91c1c; border-radius: 6px }
"""

KNOBS = (  # name, (least, most, at first), step, what it does
    ("min_score", (0.01, 1, MIN_SCORE), 0.01, "what scores more than this is shown"),
    ("max_overlap", (0, 1, 0.5), 0.01, "a box goes if its IoU with a better one of its class is above this"),
    ("top_k", (1, 200, 200), 1, "at most so many objects"),
)

INVITATION = "<p>Choose a picture, paste one, take one with the camera, or try an example.</p>"

# Box and row of one number light up together, under the pointer and under the keyboard's focus.
LIGHT_UP = """
function light(event) {
  const on = event.target.closest && event.target.closest('[data-n]');
  const number = on && (event.type === 'mouseover' || event.type === 'focusin') ? on.dataset.n : null;
  document.querySelectorAll('.fpnssd [data-n]').forEach(one => one.classList.toggle('lit', one.dataset.n === number));
}
['mouseover', 'mouseout', 'focusin', 'focusout'].forEach(kind => element.addEventListener(kind, light));
"""


def check_upload(path):
    """gr.Error unless the path that a client gives is that of an upload: gradio takes its word for it where a page is
    mounted, and would open any file of this machine."""
    if not Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise gr.Error("this is no upload: send the picture itself")


async def stay_where_it_is(path):
    """In place of gradio's way of a file into its cache, where uploads are already; it would fetch addresses too."""
    check_upload(path)
    return path


def as_it_came(payload):
    """(path, name) of an upload: in place of gr.Image's own look at it, as ours keeps to the limits and says why."""
    if payload is None:
        return None
    check_upload(payload.path)
    return payload.path, payload.orig_name or Path(payload.path).name


def build_page(answers):
    """The gradio page."""

    def look_at_upload(upload, *knobs):
        return ("", INVITATION, "") if upload is None else look(*upload, *knobs)

    def look_at_example(number, *knobs):
        return look(examples[number], examples[number].name, *knobs)

    def look(path, name, *knobs):
        try:
            key = answers.add(Path(path).read_bytes(), name)
        except (InputError, OSError) as error:
            return "", refusal(error), ""
        return key, *show(key, *knobs)

    def show(key, *knobs):
        """The same answer under other knobs: nothing runs but decoding."""
        if not key:
            return gr.skip(), gr.skip()
        try:
            answer = answers.get(key)
            found = answers.decode(answer, *knobs)
        except InputError as error:
            return refusal(error), ""
        return picture_html(key, answer, found, knobs), table_html(found)

    examples = example_pictures()
    with gr.Blocks(title="FPN-SSD", analytics_enabled=False, delete_cache=(KEEP_UPLOADS, KEEP_UPLOADS)) as page:
        gr.HTML(heading_html(answers.detector))
        key = gr.State("")
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                sources = ["upload", "clipboard", "webcam"]
                upload = gr.Image(label="Picture", sources=sources, image_mode=None, height=260, elem_id="upload")
                upload.preprocess, upload.async_move_resource_to_block_cache = as_it_came, stay_where_it_is
                if examples:
                    # Not gr.Examples: that makes another gr.Image, with gradio's own way of taking what is sent.
                    samples = [[str(path)] for path in examples]
                    shown = gr.Dataset(components=["image"], samples=samples, type="index", label="Examples")
            with gr.Column(scale=2, min_width=280):
                parts = {"js_on_load": LIGHT_UP, "apply_default_css": False, "elem_classes": "fpnssd"}
                picture = gr.HTML(INVITATION, **parts)
                knobs = [
                    gr.Slider(*limits, step=step, label=name, info=info, elem_id=name)
                    for name, limits, step, info in KNOBS
                ]
                table = gr.HTML("", **parts)
        private = {"api_visibility": "private"}
        seen = {"outputs": [key, picture, table], "concurrency_id": "look", "concurrency_limit": AT_ONCE}
        upload.change(look_at_upload, [upload, *knobs], **seen, **private)
        if examples:
            shown.click(look_at_example, [shown, *knobs], **seen, **private)
        for knob in knobs:
            knob.change(
                show, [key, *knobs], [picture, table], trigger_mode="always_last", show_progress="hidden", **private
            )
    return page


def example_pictures():
    """Photographs under free licences that scikit-image carries, if it is installed."""
    try:
        import skimage
    except ImportError:
        return []
    inside = Path(skimage.__file__).parent / "data"
    return [inside / name for name in ("astronaut.png", "chelsea.png", "coffee.png") if (inside / name).is_file()]


def heading_html(detector):
    about, config = detector.about, detector.config
    names = ", ".join(config.classes[:30]) + (", ..." if len(config.classes) > 30 else "")
    return (
        f"<h1>FPN-SSD</h1><p>{html.escape(about['source'])}: {html.escape(config.trunk)}, {config.image_size} px, on "
        f"{about['runtime']} ({about['device']}, {about['precision']}). It knows {html.escape(names)}.</p>"
    )


def refusal(error):
    return f'<p class="refused" role="alert">{html.escape(explain(error))}</p>'


def picture_html(key, answer, found, knobs):
    """The picture with its boxes over it, and links to picture and detections as files."""
    height, width = answer.size
    rows = list(enumerate(found.rows(), start=1))
    by_area = sorted(rows, key=lambda row: (row[1][0][0] - row[1][0][2]) * (row[1][0][3] - row[1][0][1]))
    boxes = "".join(box_html(number, row, width, height) for number, row in by_area)  # small ones on top
    query = "&amp;".join(f"{name}={knob:g}" for (name, *_), knob in zip(KNOBS, knobs, strict=True))
    stem = html.escape(Path(answer.name).stem, quote=True)
    said = "1 object" if len(rows) == 1 else f"{len(rows)} objects"
    return (
        f'<div class="stage"><img src="answers/{key}/preview.jpg" width="{width}" height="{height}" '
        f'alt="the picture, with {said}">{boxes}</div>'
        f'<p aria-live="polite"><span id="count">{said}</span> in {width} x {height} pixels; reading the picture and '
        f"asking the network took {answer.seconds:.2f} s</p>"
        f'<p class="links"><a href="answers/{key}/detections.json?{query}" download="{stem}.json">Download JSON</a>'
        f'<a href="answers/{key}/annotated.jpg?{query}" download="{stem}_detected.jpg">Download picture</a></p>'
    )


def table_html(found):
    if not len(found):
        return ""
    lines = "".join(line_html(number, row) for number, row in enumerate(found.rows(), start=1))
    return (
        "<table><caption>box: left, top, right, bottom in pixels</caption><thead><tr><th>#</th><th>class</th>"
        f"<th>score</th><th>box</th></tr></thead><tbody>{lines}</tbody></table>"
    )


def box_html(number, row, width, height):
    (left, top, right, bottom), score, label, name = row
    place = (
        f"left:{100 * left / width:.3f}%;top:{100 * top / height:.3f}%;"
        f"width:{100 * (right - left) / width:.3f}%;height:{100 * (bottom - top) / height:.3f}%"
    )
    side = "box right" if left > 0.6 * width else "box"
    text = f"{html.escape(name)} {score:.2f}"
    return f'<div class="{side}" data-n="{number}" style="{place};{colours(label)}"><b>{text}</b></div>'


def line_html(number, row):
    box, score, label, name = row
    edges = ", ".join(str(round(edge)) for edge in box)
    return (
        f'<tr data-n="{number}" tabindex="0" style="{colours(label)}"><td class="number">{number}</td>'
        f'<td><span class="swatch"></span>{html.escape(name)}</td><td class="number">{score:.2f}</td>'
        f'<td class="number">{edges}</td></tr>'
    )


def colours(label):
    """CSS variables: a class's colour, and one legible on it."""
    red, green, blue = class_colour(label)
    text = "#000" if 0.299 * red + 0.587 * green + 0.114 * blue > 128 else "#fff"
    return f"--c:rgb({red},{green},{blue});--t:{text}"


if __name__ == "__main__":
    main()
