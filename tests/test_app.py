"""The web page as a browser sees it, and the HTTP endpoint as curl does."""

import http.server
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import anyio
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from malformed import encoded, malformed_pictures, png_header, resident_bytes
from PIL import Image
from sure_network import save_sure_network

from app import Answers, Limits, add_files, parse_args
from fpnssd.inference.detector import load_detector

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small network that is sure of nonsense; a class name that would be markup if it were not escaped."""
    return save_sure_network(tmp_path_factory.mktemp("app") / "small.pth.tar", ("cat", "<i>dog</i>"))


@pytest.fixture(scope="module")
def server(checkpoint):
    """python app.py, running: url and pid."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        str(ROOT / "app.py"),
        "--checkpoint",
        str(checkpoint),
        "--port",
        str(port),
        "--max-mb",
        "2",
    ]
    process = subprocess.Popen(command, cwd=checkpoint.parent, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(3000):  # minutes, as other work may keep the machine busy
            time.sleep(0.1)
            assert process.poll() is None, "app.py ended"
            try:
                urllib.request.urlopen(url, timeout=10).read()
                break
            except urllib.error.URLError:
                continue
        else:
            pytest.fail("app.py did not answer within five minutes")
        yield SimpleNamespace(url=url, pid=process.pid)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


@pytest.fixture(scope="module")
def photograph():
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((480, 360), Image.Resampling.BICUBIC)


def post(server, data, query="", **headers):
    """(status, JSON) of POST /detect."""
    request = urllib.request.Request(f"{server.url}/detect?{query}", data, headers)
    request.add_header("Content-Type", headers.get("kind", "application/octet-stream"))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_endpoint_answers_as_predict_does(server, checkpoint, photograph):
    data = encoded(photograph, "PNG")
    status, answer = post(server, data, "min_score=0.1&max_overlap=0.3&top_k=7")
    found = load_detector(checkpoint).predict(data, 0.1, 0.3, 7)
    assert status == 200
    assert len(answer["objects"]) == len(found) == 7
    assert (answer["width"], answer["height"]) == (480, 360)
    for one, (box, score, label, name) in zip(answer["objects"], found.rows(), strict=True):
        assert (one["name"], one["label"], one["score"]) == (name, label, pytest.approx(score, abs=1e-5))
        assert one["box"] == pytest.approx(box, abs=0.01)
    _, suppressed = post(server, data, "min_score=0.1&suppress=cat")
    assert {one["name"] for one in suppressed["objects"]} == {"<i>dog</i>"}


@pytest.mark.parametrize(
    ("data", "query", "kind", "status", "said"),
    [
        (b"hello", "", "image/jpeg", 400, "image that was sent is no image that can be read"),
        (b"", "", "image/jpeg", 400, "the body is empty"),
        (bytes(2_000_001), "", "image/jpeg", 413, "more than the 2 MB"),
        (png_header(10_000, 10_000), "", "image/png", 400, "10000 x 10000 pixels, more than 50,000,000"),
        (b"x", "", "multipart/form-data; boundary=x", 400, "--data-binary"),
        (encoded(Image.new("RGB", (9, 9)), "PNG"), "min_score=2", "image/png", 400, "min_score is 2.0"),
        (encoded(Image.new("RGB", (9, 9)), "PNG"), "suppress=cow", "image/png", 400, "cannot suppress cow"),
    ],
)  # fmt: skip
def test_endpoint_says_what_is_wrong(server, data, query, kind, status, said):
    code, answer = post(server, data, query, kind=kind)
    assert code == status
    assert said in answer["error"]


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is damaged
@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.long)])
def test_malformed_pictures_over_http(server, photograph, count):
    good = encoded(photograph, "PNG")
    _, expected = post(server, good)
    codes = []
    for number, data in enumerate(malformed_pictures(count)):
        codes.append(post(server, data)[0])
        if number == count // 10:
            before = resident_bytes(server.pid)
    assert set(codes) == {200, 400}
    assert post(server, good) == (200, expected)
    if count >= 5000:
        assert resident_bytes(server.pid) <= 1.05 * before


