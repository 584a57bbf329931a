"""The web page as a browser sees it, the HTTP endpoint as curl does, and both as an attacker does."""

import contextlib
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from malformed import encoded, malformed_pictures, png_header, resident_bytes
from PIL import Image
from sure_network import save_sure_network

from fpnssd.inference.detector import Detections, load_detector

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import anyio
from starlette.exceptions import HTTPException

import app
from fpnssd.inference import http_server
from fpnssd.inference.http_server import Bodies

ROOT = Path(__file__).parents[1]
LIMITS = app.Limits(file_bytes=2 * 10**6, body_seconds=20)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small network with high scores for noise; a class name that would be markup if it were not escaped."""
    return save_sure_network(tmp_path_factory.mktemp("app") / "small.pth.tar", ("cat", "<i>dog</i>"))


@pytest.fixture(scope="module")
def detector(checkpoint):
    return load_detector(checkpoint, runtime="torch")


@contextlib.contextmanager
def running(detector, limits=LIMITS):
    """A server in a thread of this process: its url, address and service."""
    service, listener = app.Service(detector, limits), http_server.listen("127.0.0.1", 0)
    server = http_server.make_server(app.build_app(service))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    host, port = listener.getsockname()
    try:
        yield SimpleNamespace(url=f"http://{host}:{port}", address=(host, port), service=service)
    finally:
        server.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def server(detector):
    with running(detector) as server:
        yield server


@pytest.fixture(scope="module")
def photograph():
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((480, 360), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def sent(photograph):
    """The photograph as a client sends it."""
    return encoded(photograph, "PNG")


def ask(address, data=None, headers=(), method=None):
    """(status, headers, body) of a request."""
    request = urllib.request.Request(address, data, dict(headers), method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def post(server, data, query="", path="detect", **headers):
    """(status, JSON) of a picture that is sent."""
    headers.setdefault("Content-Type", "application/octet-stream")
    status, _, body = ask(f"{server.url}/{path}?{query}", data, headers)
    return status, json.loads(body)


def connect(server, head):
    """A socket that has sent the beginning of a request."""
    client = socket.create_connection(server.address, timeout=60)
    client.sendall(head)
    return client


def status_of(client):
    """The status code that a socket receives; None where the server closes it without an answer."""
    with contextlib.suppress(ConnectionError):
        if match := re.match(rb"HTTP/1.1 (\d+)", client.recv(65536)):
            return int(match[1])
    return None


def body_head(length):
    return f"POST /detect HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


# ---------------------------------------------------------------------------------------------------------------------
# The endpoint


def test_endpoint_answers_as_predict_does(server, detector, sent):
    status, answer = post(server, sent, "min_score=0.1&max_overlap=0.3&top_k=7")
    found = detector.predict(sent, 0.1, 0.3, 7)
    assert status == 200
    assert len(answer["objects"]) == len(found) == 7
    assert (answer["width"], answer["height"]) == (480, 360)
    for one, (box, score, label, name) in zip(answer["objects"], found.rows(), strict=True):
        assert (one["name"], one["label"], one["score"]) == (name, label, pytest.approx(score, abs=1e-5))
        assert one["box"] == pytest.approx(box, abs=0.01)
    _, suppressed = post(server, sent, "min_score=0.1&suppress=cat")
    assert {one["name"] for one in suppressed["objects"]} == {"<i>dog</i>"}


SMALL = encoded(Image.new("RGB", (9, 9)), "PNG")


@pytest.mark.parametrize(
    ("data", "query", "kind", "status", "said"),
    [
        (b"hello", "", "image/jpeg", 400, "image that was sent is not a readable image"),
        (b"", "", "image/jpeg", 400, "the body is empty"),
        (bytes(2_000_001), "", "image/jpeg", 413, "more than the 2 MB"),
        (bytes(9_000_000), "", "image/jpeg", 413, "more than the 2 MB"),
        (png_header(10_000, 10_000), "", "image/png", 400, "10000 x 10000 pixels, more than 50,000,000"),
        (b"x", "", "multipart/form-data; boundary=x", 400, "--data-binary"),
        (SMALL, "suppress=cow", "image/png", 400, "cannot suppress cow"),
        (SMALL, "min_scor=0.1", "image/png", 400, "unknown parameter 'min_scor'; known are min_score, max_overlap"),
    ],
)  # fmt: skip
def test_endpoint_says_what_is_wrong(server, data, query, kind, status, said):
    code, answer = post(server, data, query, **{"Content-Type": kind})
    assert code == status
    assert said in answer["error"]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("min_score=2", "min_score is 2.0; it must lie in 0..1"),
        ("min_score=-0.1", "min_score is -0.1"),
        ("min_score=", "min_score is ''"),
        ("max_overlap=nan", "max_overlap is nan"),
        ("max_overlap=inf", "max_overlap is inf"),
        ("top_k=0", "top_k is 0"),
        ("top_k=1000000000", "top_k is 1000000000; it must lie in 1..1000"),
        ("top_k=1.5", "top_k is '1.5'"),
        ("top_k=" + "9" * 5000, "top_k is '99999"),
    ],
)
def test_thresholds_are_bounded_on_every_route(server, sent, query, said):
    _, kept = post(server, sent, path="pictures")
    addresses = ("detect", "pictures", f"pictures/{kept['id']}/detections.json", f"pictures/{kept['id']}/annotated.jpg")
    for address in addresses:
        status, _, body = ask(f"{server.url}/{address}?{query}", None if "/" in address else sent)
        assert status == 400
        assert said in json.loads(body)["error"]
        assert len(body) < 200


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is damaged
@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.long)])
def test_malformed_pictures_over_http(server, sent, count):
    _, expected = post(server, sent)
    codes = []
    for number, data in enumerate(malformed_pictures(count)):
        codes.append(post(server, data)[0])
        if number == count // 10:
            before = resident_bytes()
    assert set(codes) == {200, 400}
    assert post(server, sent) == (200, expected)
    if count >= 5000:
        assert resident_bytes() <= 1.05 * before


def test_formats_that_open_or_run_something_are_refused(server, sent):
    """IPTC and ICO open what is inside of them, FITS unpacks it, EPS is a program for Ghostscript."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"
    iptc = b"".join(
        bytes((0x1C, part, kind)) + struct.pack(">H", len(value)) + value
        for part, kind, value in (
            (3, 60, b"\x03\x01"), (3, 20, b"\x00\x09"), (3, 30, b"\x00\x09"), (3, 120, b"\x01"), (8, 10, program),
        )
    )  # fmt: skip
    icon = io.BytesIO()
    Image.new("RGB", (32, 32)).save(icon, "ICO")
    cards = ("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 9", "NAXIS2  = 9", "END")
    fits = "".join(card.ljust(80) for card in cards).encode().ljust(2880) + bytes(2880)
    for data in (program, iptc, icon.getvalue(), fits):
        status, answer = post(server, data)
        assert (status, "is not a readable image" in answer["error"]) == (400, True)
    assert post(server, sent)[0] == 200


