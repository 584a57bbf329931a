"""The web server of app.py under good and hostile clients at once, on this machine alone.

    python benchmarks/soak.py                                  # 10 minutes, the checkpoint that ships
    python benchmarks/soak.py --minutes 2 --checkpoint runs/lite/best.pth.tar

Good clients send JPEGs of several sizes one after the other and compare each response with the first. Meanwhile every
function of ATTACKS runs over and over. At the end, with attackers still connected, the server gets Ctrl-C. Printed:
failures, time to a good response, the status codes that attackers got, the server's memory, and how long its end took.
The run fails if a good client got a wrong response or none, an attacker got one that it should not, memory grew, or the
end took more than 5 seconds.
"""

import argparse
import io
import json
import signal
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT))
from model import DEFAULT_CHECKPOINT  # noqa: E402

SIZES = ((500, 375), (1280, 960), (333, 500), (2000, 1500))  # of the JPEGs, in pixels
MAX_GROWTH = 1.1
MAX_END_SECONDS = 5.0


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=4, help="good ones")
    args = parser.parse_args(argv)
    command = [sys.executable, str(ROOT / "app.py"), "--checkpoint", args.checkpoint, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = process.stdout.readline().split()[0]
        pictures = good_pictures()
        expected = [request(url, data=data) for data in pictures]
        idle = resident_mb(process.pid)
        until = time.monotonic() + 60 * args.minutes
        clients = [GoodClient(url, pictures, expected, number, until) for number in range(args.clients)]
        attackers = [Attacker(url, attack, until) for attack in ATTACKS]
        for thread in [*clients, *attackers]:
            thread.start()
        memory = watch_memory(process.pid, until)
        for client in clients:
            client.join()
        connected = [slow_body(url) for _ in range(10)]
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.wait(60)
        end_seconds = time.monotonic() - start
        del connected
    finally:
        process.kill()
    sys.exit(report(args, clients, attackers, idle, memory, end_seconds))


def good_pictures():
    """Smooth noise of several sizes, as JPEG files."""
    rng, pictures = np.random.default_rng(0), []
    for size in SIZES:
        noise = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        pictures.append(encoded(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC), "JPEG"))
    return pictures


def encoded(image, form):
    stream = io.BytesIO()
    image.save(stream, form)
    return stream.getvalue()


