"""bulk_detect.py on two Ray nodes, with processes killed and a full disk. All of it is long."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bulk_detect import archive, assert_same, detected, in_archive  # noqa: F401  # fixtures among them

parquet = pytest.importorskip("pyarrow.parquet", reason="pip install -e '.[bulk]'")
psutil = pytest.importorskip("psutil")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = pytest.mark.long
ROOT = Path(__file__).parents[1]
COMMAND = """
import os, signal, sys
import bulk_detect
from fpnssd.inference import bulk
from pyarrow import parquet
bulk.PART_ROWS = 4  # several parts, of several blocks
bulk_detect.BLOCK_BATCHES = 2
def end():
    os.kill(os.getpid(), signal.SIGKILL)
parts = 0
{change}
bulk_detect.main()
"""
DEATHS = {
    "with the first rows": "bulk.ResultFolder.add = lambda self, rows: end()",
    "in the middle of a part": """
write_table = parquet.write_table
def write(rows, path):
    global parts
    parts += 1
    write_table(rows, path)
    if parts == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        end()
parquet.write_table = write
""",
    "after a part": """
write_part = bulk.ResultFolder.write
def write(self):
    write_part(self)
    if self.written:
        end()
bulk.ResultFolder.write = write
""",
}


@pytest.fixture(scope="module")
def cluster():
    """The address of two Ray nodes of a core each, on loopback."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        options = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
        nodes = cluster_utils.Cluster()
        try:
            nodes.add_node(include_dashboard=False, **options)
            nodes.add_node(**options)
            yield nodes.address
        finally:
            nodes.shutdown()


def start(*arguments, change=""):
    """Starts bulk_detect.py, changed by some code. Batches of one picture: no row depends on which are left."""
    options = ["--checkpoint", "sure.pth.tar", "--precision", "fp32", "--batch-size", "1", "--min-score", "0.4"]
    with open("output.txt", "w") as output:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(change=change), *options, *map(str, arguments)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "RAY_worker_niceness": "0"},
        )


def finish(process):
    """(exit status, what it printed) of the process that was started last."""
    process.wait(600)
    return process.returncode, Path("output.txt").read_text()


@pytest.fixture
def expected(in_archive, capsys):  # noqa: F811
    return detected(capsys, "pictures", "--min-score", "0.4", batch_size=1)


def assert_complete(folder, expected):
    """Whether each picture is in the result once, with what detect.py finds."""
    rows = parquet.read_table(folder).to_pylist()
    assert len(rows) == 14
    assert_same(rows, *expected)


def workers():
    """{process id: its node's process id} of the cluster's workers that hold a detector."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "MapWorker(MapBatches(Worker))" in " ".join(process.cmdline()):
                found[process.pid] = process.ppid()
    return found


def test_two_nodes_and_a_killed_worker(cluster, expected, tmp_path, in_archive):  # noqa: F811
    """One worker of the two is killed when some rows are written."""
    many = tmp_path / "many.txt"
    pictures = sorted(str(path) for path in Path("pictures").rglob("*.*"))
    # Twenty addresses of each file.
    many.write_text("\n".join("./" * number + path for number in range(20) for path in pictures))
    process = start("--images", many, "--out", tmp_path / "out", "--address", cluster, "--concurrency", "2")
    nodes, killed = set(), None
    while process.poll() is None:
        running = workers()
        nodes |= set(running.values())
        if killed is None and len(nodes) == 2 and list((tmp_path / "out").glob("*.parquet")):
            killed = max(running)
            os.kill(killed, 9)
        time.sleep(0.02)
    status, output = finish(process)
    assert status == 0, output
    assert len(nodes) == 2
    assert killed
    table = parquet.read_table(tmp_path / "out")
    assert len(set(table["path"].to_pylist())) == len(table) == 20 * 14
    for number in range(20):
        rows = [row for row in table.to_pylist() if row["path"].startswith("./" * number + "pictures")]
        names = {path: f"{'./' * number}{path}" for path in pictures}
        renamed = {names[path]: row for path, row in expected[0].items()}
        assert_same(rows, renamed, {text.replace("pictures/", f"{'./' * number}pictures/") for text in expected[1]})


def test_a_killed_command_goes_on(cluster, expected, tmp_path):
    arguments = ("--images", "pictures", "--out", tmp_path, "--address", cluster, "--concurrency", "2")
    rows = 0
    for moment, change in DEATHS.items():
        status, output = finish(start(*arguments, change=change))
        assert status == -9, (moment, output)
        paths = [path for file in tmp_path.glob("*.parquet") for path in parquet.read_table(file)["path"].to_pylist()]
        assert len(paths) == len(set(paths)) >= rows, moment
        rows = len(paths)
        assert len(list(tmp_path.glob(".part-*"))) == (moment == "in the middle of a part")
    assert 0 < rows < 14
    status, output = finish(start(*arguments))
    assert status == 0, output
    assert_complete(tmp_path, expected)
    assert sorted(path.name[:5] for path in tmp_path.glob(".*")) == [".lock"]
    assert f"14 pictures ({14 - rows} of them now" in output


def test_a_full_disk(cluster, expected, tmp_path):
    """The disk has room for one part of the three."""
    arguments = ("--images", "pictures", "--out", tmp_path / "disk", "--address", cluster, "--concurrency", "1")
    (tmp_path / "disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=28k", "tmpfs", tmp_path / "disk"], check=False).returncode:
        pytest.skip("a small disk needs root")
    try:
        status, output = finish(start(*arguments))
        assert status == 1
        assert "bulk_detect: " in output
        assert "No space left on device" in output
        before = parquet.read_table(tmp_path / "disk")["path"].to_pylist()
        assert 0 < len(before) < 14
        subprocess.run(["mount", "-o", "remount,size=1m", tmp_path / "disk"], check=True)
        status, output = finish(start(*arguments))
        assert status == 0, output
        assert_complete(tmp_path / "disk", expected)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path / "disk"], check=True)  # a process of Ray may still look at it


def test_nothing_of_a_killed_command_outlives_it(tmp_path, in_archive):  # noqa: F811
    """Processes of Ray, where the command itself started it, end by themselves: the last after 61 s on two cores."""
    process = start(
        "--images", "pictures", "--out", tmp_path, "--concurrency", "1", change=DEATHS["with the first rows"]
    )
    family = set()
    while process.poll() is None:
        with contextlib.suppress(psutil.Error):  # it has just ended
            family |= set(psutil.Process(process.pid).children(recursive=True))
        time.sleep(0.2)
    status, output = finish(process)
    assert status == -9, output
    assert len(family) > 5
    _, alive = psutil.wait_procs([member for member in family if is_running(member)], timeout=180)
    assert not [member for member in alive if is_running(member)]


def is_running(process):
    """Whether a process runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
