"""Files written whole or not at all, and what is written to in place: devices, pipes, standard output."""

import argparse
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from model import DEFAULT_CHECKPOINT
from utils import HelpFormatter, InputError, atomic_write, pick_device, write_text

ROOT = Path(__file__).parents[1]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "new" / "a.txt", "first")

    def stop_half_way():
        with atomic_write(tmp_path / "new" / "a.txt") as temporary:
            Path(temporary).write_text("second")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        stop_half_way()
    assert (tmp_path / "new" / "a.txt").read_text() == "first"
    assert os.listdir(tmp_path / "new") == ["a.txt"]


def test_files_have_the_mode_that_the_umask_leaves(tmp_path, monkeypatch):
    """Without setting the umask, which is the process's: another thread's files would have the wrong mode meanwhile."""
    old = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was set"))
        write_text(tmp_path / "a.txt", "text")
        (tmp_path / "b.txt").write_text("text")
    finally:
        monkeypatch.undo()
        os.umask(old)
    assert (
        stat.S_IMODE(os.stat(tmp_path / "a.txt").st_mode) == 0o640 == stat.S_IMODE((tmp_path / "b.txt").stat().st_mode)
    )


@pytest.mark.parametrize("name", ["a" * 250, "é" * 125, "狗" * 83])
def test_the_longest_file_names(name, tmp_path):
    write_text(tmp_path / name, "text")
    assert os.listdir(tmp_path) == [name]


def test_a_symbolic_link_stays(tmp_path):
    (tmp_path / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(tmp_path / "target.txt")
    write_text(tmp_path / "link.txt", "new")
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "target.txt").read_text() == "new"


def test_devices_and_pipes_stay(tmp_path):
    write_text("/dev/null", "text")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    os.mkfifo(tmp_path / "pipe")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "through it")
    reader.join(timeout=10)
    assert got == ["through it"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_standard_output_in_a_file_keeps_what_is_printed(name, tmp_path):
    code = "import sys; from utils import write_text; print('a'); write_text(sys.argv[1], 'b\\n'); print('c')"
    with open(tmp_path / "out.txt", "w") as file:
        subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, stdout=file, check=True)
    assert (tmp_path / "out.txt").read_text() == "a\nb\nc\n"


def test_devices_that_are_not_there():
    with pytest.raises(InputError, match="device 'tpu' is not available"):
        pick_device("tpu")


def test_help_texts_show_useful_defaults_alone():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    for name, default in (("none", None), ("flag", False), ("names", []), ("zero", 0), ("pair", [1, 2])):
        parser.add_argument(f"--{name}", default=default, help=f"the {name}")
    parser.add_argument("--checkpoint", default=DEFAULT_CHECKPOINT, help="the file")
    lines = " ".join(parser.format_help().split())
    for part in ("--none NONE the none --flag FLAG the flag --names NAMES the names --zero ZERO the zero (default: 0)",
                 "the pair (default: 1 2)", "the file (default: checkpoint/fpnssd300_lite_voc.pth.tar)"):  # fmt: skip
        assert part in lines
