"""What README.md and docs/ say can be done: links lead somewhere, commands parse, Python runs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(p for p in ROOT.glob("*/*.md") if p.parts[-2] not in ("runs", "data"))])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PARSED = ("create_data_lists", "train", "eval", "detect", "export", "app", "datasets", "bulk_detect")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        assert file.exists(), f"{name_of(page)} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in anchors_of(file), f"{name_of(page)} links to {target}"


def commands_of(page: Path) -> list[str]:
    """The lines of a page's blocks that have no language, continued lines joined."""
    blocks = [
        body for language, body in BLOCK.findall(page.read_text(encoding="utf-8")) if language in ("", "sh", "bash")
    ]
    return [line.strip() for body in blocks for line in re.sub(r"\\\n\s*", " ", body).splitlines()]


def scripts_of(line: str) -> list[tuple[str, list[str]]]:
    """(script, arguments) of each of the project's commands in a shell line."""
    found = []
    line = re.sub(r"\$\([^)]*\)", "", line)  # what a shell would put in
    for part in re.split(r"\s(?:\||&&|;)\s", line):
        try:
            words = shlex.split(part, comments=True)
        except ValueError:  # a line of something else
            continue
        words = [word for word in words if not re.fullmatch(r"\w+=\S*", word) or words.index(word) > 0]
        if not words or words[0] not in ("python", "python3", "torchrun", "srun"):
            continue
        for place, word in enumerate(words):
            script = re.fullmatch(r"(\w+)\.py", word)
            if script and script[1] in PARSED:
                arguments = [word for word in words[place + 1 :] if not re.search(r"[$`\[\]]|^(&&|\|\|)$", word)]
                ends = [k for k, one in enumerate(arguments) if one in (">", ">>", "2>", "<")]
                found.append((script[1], arguments[: ends[0]] if ends else arguments))
                break
    return found


COMMANDS = [(page, script, argv) for page in PAGES for line in commands_of(page) for script, argv in scripts_of(line)]


def test_there_are_commands():
    assert len({script for _, script, _ in COMMANDS}) >= 5


@pytest.mark.parametrize(
    ("page", "script", "argv"), COMMANDS, ids=[f"{name_of(page)}:{s} {' '.join(a)}"[:100] for page, s, a in COMMANDS]
)
def test_commands_parse(page, script, argv):
    pytest.importorskip("starlette") if script == "app" else None
    importlib.import_module(script).parse_args(argv)  # argparse ends the process where an option is unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in commands_of(page):
        named = re.match(r"make ([\w-]+)", line)
        assert not named or named[1] in targets, line


def python_blocks(page: Path) -> list[str]:
    return [body for language, body in BLOCK.findall(page.read_text(encoding="utf-8")) if language == "python"]


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
def test_python_examples_run(page, tmp_path, monkeypatch):
    """A page's blocks run in order, as a reader would type them in the repository with a few photographs."""
    for entry in ("checkpoint", "detected_img"):
        (tmp_path / entry).symlink_to(ROOT / entry)
    for name in ("photo.jpg", "a.jpg", "b.png"):
        Image.open(ROOT / "detected_img" / "chelsea.jpg").save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    names = {}
    for body in python_blocks(page):
        if "onnxruntime" not in body:  # tests/test_export.py runs that one, where torch cannot be imported
            exec(compile(body, name_of(page), "exec"), names)


def test_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.encode()) <= 9 * 1024
    assert all(len(line) <= 100 or line.startswith("|") for line in text.splitlines())
