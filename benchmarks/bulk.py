"""bulk_detect.py beside detect.py on the same pictures, and its memory by the number of pictures.

    python -m benchmarks.bulk throughput --images photos/ --rounds 2
    python -m benchmarks.bulk memory                    # drawn pictures, a tiny network

CPU seconds are those of all processes of a command, Ray's included, read each second while they run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from pyarrow import parquet

from fpnssd.data.synthetic import draw_dataset
from model import DEFAULT_CHECKPOINT, FPNSSD, ModelConfig, save_checkpoint

ROOT = Path(__file__).parents[1]
TICKS = os.sysconf("SC_CLK_TCK")
DRAWN = 100  # different pictures of the memory test


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("part", choices=("throughput", "memory"))
    parser.add_argument("--images", help="folder of pictures, for throughput")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="for throughput")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each command (2)")
    parser.add_argument("--numbers", type=int, nargs="+", default=[10_000, 40_000], help="of pictures, for memory")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        measure = measure_throughput if args.part == "throughput" else measure_memory
        for row in measure(Path(folder), args):
            print("; ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def measure_throughput(folder, args):
    """Both commands in turn, with one worker of one core; then how the boxes differ."""
    common = ["--checkpoint", args.checkpoint]
    for number in range(args.rounds):
        detect = [args.images, "--json", str(folder / "found.jsonl"), "--no-pictures", *common]
        bulk = ["--images", args.images, "--out", str(folder / f"found{number}"), "--concurrency", "1", *common]
        for script, arguments in (("detect.py", detect), ("bulk_detect.py", bulk)):
            used = watch(script, arguments)
            yield {script: "", "CPU s": round(used["cpu"], 1), "s": round(used["seconds"], 1)}
    yield compare(folder / "found.jsonl", folder / "found0")


def compare(lines, found):
    """How rows of the two results differ."""
    expected = {row["source"]: row for row in map(json.loads, lines.read_text().splitlines())}
    rows = parquet.read_table(found).to_pylist()
    read = {row["path"]: row for row in rows if not row["error"]}
    equal, largest = 0, 0.0
    for path, row in read.items():
        objects = expected[path]["objects"]
        names, scores, boxes = ([detected[key] for detected in objects] for key in ("name", "score", "box"))
        equal += (row["names"], row["scores"], row["boxes"]) == (names, scores, boxes)
        if row["names"] == names and names:
            largest = max(largest, (torch.tensor(row["boxes"]) - torch.tensor(boxes)).abs().max().item())
    return {
        "pictures": len(rows),
        "failed": len(rows) - len(read),
        "read by one command alone": len(set(read) ^ set(expected)),
        "equal bit for bit": equal,
        "objects": sum(len(row["names"]) for row in rows),
        "largest difference of a box, pixels": largest,
    }


def measure_memory(folder, args):
    """Peaks for numbers of pictures: links to some drawn ones, in folders of 1,000."""
    torch.manual_seed(0)
    save_checkpoint(f"{folder}/tiny.pth.tar", FPNSSD(ModelConfig(("a", "b"), "test_resnet", 64, fpn_channels=16)))
    draw_dataset(Path(folder) / "voc", {"train": DRAWN}, seed=0)
    drawn = sorted((Path(folder) / "voc" / "JPEGImages").iterdir())
    for count in args.numbers:
        for number in range(count):
            link = Path(folder) / str(count) / f"{number // 1000:05d}" / f"{number:08d}.jpg"
            link.parent.mkdir(parents=True, exist_ok=True)
            os.link(drawn[number % DRAWN], link)
        arguments = ["--images", f"{folder}/{count}", "--out", f"{folder}/found{count}", "--concurrency", "1"]
        used = watch("bulk_detect.py", [*arguments, "--checkpoint", f"{folder}/tiny.pth.tar"])
        yield {"pictures": count, **{f"{name}, MB at most": round(used[name]) for name in ("command", "worker", "all")},
               "CPU s": round(used["cpu"]), "s": round(used["seconds"])}  # fmt: skip


def watch(script, arguments):
    """Runs a script of the project.

    Returns:
        seconds; cpu: CPU seconds of all its processes; and the largest memory of the command and of a worker (RSS), and
        of all processes together (PSS), in MB.
    """
    begin = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / script), *arguments], stdout=subprocess.DEVNULL)
    cpu, peak = {}, {"command": 0.0, "worker": 0.0, "all": 0.0}
    command = psutil.Process(process.pid)
    while process.poll() is None:
        together = 0.0
        for member in [command, *command.children(recursive=True)]:
            try:
                times, memory, name = member.cpu_times(), member.memory_full_info(), " ".join(member.cmdline())
            except psutil.Error:  # it has just ended
                continue
            cpu[member.pid] = times.user + times.system
            together += memory.pss / 2**20
            kind = "command" if member == command else "worker" if "MapWorker" in name else None
            if kind:
                peak[kind] = max(peak[kind], memory.rss / 2**20)
        peak["all"] = max(peak["all"], together)
        time.sleep(1)
    assert process.returncode == 0 or script == "detect.py", process.returncode  # detect.py: 1 for broken pictures
    return {"seconds": time.monotonic() - begin, "cpu": sum(cpu.values()), **peak}


if __name__ == "__main__":
    main()