# ---------------------------------------------------------------------------------------------------------------------
# Who is answered


@pytest.mark.parametrize("path", ["", "about.json", "detect", "pictures", "nothing"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),  # after DNS rebinding
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "user@localhost"}, 403),
        ({"Host": "localhost:x"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "LocalHost:99"}, None),
        ({"Host": "[::1]"}, None),
        ({"Origin": "http://evil.example"}, 403),  # another site's form or script
        ({"Origin": "http://localhost:99"}, 403),  # another server of this machine
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:99", "Origin": "http://localhost:99"}, None),
        ({"Host": "127.0.0.1", "Origin": "http://127.0.0.1"}, None),
    ],
)
def test_own_names_alone_are_answered(server, path, headers, status):
    data = SMALL if path in ("detect", "pictures") else None
    code, answered, body = ask(f"{server.url}/{path}", data, headers)
    expected = {"detect": 200, "pictures": 201, "nothing": 404}.get(path, 200)
    assert code == (status or expected)
    assert "default-src 'none'" in answered["Content-Security-Policy"]
    if status:
        assert set(json.loads(body)) == {"error"}


def test_other_names_are_given_on_the_command_line(detector):
    args = app.parse_args(["--allowed-host", "Photos.example.org", "fe80::1"])
    guard = app.build_app(app.Service(detector, LIMITS), [*app.OWN_NAMES, args.host, *args.allowed_host])
    for host in (b"photos.example.org", b"[fe80::1]:7860", b"localhost"):
        assert guard.refusal(http_server.Headers(raw=[(b"host", host)])) is None
    for hosts in ([], [b"example.org"], [b"localhost", b"localhost"]):
        assert "--allowed-host" in guard.refusal(http_server.Headers(raw=[(b"host", host) for host in hosts]))