def request(url, path="detect?min_score=0.05", data=None, headers=()):
    """(status, JSON) of a response."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/{path}", data, dict(headers)), timeout=60
        ) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def resident_mb(process):
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096 / 2**20


def watch_memory(process, until):
    """Resident MB, once a second."""
    seen = []
    while time.monotonic() < until:
        time.sleep(1)
        seen.append(resident_mb(process))
    return seen


class GoodClient(threading.Thread):
    """Sends pictures until the time is over; keeps how long each response took, and what went wrong."""

    def __init__(self, url, pictures, expected, number, until):
        super().__init__(daemon=True)
        self.url, self.pictures, self.expected, self.turn, self.until = url, pictures, expected, number, until
        self.seconds, self.failures = [], []

    def run(self):
        while time.monotonic() < self.until:
            self.turn = (self.turn + 1) % len(self.pictures)
            start = time.perf_counter()
            try:
                response = request(self.url, data=self.pictures[self.turn])
            except OSError as error:
                self.failures.append(f"no response: {error}")
                continue
            self.seconds.append(time.perf_counter() - start)
            if response != self.expected[self.turn]:
                self.failures.append(f"picture {self.turn}: {response!r:.200}")


# ---------------------------------------------------------------------------------------------------------------------
# Attacks: each returns the status codes that it got; 0 for a connection that was closed without a response


class Attacker(threading.Thread):
    """Runs one attack over and over until the time is over, and counts what it got."""

    def __init__(self, url, attack, until):
        super().__init__(daemon=True)
        self.url, self.attack, self.until, self.codes, self.errors = url, attack, until, Counter(), Counter()

    def run(self):
        while time.monotonic() < self.until:
            try:
                self.codes.update(self.attack(self.url))
            except OSError as error:
                self.errors[type(error).__name__] += 1
            time.sleep(0.2)


def connect(url, head):
    client = socket.create_connection(
        (urllib.parse.urlsplit(url).hostname, urllib.parse.urlsplit(url).port), timeout=60
    )
    client.sendall(head)
    return client


def status_of(client):
    """The status code of a response; 0 for none. The connection ends."""
    try:
        line = client.recv(4096).split(b" ", 2)
    except OSError:
        return 0
    finally:
        client.close()
    return int(line[1]) if len(line) > 1 else 0


def slow_body(url, sent=15_000_000):
    """A connection that has sent most of a large picture."""
    return connect(url, b"POST /detect HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 19000000\r\n\r\n" + bytes(sent))


def slow_bodies(url):
    clients = [slow_body(url) for _ in range(20)]
    time.sleep(10)
    return [status_of(client) for client in clients]


def slow_headers(url):
    clients = [connect(url, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ") for _ in range(20)]
    time.sleep(5)
    for client in clients:
        client.close()
    return []


def huge_headers(url):
    return [status_of(connect(url, b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"x" * 10**6))]


def forged_ids(url):
    names = ("x" * 22, "..%2f..%2fetc%2fpasswd", "%00", "http:%2f%2flocalhost%2f")
    return [request(url, f"pictures/{name}/detections.json")[0] for name in names]


def bad_pictures(url):
    """A JPEG cut short; files of formats that open or run something; 10,000 x 10,000 pixels in few bytes."""
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n{} loop\n"
    tags = ((3, 60, b"\x03\x01"), (3, 20, b"\0\x09"), (3, 30, b"\0\x09"), (3, 120, b"\x01"), (8, 10, program))
    iptc = b"".join(bytes((0x1C, part, tag)) + struct.pack(">H", len(value)) + value for part, tag, value in tags)
    cards = ("SIMPLE  = T", "BITPIX  = 8", "NAXIS   = 2", "NAXIS1  = 9", "NAXIS2  = 9", "END")
    fits = "".join(card.ljust(80) for card in cards).encode().ljust(2880) + bytes(2880)
    icon, large = encoded(Image.new("RGB", (64, 64)), "ICO"), encoded(Image.new("1", (10_000, 10_000)), "PNG")
    cut = encoded(Image.effect_noise((300, 200), 50), "JPEG")[:2000]
    return [request(url, data=data)[0] for data in (program, iptc, fits, icon, large, cut, b"hello")]


def other_sites(url):
    hosts = ({"Host": "evil.example"}, {"Host": "a@localhost"}, {"Origin": "http://evil.example"}, {"Origin": "null"})
    return [request(url, "about.json", headers=headers)[0] for headers in hosts]


def absurd_thresholds(url):
    picture = encoded(Image.new("RGB", (9, 9)), "PNG")
    queries = ("top_k=1000000000", "min_score=nan", "max_overlap=-1", "top_k=" + "9" * 5000, "path=/etc/passwd")
    return [request(url, f"detect?{query}", picture)[0] for query in queries]


def aborted_connections(url):
    picture = encoded(Image.effect_noise((1000, 800), 50), "PNG")
    head = f"POST /pictures HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(picture)}\r\n\r\n".encode()
    for body in (picture, picture[:1000]):
        client = connect(url, head + body)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, not an orderly end
        client.close()
    return []


ATTACKS = {  # and the status codes that each may get
    slow_bodies: {0, 408, 503},
    slow_headers: set(),
    huge_headers: {0, 400},
    forged_ids: {404},
    bad_pictures: {400},
    other_sites: {403},
    absurd_thresholds: {400},
    aborted_connections: set(),
}


def report(args, clients, attackers, idle, memory, end_seconds):
    """Prints what was measured; returns the exit status."""
    seconds = sorted(taken for client in clients for taken in client.seconds)
    failures = [failure for client in clients for failure in client.failures]
    cuts = [1000 * cut for cut in statistics.quantiles(seconds, n=100)]
    print(
        f"{time.strftime('%Y-%m-%d')}: {args.minutes:g} minutes, {len(clients)} good clients, {len(attackers)} attacks"
    )
    print(f"good clients: {len(seconds)} responses, {len(failures)} failures{': ' + failures[0] if failures else ''}")
    print(
        f"time to a good response: median {cuts[49]:.0f} ms, 90th percentile {cuts[89]:.0f}, 99th {cuts[98]:.0f}, "
        f"longest {1000 * seconds[-1]:.0f}"
    )
    got_in = {}
    for attacker in attackers:
        name, codes = attacker.attack.__name__, dict(sorted(attacker.codes.items()))
        print(f"{name}: status codes {codes}" + (f", errors {dict(attacker.errors)}" if attacker.errors else ""))
        if wrong := set(codes) - ATTACKS[attacker.attack]:
            got_in[name] = wrong
    tenth = len(memory) // 10
    early, late = statistics.median(memory[tenth : 2 * tenth]), statistics.median(memory[-tenth:])
    print(
        f"resident MB: {idle:.0f} idle, {early:.0f} in the second tenth, {late:.0f} in the last ({late / early:.3f} of "
        f"it, at most {MAX_GROWTH}), {max(memory):.0f} at most"
    )
    print(f"Ctrl-C ended the server in {end_seconds:.1f} s" + (f"; attackers got {got_in}" if got_in else ""))
    return 1 if failures or got_in or late > MAX_GROWTH * early or end_seconds > MAX_END_SECONDS else 0


if __name__ == "__main__":
    main()
