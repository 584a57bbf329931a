"""The web page of app.py: a picture goes in, its boxes come out as HTML, and the knobs of decoding redraw them."""

import html
import os
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before gradio is imported

import gradio as gr
from gradio.utils import get_upload_folder

from fpnssd.inference.detector import MIN_SCORE
from fpnssd.inference.draw import class_colour
from utils import InputError, error_message

KEEP_UPLOADS = 3600  # seconds

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


def mount_page(app, answers):
    """Puts the page at / of an ASGI application; answers: app.Answers."""
    gr.mount_gradio_app(
        app, build_page(answers), path="/", show_error=True, max_file_size=answers.limits.file_bytes, footer_links=[],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]), css=CSS,
        ssr_mode=False,
    )  # fmt: skip


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
        seen = {"outputs": [key, picture, table], "concurrency_id": "look", "concurrency_limit": answers.limits.at_once}
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
        f"<h1>FPN-SSD</h1><p>{html.escape(about['source'])}: {html.escape(config.backbone)}, {config.image_size} px, "
        f"on {about['runtime']} ({about['device']}, {about['precision']}). It knows {html.escape(names)}.</p>"
    )


def refusal(error):
    return f'<p class="refused" role="alert">{html.escape(error_message(error))}</p>'


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