def test_browsers_are_told_to_be_strict(server):
    for path in ("", "page.js", "page.css", "about.json", "nothing"):
        _, headers, _ = ask(f"{server.url}/{path}")
        policy = headers["Content-Security-Policy"]
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert (headers["X-Content-Type-Options"], headers["Cache-Control"]) == ("nosniff", "no-store")
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"


@pytest.mark.parametrize("stranger", ["file", "address"])
def test_server_opens_nothing_that_a_client_names(server, photograph, sent, tmp_path, stranger, monkeypatch):
    """Neither a file of this machine nor an address, in the place of anything that a client sends."""
    photograph.save(tmp_path / "private.png")
    with socket.create_server(("127.0.0.1", 0)) as elsewhere:
        name = str(tmp_path / "private.png")
        if stranger == "address":
            name = f"http://127.0.0.1:{elsewhere.getsockname()[1]}/private.png"
        opened = []
        sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
        quoted = urllib.parse.quote(name, safe="")
        for query in ("min_score", "max_overlap", "top_k", "suppress", "name", "path", "image"):
            for path in ("detect", "pictures"):
                post(server, sent, f"{query}={quoted}", path)
        for path in ("pictures/{}/preview.jpg", "pictures/{}/detections.json", "examples/{}", "{}", "page.js/../{}"):
            assert ask(f"{server.url}/{path.format(quoted)}")[0] == 404
        body = json.dumps({"path": name, "url": name, "is_stream": True}).encode()
        assert post(server, body, path="pictures")[0] == 400
        assert name not in opened
        elsewhere.settimeout(0.2)
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def test_names_are_cut_and_data(server, sent):
    name = "../../" + "x" * 300 + "<b>.png"
    _, answer = post(server, sent, "name=" + urllib.parse.quote(name), "pictures")
    assert answer["source"] == name[:255]


# ---------------------------------------------------------------------------------------------------------------------
# How much clients get


def test_thresholds_do_not_run_the_network_again(server, sent, monkeypatch):
    run_network, calls = server.service.detector.run_network, []
    monkeypatch.setattr(
        server.service.detector, "run_network", lambda images: (calls.append(1), run_network(images))[1]
    )
    _, answer = post(server, sent, "min_score=0.1", "pictures")
    address = f"{server.url}/pictures/{answer['id']}/detections.json?min_score="
    counts = [len(json.loads(ask(address + score)[2])["objects"]) for score in ("0.1", "0.4", "0.9")]
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 1
    assert counts[0] == len(answer["objects"])
    assert calls == [1]