def change_upload(server, **said):
    """What a client of the page's own interface is told that says so of its upload: the last event."""
    with urllib.request.urlopen(f"{server.url}/config") as answer:
        config = json.load(answer)
    upload = next(one["id"] for one in config["components"] if one["props"].get("elem_id") == "upload")
    call = next(one for one in config["dependencies"] if [upload, "change"] in one["targets"])
    knobs = [one["props"]["value"] for one in config["components"] if one["id"] in call["inputs"][1:]]
    session = str(said["path"])
    file = {"meta": {"_type": "gradio.FileData"}, **said}
    body = {"data": [file, *knobs], "fn_index": call["id"], "session_hash": session}
    address = f"{server.url}/gradio_api/queue"
    request = urllib.request.Request(f"{address}/join", json.dumps(body).encode(), {"Content-Type": "application/json"})
    urllib.request.urlopen(request, timeout=60).close()
    session = urllib.parse.urlencode({"session_hash": session})
    with urllib.request.urlopen(f"{address}/data?{session}", timeout=60) as lines:
        last = next(line for line in lines if b"process_completed" in line)
    return json.loads(last.removeprefix(b"data: "))


@pytest.mark.parametrize("stream", [False, True])
def test_page_opens_uploads_alone(server, photograph, tmp_path, stream):
    """Not a file that a client names but did not send, and no address; what was sent it does."""
    photograph.save(tmp_path / "private.png")
    asked = []

    class Asked(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Asked) as elsewhere:
        threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{elsewhere.server_port}/private.png"
        for path in (str(tmp_path / "private.png"), address):
            event = change_upload(server, path=path, is_stream=stream)
            assert not event["success"]
            assert "no upload" in event["output"]["error"]
        elsewhere.shutdown()
    assert not asked
    boundary = b"--x\r\nContent-Disposition: form-data; name=files; filename=sent.png\r\n\r\n"
    body = boundary + encoded(photograph, "PNG") + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}/gradio_api/upload", body, kind)) as answer:
        (path,) = json.load(answer)
    event = change_upload(server, path=path, is_stream=stream)
    assert event["success"]
    assert "answers/" in event["output"]["data"][1]


def test_knobs_do_not_ask_the_network_again(checkpoint, photograph):
    detector = load_detector(checkpoint)
    forward, calls = detector.forward, []
    detector.forward = lambda squares: (calls.append(1), forward(squares))[1]
    answers = Answers(detector, Limits())
    answer = answers.get(answers.add(encoded(photograph, "PNG"), "a.png"))
    counts = [len(answers.decode(answer, min_score, 0.5, 200)) for min_score in (0.1, 0.4, 0.9)]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 1
    assert calls == [1]


def test_what_is_kept_is_bounded(checkpoint, photograph, monkeypatch):
    answers = Answers(load_detector(checkpoint), Limits())
    data = encoded(photograph, "PNG")
    first = answers.add(data, "a.png")
    monkeypatch.setattr("app.KEPT_BYTES", 3 * answers.get(first).num_bytes)
    keys = [first, *(answers.add(data, "a.png") for _ in range(5))]
    for gone in keys[:3]:
        with pytest.raises(ValueError, match="no longer kept: send it again"):
            answers.get(gone)
    assert all(answers.get(key) for key in keys[3:])


def test_pictures_are_drawn_few_at_a_time(checkpoint, photograph, monkeypatch):
    """Each is decoded in full, so that many downloads at once would take many pictures' memory."""
    app, answers = FastAPI(), Answers(load_detector(checkpoint), Limits())
    add_files(app, answers, anyio.CapacityLimiter(2))
    address = f"/answers/{answers.add(encoded(photograph, 'PNG'), 'a.png')}/annotated.jpg"
    running, seen = [], []

    def annotate_slowly(picture, found):
        running.append(1)
        seen.append(len(running))
        time.sleep(0.05)
        running.pop()
        return picture

    monkeypatch.setattr("app.annotate", annotate_slowly)
    with TestClient(app) as client, ThreadPoolExecutor(8) as pool:
        knobs = {"min_score": 0.1, "max_overlap": 0.5, "top_k": 5}
        got = list(pool.map(lambda _: client.get(address, params=knobs).status_code, range(8)))
    assert got == [200] * 8
    assert max(seen) == 2


