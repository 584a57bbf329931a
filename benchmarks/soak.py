"""Half an hour of requests from several clients at once against app.py's endpoint, on this machine.

    python benchmarks/soak.py runs/lite/best.pth.tar                      # 30 minutes, 8 clients
    python benchmarks/soak.py runs/lite/best.pth.tar --minutes 1

Each client sends JPEGs of several sizes one after the other, now and then one that is none, and looks at the
answer. Printed: failures, throughput, percentiles of the time an answer takes, and the server's memory by the minute.
The run fails if an answer is wrong or missing, or if memory at the end is above 1.05 times that after a tenth.
"""

import argparse
import io
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
SIZES = ((500, 375), (1280, 960), (333, 500), (2000, 1500))  # of the JPEGs, in pixels
MOST_GROWTH = 1.05


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    args = parser.parse_args(argv)
    server, url = start_server(args.checkpoint)
    try:
        requests = make_requests()
        expected = [ask(url, data) for data in requests]  # (status, answer), to be given every time
        clients = [Client(url, requests, expected, number, 60 * args.minutes) for number in range(args.clients)]
        for client in clients:
            client.start()
        memory = watch_memory(server.pid, clients)
    finally:
        server.terminate()
        server.wait(30)
    sys.exit(report(clients, memory, args))


def start_server(checkpoint):
    """(process, url) of app.py, answering."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--checkpoint", checkpoint, "--port", str(port)]
    server, url = subprocess.Popen(command), f"http://127.0.0.1:{port}"
    while True:
        time.sleep(0.5)
        if server.poll() is not None:
            sys.exit("soak: app.py ended")
        try:
            urllib.request.urlopen(url, timeout=10).read()
            return server, url
        except urllib.error.URLError:
            continue


def make_requests():
    """Bodies: noise of several sizes as JPEG, and the first of them cut short."""
    rng = np.random.default_rng(0)
    bodies = []
    for size in SIZES:
        stream = io.BytesIO()
        noise = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        bodies.append(stream.getvalue())
    return [*bodies, bodies[0][: len(bodies[0]) // 2]]


def ask(url, data):
    """(status, JSON)"""
    request = urllib.request.Request(f"{url}/detect?min_score=0.05", data, {"Content-Type": "image/jpeg"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


class Client(threading.Thread):
    """Asks until the time is over; keeps how long each answer took, and what went wrong."""

    def __init__(self, url, requests, expected, number, seconds):
        super().__init__(daemon=True)
        self.url, self.requests, self.expected, self.number = url, requests, expected, number
        self.until, self.taken, self.failures = time.monotonic() + seconds, [], []

    def run(self):
        turn = self.number
        while time.monotonic() < self.until:
            which = turn % len(self.requests)
            turn += 1
            begin = time.perf_counter()
            try:
                answer = ask(self.url, self.requests[which])
            except OSError as error:
                self.failures.append(str(error))
                continue
            self.taken.append(time.perf_counter() - begin)
            if answer != self.expected[which]:
                self.failures.append(f"request {which}: {answer!r:.200}")


def watch_memory(process, clients):
    """[(seconds, resident MB)], ten times a minute, until all clients are done."""
    start, seen = time.monotonic(), []
    while any(client.is_alive() for client in clients):
        time.sleep(6)
        pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
        seen.append((time.monotonic() - start, pages * 4096 / 2**20))
    return seen


def report(clients, memory, args):
    """Prints what was measured; the exit status."""
    taken = sorted(seconds for client in clients for seconds in client.taken)
    failures = [failure for client in clients for failure in client.failures]
    begin, end = memory[len(memory) // 10][1], statistics.median(mb for _, mb in memory[-5:])
    cuts = statistics.quantiles(taken, n=100)
    print(f"{time.strftime('%Y-%m-%d')}: {len(taken)} answers in {args.minutes:g} minutes to {args.clients} clients")
    print(f"{len(failures)} failures{': ' + failures[0] if failures else ''}")
    print(
        f"{len(taken) / 60 / args.minutes:.1f} answers/s; an answer took {1000 * cuts[49]:.0f} ms in the median, "
        f"{1000 * cuts[89]:.0f} at the 90th percentile, {1000 * cuts[98]:.0f} at the 99th, {1000 * taken[-1]:.0f} at "
        "most"
    )
    steps = memory[:: max(1, len(memory) // 10)]
    print("resident MB: " + ", ".join(f"{mb:.0f} after {seconds / 60:.1f} min" for seconds, mb in steps))
    print(f"{end:.0f} MB at the end, {end / begin:.3f} of that after a tenth (at most {MOST_GROWTH})")
    return 1 if failures or end > MOST_GROWTH * begin else 0


if __name__ == "__main__":
    main()