def test_kept_outputs_are_bounded(server, sent, monkeypatch):
    """And their ids cannot be guessed."""
    first = post(server, sent, path="pictures")[1]["id"]
    monkeypatch.setattr(server.service.kept, "max_bytes", 3 * server.service.kept.get(first).num_bytes)
    keys = [first, *(post(server, sent, path="pictures")[1]["id"] for _ in range(5))]
    previews = [ask(f"{server.url}/pictures/{key}/preview.jpg") for key in keys]
    assert [status for status, _, _ in previews] == 3 * [404] + 3 * [200]
    assert "no longer kept: send it again" in json.loads(previews[0][2])["error"]
    assert all(len(key) >= 22 for key in keys)  # 128 bits
    assert len(set(keys)) == 6
    for forged in ("0", keys[-1][:-1], keys[-1] + "x", "..", "%2e%2e%2f", "%00"):
        for name in ("preview.jpg", "annotated.jpg", "detections.json"):
            assert ask(f"{server.url}/pictures/{forged}/{name}")[0] == 404


def test_pictures_are_drawn_few_at_a_time(server, sent, monkeypatch):
    """Each is decoded in full, so that many at once would take much memory; meanwhile the page is served."""
    key = post(server, sent, path="pictures")[1]["id"]
    running, seen = [], []

    def annotate_slowly(picture, found):
        running.append(1)
        seen.append(len(running))
        time.sleep(0.2)
        running.pop()
        return picture

    monkeypatch.setattr("app.annotate", annotate_slowly)
    with ThreadPoolExecutor(8) as pool:
        got = [pool.submit(ask, f"{server.url}/pictures/{key}/annotated.jpg?min_score=0.1") for _ in range(8)]
        while not running:
            time.sleep(0.001)
        start = time.perf_counter()
        assert ask(server.url)[0] == 200
        taken = time.perf_counter() - start
        assert not all(one.done() for one in got)
        assert [one.result()[0] for one in got] == [200] * 8
    assert max(seen) == 2
    assert taken < 0.6  # drawing all takes 0.8 s


def test_bodies_never_exceed_their_bound():
    sums, responses = [], Counter()

    class Sizes(dict):
        def __setitem__(self, scope, size):
            super().__setitem__(scope, size)
            sums.append(sum(self.values()))

    class Client:
        headers: dict[str, str] = {}

        async def stream(self):
            for _ in range(9):
                await anyio.sleep(0)
                yield bytes(100)

    async def send():
        try:
            async with bodies.receive(Client()) as body:
                responses[len(body)] += 1
        except HTTPException as error:
            responses[error.status_code] += 1

    async def send_all():
        async with anyio.create_task_group() as group:
            for _ in range(10):
                group.start_soon(send)

    bodies = Bodies(max_bytes=1000, max_count=64, seconds=20)
    bodies.sizes = Sizes()
    anyio.run(send_all)
    assert max(sums) == 4000
    assert responses[503] + responses[900] == 10
    assert responses[900] >= 4
    assert not bodies.sizes


def test_responses_that_nobody_reads_are_bounded():
    """Each of three clients stops reading after the first part; two responses fit."""
    unread, sent, body = http_server.Unread(2 * 10**6), [0, 0, 0], os.urandom(10**6)

    async def respond(number):
        async def send(message):
            if sent[number]:
                await anyio.sleep_forever()
            sent[number] += len(message.get("body", b""))

        await unread.response(body, "image/jpeg")({"type": "http"}, None, send)
        finished.append(number)

    async def respond_to_all():
        async with anyio.create_task_group() as group:
            for number in range(3):
                group.start_soon(respond, number)
                await anyio.sleep(0.01)
            assert finished == [0]
            assert sum(unread.sizes.values()) == 2 * 10**6
            group.cancel_scope.cancel()

    finished = []
    anyio.run(respond_to_all)
    assert sent == [http_server.PART_BYTES] * 3
    assert not unread.sizes