@pytest.fixture
def page(server, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.asked = []
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(server.url)
    page.wait_for_selector("#upload input[type=file]", state="attached")
    yield page
    page.close()


def upload(page, path):
    page.set_input_files("#upload input[type=file]", str(path))


def objects_shown(page):
    """Numbers of the boxes on the picture and of the table's rows, once both and the count agree."""
    page.wait_for_function(
        """() => {
            const count = document.querySelector('#count');
            return count && parseInt(count.textContent) === document.querySelectorAll('.box').length
                && parseInt(count.textContent) === document.querySelectorAll('tbody tr[data-n]').length;
        }"""
    )
    return sorted(int(one.get_attribute("data-n")) for one in page.query_selector_all(".box"))


def test_page_from_upload_to_download(server, page, photograph, tmp_path):
    photograph.save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    page.wait_for_selector("#count")
    before = objects_shown(page)
    _, expected = post(server, (tmp_path / "photo.png").read_bytes())
    assert before == list(range(1, len(expected["objects"]) + 1))
    assert page.inner_text("tbody tr[data-n='1'] td:nth-child(2)").strip() == expected["objects"][0]["name"]

    # The slider, by keyboard: fewer boxes, those that the endpoint gives at that score.
    slider = page.query_selector("#min_score input[type=range]")
    slider.focus()
    while float(slider.input_value()) < 0.6:
        slider.press("ArrowRight")
    page.wait_for_function(f"parseInt(document.querySelector('#count').textContent) < {len(before)}")
    page.wait_for_timeout(500)
    after = objects_shown(page)
    _, expected = post(server, (tmp_path / "photo.png").read_bytes(), f"min_score={slider.input_value()}")
    assert 0 < len(after) == len(expected["objects"]) < len(before)

    # Row and box of one object light up together, whichever is under the pointer or has the focus.
    page.focus("tbody tr[data-n='1']")
    assert page.evaluate("[...document.querySelectorAll('.lit')].map(one => one.dataset.n)") == ["1", "1"]
    page.hover("tbody tr[data-n='2']")
    assert page.evaluate("[...document.querySelectorAll('.lit')].map(one => one.dataset.n)") == ["2", "2"]

    with page.expect_download() as download:
        page.click("text=Download JSON")
    assert download.value.suggested_filename == "photo.json"
    assert json.loads(Path(download.value.path()).read_text())["objects"] == expected["objects"]
    with page.expect_download() as download:
        page.click("text=Download picture")
    assert download.value.suggested_filename == "photo_detected.jpg"
    with Image.open(io.BytesIO(Path(download.value.path()).read_bytes())) as picture:
        assert (picture.format, picture.size) == ("JPEG", (480, 360))
    assert all(url.startswith((server.url, "data:", "blob:")) for url in page.asked)


def test_example_is_answered(page):
    pytest.importorskip("skimage")
    page.click("button.gallery-item >> nth=0")
    page.wait_for_selector("#count")
    assert objects_shown(page)


def test_page_refuses_readably_and_goes_on(page, photograph, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    for name, said in (("text.jpg", "text.jpg is no image that can be read"), ("huge.png", "10000 x 10000 pixels")):
        upload(page, tmp_path / name)
        page.wait_for_selector(f".refused:has-text('{said}')")
        assert not page.query_selector_all(".box")
        page.click("#upload button[aria-label='Remove Image']")
        page.wait_for_selector("text=Choose a picture, paste one")
    photograph.save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    page.wait_for_selector("#count")
    assert objects_shown(page)


def test_page_fits_a_phone(page, photograph, tmp_path):
    page.set_viewport_size({"width": 390, "height": 844})
    photograph.save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    page.wait_for_selector("#count")
    objects_shown(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    outside = """[...document.querySelectorAll('.stage, .box b, table, input, .links a')].filter(one => {
        const place = one.getBoundingClientRect();
        return place.width && (place.left < 0 || place.right > 390);
    }).length"""
    assert page.evaluate(outside) == 0


def test_limits_beyond_what_pictures_may_have_are_refused(capsys):
    assert parse_args(["--max-megapixels", "89"]).max_megapixels == 89
    with pytest.raises(SystemExit):
        parse_args(["--max-megapixels", "100000"])
    assert "--max-megapixels can be 89 at most" in capsys.readouterr().err