def test_slow_clients_are_bounded_in_memory_and_keep_nobody_out(server, sent):
    bodies, seen = server.service.bodies, []
    clients = [connect(server, body_head(2_000_000) + bytes(1_900_000)) for _ in range(40)]
    for _ in range(20):
        seen.append(sum(bodies.sizes.values()))
        assert post(server, sent)[0] == 200
    assert 0 < max(seen) <= 4 * LIMITS.file_bytes
    codes = [status_of(client) for client in clients[:30]]  # the first to come had to give way
    assert set(codes) == {503}
    for client in clients:
        client.close()
    few = [connect(server, body_head(2_000_000)) for _ in range(LIMITS.bodies + 5)]
    deadline = time.monotonic() + 20
    while len(bodies.sizes) < LIMITS.bodies and time.monotonic() < deadline:
        time.sleep(0.01)
    assert post(server, sent)[0] == 200
    assert len(bodies.sizes) <= LIMITS.bodies
    for client in few:
        client.close()


def test_bodies_and_connections_have_a_deadline(detector, sent, monkeypatch):
    monkeypatch.setattr(http_server, "CONNECTION_SECONDS", 1.0)
    with running(detector, app.Limits(body_seconds=0.3)) as server:
        start = time.monotonic()
        assert status_of(connect(server, body_head(1000) + b"x")) == 408
        silent = [connect(server, text) for text in (b"", b"GET / HTTP/1.1\r\nHost: loc")]
        assert [client.recv(100) for client in silent] == [b"", b""]
        assert time.monotonic() - start < 5
        assert post(server, sent)[0] == 200


def test_connections_are_bounded(detector, sent, monkeypatch):
    monkeypatch.setattr(http_server, "MAX_CONNECTIONS", 10)
    with running(detector) as server:
        clients = [connect(server, b"GET / HTTP/1.1\r\n") for _ in range(30)]
        assert post(server, sent)[0] == 200
        assert len(http_server.Connection.connected) <= 10
        for client in clients:
            client.close()


def test_huge_headers_are_refused(server, sent):
    for head in (b"GET /" + b"x" * 10**6, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 10**6):
        with contextlib.suppress(ConnectionError):
            assert status_of(connect(server, head)) == 400
    assert post(server, sent)[0] == 200


def test_client_that_gives_up_leaves_no_traceback(server, sent, caplog, capfd, monkeypatch):
    run_network, running = server.service.run_network, threading.Event()

    def run_slowly(data, name):
        running.set()
        time.sleep(0.3)
        return run_network(data, name)

    monkeypatch.setattr(server.service, "run_network", run_slowly)
    connect(server, body_head(1000) + b"x").close()  # while it sends
    connect(server, b"GET / HT").close()
    waiting = [
        connect(server, body_head(len(sent)) + sent) for _ in range(4)
    ]  # while the network runs, and in the queue
    assert running.wait(20)
    for client in waiting:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not an orderly end
        client.close()
    assert post(server, sent)[0] == 200
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]
    assert "Traceback" not in capfd.readouterr().err


FORK_SERVERS = """
import os, runpy, sys, time
import app
from fpnssd.data import images
load_image = images.load_image
def load_slowly(data, *args):
    if data == b"HANG":
        time.sleep(1000)
    return load_image(data, *args)
images.load_image = load_slowly
for line in sys.stdin:
    pid = os.fork()
    if not pid:
        print(os.getpid(), flush=True)
        runpy.run_path("app.py", run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def launcher(checkpoint):
    """A process that starts app.py for each line that it reads, as a process of its own, and waits for its end."""
    options = ["--checkpoint", str(checkpoint), "--port", "0", "--max-mb", "5", "--runtime", "torch"]
    with open(checkpoint.parent / "errors.txt", "w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVERS, *options], cwd=ROOT, text=True, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, start_new_session=True,
        )  # fmt: skip
        yield SimpleNamespace(stdin=process.stdin, stdout=process.stdout, errors=errors)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_server_within_seconds(launcher, sent, number):
    """While clients are connected, send slowly (40 of them cost little memory), and the network runs for ever."""
    print("start", file=launcher.stdin, flush=True)
    pid, url = int(launcher.stdout.readline()), launcher.stdout.readline().split()[0]
    server = SimpleNamespace(url=url, address=("127.0.0.1", int(url.rpartition(":")[2])))
    assert post(server, sent)[0] == 200
    before = resident_bytes(pid)
    clients = [connect(server, body_head(5_000_000) + bytes(4_900_000)) for _ in range(40)]
    assert post(server, sent)[0] == 200
    assert resident_bytes(pid) - before < 80e6  # they sent 196 MB
    clients += [
        connect(server, head) for head in (b"", b"GET / HT", b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
    ]
    if number == signal.SIGTERM:
        clients.append(connect(server, body_head(4) + b"HANG"))
        time.sleep(0.3)
    start = time.monotonic()
    os.kill(pid, number)
    assert int(launcher.stdout.readline()) in (-number, 128 + number)
    assert time.monotonic() - start < 5
    launcher.errors.seek(0)
    assert "Traceback" not in launcher.errors.read()


def test_limits_beyond_what_pictures_may_have_are_refused(capsys):
    limits = app.limits_of(app.parse_args(["--max-megapixels", "89"]))
    assert limits.pixels == 89 * 10**6
    assert limits.decoding_bytes > 5 * limits.pixels  # what a JPEG file of so many takes
    assert app.limits_of(app.parse_args([])) == app.Limits()
    with pytest.raises(SystemExit):
        app.parse_args(["--max-megapixels", "100000"])
    assert "--max-megapixels can be 89 at most" in capsys.readouterr().err


def test_port_that_is_taken_is_named(server, checkpoint):
    with pytest.raises(SystemExit, match=r"app: cannot listen on 127.0.0.1, port \d+ .*--port.*in use"):
        app.main(["--checkpoint", str(checkpoint), "--port", str(server.address[1])])


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def page(server, browser):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(server.url)
    page.wait_for_selector("#classes input")
    yield page
    errors = page.errors
    page.close()
    assert not errors


def upload(page, path):
    page.set_input_files("#file", str(path))


def objects_shown(page):
    """Numbers of the boxes on the picture and of the table's rows, once both and the count agree."""
    page.wait_for_function(
        """() => {
            const count = document.querySelector('#count').textContent;
            return count && parseInt(count) === document.querySelectorAll('.box').length
                && parseInt(count) === document.querySelectorAll('tbody tr[data-n]').length;
        }"""
    )
    return sorted(int(one.get_attribute("data-n")) for one in page.query_selector_all(".box"))


def wait_for_count(page, count):
    page.wait_for_function("count => parseInt(document.querySelector('#count').textContent) === count", arg=count)


def test_page_from_upload_to_download(server, page, photograph, tmp_path):
    photograph.save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    before = objects_shown(page)
    _, expected = post(server, (tmp_path / "photo.png").read_bytes())
    assert before == list(range(1, len(expected["objects"]) + 1))
    assert page.inner_text("tbody tr[data-n='1'] td:nth-child(2)").strip() == expected["objects"][0]["name"]

    # The slider, by keyboard: fewer boxes, those that the endpoint gives at that score.
    slider = page.query_selector("#min_score")
    slider.focus()
    while float(slider.input_value()) < 0.6:
        slider.press("ArrowRight")
    _, expected = post(server, (tmp_path / "photo.png").read_bytes(), f"min_score={slider.input_value()}")
    wait_for_count(page, len(expected["objects"]))
    after = objects_shown(page)
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


def test_boxes_lie_where_the_endpoint_says(server, page, photograph, tmp_path):
    photograph.save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    objects_shown(page)
    _, expected = post(server, (tmp_path / "photo.png").read_bytes())
    place = """number => {
        const box = document.querySelector(`.box[data-n="${number}"]`).getBoundingClientRect();
        const picture = document.querySelector('#preview').getBoundingClientRect(), scale = 480 / picture.width;
        return [box.left - picture.left, box.top - picture.top, box.right - picture.left, box.bottom - picture.top]
            .map(side => side * scale);
    }"""
    for number, one in enumerate(expected["objects"][:10], start=1):
        assert page.evaluate(place, number) == pytest.approx(one["box"], abs=0.6)


def test_label_hides_no_better_one_where_its_box_has_room(page, photograph, tmp_path, server, monkeypatch):
    """Two boxes that begin at one corner: the label of the second goes to the bottom of its box."""
    decode = server.service.decode

    def decode_two(outputs, thresholds):
        found = decode(outputs, thresholds)
        boxes = torch.tensor([[40.0, 40, 400, 300], [40, 40, 300, 200]])
        return Detections(boxes, found.scores[:2], found.labels[:2], found.names[:2], found.size)

    monkeypatch.setattr(server.service, "decode", decode_two)
    photograph.save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    assert objects_shown(page) == [1, 2]
    first, second = (page.query_selector(f".box[data-n='{number}'] b").bounding_box() for number in (1, 2))
    assert first["y"] + first["height"] <= second["y"]


def test_classes_are_chosen(server, page, sent, tmp_path):
    """And no name is markup, neither a class's nor a file's."""
    (tmp_path / "<img src=x onerror=alert(1)>.png").write_bytes(sent)
    page.on("dialog", lambda dialog: page.errors.append(dialog.message))
    upload(page, tmp_path / "<img src=x onerror=alert(1)>.png")
    objects_shown(page)
    page.uncheck("#classes input >> nth=0")
    _, expected = post(server, sent, "suppress=cat")
    wait_for_count(page, len(expected["objects"]))
    objects_shown(page)
    assert {row.inner_text().strip() for row in page.query_selector_all("tbody td:nth-child(2)")} == {"<i>dog</i>"}
    assert not page.query_selector_all("main i")
    page.click("#none")
    wait_for_count(page, 0)
    page.click("#all")
    wait_for_count(page, len(post(server, sent)[1]["objects"]))


def test_heading_has_no_path(page, checkpoint):
    assert page.inner_text("#model").startswith("small.pth.tar: test_resnet, 64 px")
    assert str(checkpoint.parent) not in page.content()


def test_picture_that_is_dropped_or_no_longer_kept_is_shown(server, page, photograph):
    """The page sends a picture again if the server has dropped it meanwhile."""
    page.evaluate(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], 'dropped.jpg'));
            document.dispatchEvent(new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true}));
        }""",
        list(encoded(photograph, "JPEG")),
    )
    count = len(objects_shown(page))
    server.service.kept._kept.clear()
    page.query_selector("#min_score").press("End")
    wait_for_count(page, 0)
    page.query_selector("#min_score").press("Home")
    page.wait_for_function("least => parseInt(document.querySelector('#count').textContent) >= least", arg=count)
    assert not page.is_visible(".refused")


def test_example_is_answered(page):
    pytest.importorskip("skimage")
    page.click("#examples button >> nth=0")
    assert objects_shown(page)


def test_page_refuses_readably_and_goes_on(page, photograph, tmp_path):
    (tmp_path / "text.jpg").write_text("hello")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "long.jpg").write_bytes(bytes(2_000_001))
    for name, said in (
        ("text.jpg", "text.jpg is not a readable image"),
        ("huge.png", "10000 x 10000 pixels"),
        ("long.jpg", "long.jpg has 2.0 MB; at most 2 are accepted"),
    ):
        upload(page, tmp_path / name)
        page.wait_for_selector(f".refused:has-text('{said}')")
        assert not page.is_visible(".box")
        assert not page.is_visible("#result")
    photograph.save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    page.wait_for_selector("#result")
    assert objects_shown(page)
    assert not page.is_visible(".refused")


def test_page_fits_a_phone(page, photograph, tmp_path):
    page.set_viewport_size({"width": 390, "height": 844})
    photograph.save(tmp_path / "photo.png")
    upload(page, tmp_path / "photo.png")
    assert objects_shown(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    outside = """[...document.querySelectorAll('.stage, .box b, table, input, .links a')].filter(one => {
        const place = one.getBoundingClientRect();
        return place.width && (place.left < 0 || place.right > 390);
    }).length"""
    assert page.evaluate(outside) == 0
