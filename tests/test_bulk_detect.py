"""bulk_detect.py: what detect.py finds, each picture once, whatever ends on the way."""

import contextlib
import io
import json
import os
import signal

import pytest
from PIL import Image
from sure_network import save_sure_network

import bulk_detect
import detect
from fpnssd.data.images import load_image
from fpnssd.inference import addresses, bulk
from fpnssd.inference.addresses import PictureReader, list_addresses
from fpnssd.inference.bulk import ResultFolder, Worker
from utils import InputError

try:
    import pyarrow as pa
    import ray  # noqa: F401
    from pyarrow import fs, parquet
except ImportError as error:
    if os.environ.get("CI"):  # make test installs them
        raise
    pytest.skip(f"{error.name} is not installed: pip install -e '.[bulk]'", allow_module_level=True)

SETTINGS = {"min_score": 0.3}


@pytest.fixture(scope="module")
def archive(drawn, tmp_path_factory):
    """A folder with a checkpoint (sure.pth.tar), and pictures/ with 14 pictures, of which 3 are broken."""
    folder = tmp_path_factory.mktemp("archive")
    save_sure_network(folder / "sure.pth.tar")
    (folder / "pictures" / "below").mkdir(parents=True)
    drawn = sorted((drawn / "voc" / "JPEGImages").iterdir())[:11]
    for number, path in enumerate(drawn):
        place = folder / "pictures" / ("below" if number % 2 else "") / path.name
        place.write_bytes(path.read_bytes())
    (folder / "pictures" / "cut.jpg").write_bytes(drawn[0].read_bytes()[:1000])
    (folder / "pictures" / "empty.png").touch()
    (folder / "pictures" / "text.jpg").write_text("no picture")
    return folder


@pytest.fixture
def in_archive(archive, monkeypatch):
    monkeypatch.chdir(archive)
    return archive


def detected(capsys, *arguments, batch_size=4):
    """What detect.py finds: {path: objects}, and {its messages}."""
    options = ["--checkpoint", "sure.pth.tar", "--json", "-", "--no-pictures", "--precision", "fp32"]
    options += ["--batch-size", str(batch_size)]
    with pytest.raises(SystemExit):  # as there are broken pictures
        detect.main([*arguments, *options])
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines() if line.startswith("{")]
    failures = {line.removeprefix("detect: ") for line in said.err.splitlines() if line.startswith("detect: ")}
    return {row["source"]: row for row in rows}, failures


def assert_same(rows, expected, failures):
    """Whether rows of the result are what detect.py found, box by box."""
    assert {row["error"] for row in rows if row["error"]} == failures
    read = [row for row in rows if not row["error"]]
    assert {row["path"] for row in read} == set(expected)
    for row in read:
        objects = expected[row["path"]]["objects"]
        assert (row["height"], row["width"]) == (expected[row["path"]]["height"], expected[row["path"]]["width"])
        assert row["names"] == [one["name"] for one in objects]
        assert row["labels"] == [one["label"] for one in objects]
        assert row["scores"] == [one["score"] for one in objects]
        assert row["boxes"] == [one["box"] for one in objects]


def a_worker(**changes):
    thresholds = {"min_score": 0.4, "max_overlap": 0.5, "top_k": 200}
    return Worker(**{"folder": ".", "checkpoint": "sure.pth.tar", "device": "cpu", "precision": "fp32",
                     "thresholds": thresholds, "batch_size": 4, "threads": 1, **changes})  # fmt: skip


def block(addresses):
    return pa.table({"address": pa.array(addresses, pa.large_string())})


def some_rows(*names):
    rows = [{"path": name, "boxes": [], "scores": [], "labels": [], "names": ["cat"]} for name in names]
    return pa.Table.from_pylist(rows, bulk.schema())


# ---------------------------------------------------------------------------------------------------------------------
# Addresses


def test_addresses_of_every_kind_of_input(in_archive, tmp_path):
    pictures = sorted(str(path) for path in (in_archive / "pictures").rglob("*.*"))
    (tmp_path / "list.txt").write_text("\ufeffa b.jpg\r\n\n s3://bucket/x#1.jpg\n")
    parquet.write_table(pa.table({"path": ["c.jpg", None, "d.jpg"], "n": [1, 2, 3]}), tmp_path / "list.parquet")
    parquet.write_table(pa.table({"bytes": [b"1", b"2"]}), tmp_path / "bytes.PARQUET")
    parquet.write_table(pa.table({"image": [{"bytes": b"1", "path": "x"}]}), tmp_path / "nested.parquet")
    for given, expected in (
        (in_archive / "pictures", pictures),
        (f"{in_archive}/pictures/*/*.jpg", [path for path in pictures if "/below/" in path]),
        (tmp_path / "list.txt", ["a b.jpg", " s3://bucket/x#1.jpg"]),
        (tmp_path / "list.parquet", ["c.jpg", "d.jpg"]),
        (tmp_path / "bytes.PARQUET", [f"{tmp_path}/bytes.PARQUET#0", f"{tmp_path}/bytes.PARQUET#1"]),
        (tmp_path / "nested.parquet", [f"{tmp_path}/nested.parquet#0"]),
        (in_archive / "pictures" / "cut.jpg", [f"{in_archive}/pictures/cut.jpg"]),
        (f"file://{in_archive}/pictures", [f"file://{path}" for path in pictures]),
    ):
        assert sorted(list_addresses([str(given)])) == sorted(expected), given
    for name in ("list.txt", "list.parquet"):
        (tmp_path / name).unlink()
    in_folder = [f"{tmp_path}/bytes.PARQUET#0", f"{tmp_path}/bytes.PARQUET#1", f"{tmp_path}/nested.parquet#0"]
    assert list(list_addresses([str(tmp_path)])) == in_folder  # a folder without pictures


@pytest.mark.parametrize("given", ["missing", "nothing/*.jpg", "empty", "other.parquet", "broken.parquet", "x://y/z"])
def test_inputs_that_hold_no_picture_are_named(given, in_tmp):
    (in_tmp / "empty").mkdir()
    (in_tmp / "broken.parquet").write_text("text")
    parquet.write_table(pa.table({"name": ["a"]}), "other.parquet")
    with pytest.raises(InputError, match=given.replace("*", r"\*")):
        list(list_addresses([given]))


def test_pictures_in_parquet_are_read_in_any_order(tmp_path):
    """Against the pixels that were stored; rows of 5 row groups of 7, the last shorter."""
    contents, colours = [], [(7 * n, 0, 0) for n in range(30)]
    for colour in colours:
        Image.new("RGB", (3, 2), colour).save(buffer := io.BytesIO(), "PNG")
        contents.append(buffer.getvalue())
    contents[11], contents[12] = None, b"no picture"
    path = tmp_path / "pictures.parquet"
    parquet.write_table(pa.table({"bytes": contents}), path, row_group_size=7)
    reader = PictureReader()
    for row in (0, 1, 2, 20, 21, 3, 29, 28, 7, 6, 13, 14):
        assert reader.load(f"{path}#{row}").getpixel((0, 0)) == colours[row]
    for row, words in ((11, "is missing"), (12, "is not a readable image"), (30, "is missing")):
        with pytest.raises(InputError, match=rf"image {path}#{row} {words}"):
            reader.load(f"{path}#{row}")
        assert reader.load(f"{path}#5").getpixel((0, 0)) == colours[5]


def test_after_a_failed_read_the_next_row_is_read_anew(monkeypatch, tmp_path):
    Image.new("RGB", (3, 2), (9, 0, 0)).save(buffer := io.BytesIO(), "PNG")
    begun = []

    def stored(address, start):
        begun.append(start)
        yield buffer.getvalue()
        if len(begun) == 1:
            raise OSError("connection reset")
        yield buffer.getvalue()

    monkeypatch.setattr(addresses, "_stored_pictures", stored)
    reader = PictureReader()
    assert reader.load("a.parquet#0").size == (3, 2)
    with pytest.raises(OSError, match="connection reset"):
        reader.load("a.parquet#1")
    assert reader.load("a.parquet#2").size == (3, 2)
    assert begun == [0, 2]


def test_remote_pictures_have_the_words_of_local_ones(in_archive):
    for name in ("cut.jpg", "text.jpg", "missing.jpg"):
        path = f"{in_archive}/pictures/{name}"
        with pytest.raises(InputError) as local:
            load_image(path)
        with pytest.raises(InputError) as remote:
            PictureReader().load(f"file://{path}")
        assert str(remote.value) == str(local.value).replace(path, f"file://{path}")


# ---------------------------------------------------------------------------------------------------------------------
# The worker and the result


def test_worker_finds_what_detect_finds(in_archive, capsys):
    expected, failures = detected(capsys, "pictures", "--min-score", "0.4")
    assert len(expected) == 11
    assert len(failures) == 3
    assert sum(len(row["objects"]) for row in expected.values()) > 20
    addresses = list(list_addresses(["pictures"]))
    table = a_worker()(block(addresses))
    assert table.schema == bulk.schema()
    assert table["path"].to_pylist() == addresses
    assert_same(table.to_pylist(), expected, failures)


def test_a_picture_that_fails_in_the_network_fails_alone(in_archive):
    worker = a_worker()
    predict = worker.detector.predict_images

    def failing(images, **thresholds):
        if any(image.width == 9 for image in images):
            raise InputError("sure.pth.tar: outputs are NaN")
        return predict(images, **thresholds)

    worker.detector.predict_images = failing
    Image.new("RGB", (9, 9)).save("nan.png")
    addresses = [*list(list_addresses(["pictures"]))[:3], "nan.png"]
    rows = worker(block(addresses)).to_pylist()
    assert [row["path"] for row in rows] == addresses
    assert [row["error"] for row in rows] == [None, None, None, "nan.png: sure.pth.tar: outputs are NaN"]


def test_a_failing_device_is_no_fault_of_the_picture(in_archive):
    worker = a_worker()

    def failing(images, **thresholds):
        raise RuntimeError("the device is lost")

    worker.detector.predict_images = failing
    with pytest.raises(RuntimeError, match="the device is lost"):
        worker(block(list(list_addresses(["pictures"]))))


def test_what_is_left_is_what_has_no_row(in_tmp):
    with ResultFolder("out", SETTINGS) as result:
        assert result.left(["a", "b", "a"]).to_pylist() == ["a", "b"]
        result.add(some_rows("b", "x"))
        result.write()
        result.write()  # of nothing
        result.add(some_rows("c"))
        result.write()
        assert len(result.files()) == 2
        assert result.written == 3
    with ResultFolder("out", SETTINGS) as result:
        assert result.left(["d", "c", "a", "b", "d"]).to_pylist() == ["d", "a"]
        assert result.summary() == {"pictures": 3, "errors": {}, "objects": {"cat": 3}}


def test_parts_are_written_now_and_then(in_tmp, monkeypatch):
    monkeypatch.setattr(bulk, "PART_ROWS", 3)
    with ResultFolder("out", SETTINGS) as result:
        for number in range(7):
            result.add(some_rows(str(number)))
        assert [parquet.read_metadata(file).num_rows for file in result.files()] == [3, 3]
        monkeypatch.setattr(bulk, "PART_SECONDS", 0)
        result.add(some_rows("7"))
        assert sorted(parquet.read_table("out")["path"].to_pylist()) == list("01234567")


def test_a_part_is_whole_or_not_there(in_tmp, monkeypatch):
    """The disk fills up in the middle of a part; before, a process was killed in the middle of one."""
    write_table = parquet.write_table

    def fill_disk(table, path):
        with open(path, "wb") as file:
            file.write(b"PAR1 and half of")
        raise OSError(28, "No space left on device")

    os.mkdir("out")
    (in_tmp / "out" / ".part-20260101-000000-abcdef-000000.parquet.1234").write_bytes(b"PAR1 and half of")
    with ResultFolder("out", SETTINGS) as result:
        assert os.listdir("out") == [".lock"]
        result.add(some_rows("a"))
        monkeypatch.setattr(parquet, "write_table", fill_disk)
        with pytest.raises(OSError, match="No space left"):
            result.write()
        assert os.listdir("out") == [".lock"]
        monkeypatch.setattr(parquet, "write_table", write_table)
        result.add(some_rows("b"))
        result.write()
    assert parquet.read_table("out")["path"].to_pylist() == ["a", "b"]


def test_results_of_other_settings_and_foreign_files_are_refused(in_tmp):
    with ResultFolder("out", SETTINGS) as result:
        result.add(some_rows("a"))
        result.write()
        with pytest.raises(InputError, match="another process writes to out"), ResultFolder("out", SETTINGS):
            pass
    with pytest.raises(InputError, match=r"out has results of min_score 0\.3, not 0\.4"):
        ResultFolder("out", {"min_score": 0.4}).__enter__()
    with ResultFolder("out", SETTINGS):  # an error leaves no lock
        pass
    parquet.write_table(pa.table({"path": ["b"]}), "out/mine.parquet")
    with pytest.raises(InputError, match=r"mine\.parquet was not written by bulk_detect\.py"):
        ResultFolder("out", SETTINGS).__enter__()
    (in_tmp / "out" / "mine.parquet").write_text("text")
    with pytest.raises(InputError, match=r"mine\.parquet is damaged"):
        ResultFolder("out", SETTINGS).__enter__()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "sure.pth.tar"], "sure.pth.tar is a file, not a folder"),
        (["--out", "o", "--min-score", "2"], "min_score is 2.0; it must lie in 0..1"),
        (["--out", "o", "--images", "missing"], "missing does not exist"),
        (["--out", "o", "--checkpoint", "none.tar"], "none.tar"),
        (["--out", "o", "--checkpoint", "pictures/text.jpg"], "pictures/text.jpg"),
    ],
)
def test_bad_arguments_end_before_ray_starts(in_archive, arguments, words, monkeypatch):
    monkeypatch.setattr(bulk_detect, "run", None)
    with pytest.raises(SystemExit) as end:
        bulk_detect.main(["--images", "pictures", "--checkpoint", "sure.pth.tar", *arguments])
    assert str(end.value).startswith("bulk_detect: ")
    assert words in str(end.value)


def die_with_the_first_rows(monkeypatch):
    monkeypatch.setattr(ResultFolder, "add", lambda self, rows: os.kill(os.getpid(), signal.SIGKILL))


def die_in_the_second_part(monkeypatch):
    write_table, parts = parquet.write_table, []

    def write(rows, path):
        write_table(rows, path)
        parts.append(path)
        if len(parts) == 2:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(parquet, "write_table", write)


def die_after_a_part(monkeypatch):
    write_part = ResultFolder.write

    def write(self):
        write_part(self)
        if self.written:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ResultFolder, "write", write)


def test_a_killed_command_goes_on(in_archive, tmp_path, monkeypatch, capsys):
    """Killed at three moments, one after the other; a worker in the command's own process stands for those of Ray."""

    def detections(left, block_rows, workers, args):
        worker = a_worker(batch_size=1)
        for start in range(0, len(left), 4):
            yield worker(block(left.slice(start, 4).to_pylist()))

    expected, failures = detected(capsys, "pictures", "--min-score", "0.4", batch_size=1)
    monkeypatch.setattr(bulk_detect, "detections", detections)
    monkeypatch.setattr(bulk_detect, "ray_session", lambda args: contextlib.nullcontext(1))
    monkeypatch.setattr(bulk, "PART_ROWS", 4)
    arguments = ["--images", "pictures", "--out", str(tmp_path), "--checkpoint", "sure.pth.tar"]
    for die, torn, rows in ((die_with_the_first_rows, 0, 0), (die_in_the_second_part, 1, 4), (die_after_a_part, 0, 8)):
        if not (child := os.fork()):
            die(monkeypatch)
            bulk_detect.main(arguments)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert len(list(tmp_path.glob(".part-*"))) == torn
        assert len(parquet.read_table(tmp_path) if rows else []) == rows  # whole files alone
    bulk_detect.main(arguments)
    assert f"{tmp_path}: 14 pictures (6 of them now" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob(".*")] == [".lock"]
    rows = parquet.read_table(tmp_path).to_pylist()
    assert len(rows) == 14
    assert_same(rows, expected, failures)


@pytest.mark.long
def test_an_object_store(in_archive, monkeypatch, capsys):
    """Pictures and result in a bucket of a local server."""
    server = pytest.importorskip("moto.server", reason="pip install 'moto[s3]' flask flask-cors")
    store = server.ThreadedMotoServer(port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        for name, value in (("ENDPOINT_URL", f"http://{host}:{port}"), ("REGION", "us-east-1"),
                            ("ACCESS_KEY_ID", "nobody"), ("SECRET_ACCESS_KEY", "nothing")):  # fmt: skip
            monkeypatch.setenv(f"AWS_{name}", value)
        bucket = fs.S3FileSystem(endpoint_override=f"{host}:{port}", scheme="http", allow_bucket_creation=True)
        bucket.create_dir("archive")
        fs.copy_files("pictures", "archive/pictures", source_filesystem=fs.LocalFileSystem(),
                      destination_filesystem=bucket)  # fmt: skip
        addresses = list(list_addresses(["s3://archive/pictures"]))
        assert len(addresses) == 14
        for left, number in ((addresses, 10), (addresses[10:], 4)):
            with ResultFolder("s3://archive/found", SETTINGS) as result:
                assert result.left(addresses).to_pylist() == left
                result.add(a_worker(batch_size=1)(block(left[:number])))
                result.write()
        rows = parquet.read_table("archive/found", filesystem=bucket).to_pylist()
        assert len(rows) == 14
        expected, failures = detected(capsys, "pictures", "--min-score", "0.4", batch_size=1)
        here = {f"s3://archive/{path}": row for path, row in expected.items()}
        assert_same(rows, here, {text.replace("pictures/", "s3://archive/pictures/") for text in failures})
    finally:
        store.stop()


# ---------------------------------------------------------------------------------------------------------------------
# With Ray


def test_the_command(in_archive, tmp_path, capsys, monkeypatch):
    """The command finds what detect.py finds, and goes on with what is left: here all but four pictures."""
    expected, failures = detected(capsys, "pictures", "--min-score", "0.4")
    arguments = ["--checkpoint", "sure.pth.tar", "--precision", "fp32", "--batch-size", "4", "--min-score", "0.4"]
    arguments += ["--out", str(tmp_path), "--concurrency", "1", "--images", "pictures", "pictures/*.jpg"]
    settings = bulk_detect.settings_of(bulk_detect.parse_args(arguments))
    with ResultFolder(str(tmp_path), settings) as result:
        result.add(a_worker()(block(list(list_addresses(["pictures"]))[:4])))
        result.write()
    monkeypatch.setenv("RAY_worker_niceness", "0")  # Ray's workers would wait for the other tests
    bulk_detect.main(arguments)
    said = capsys.readouterr().out
    assert f"{tmp_path}: 14 pictures (10 of them now" in said
    assert "3 failed\n  2 file is not an image\n  1 image damaged\n" in said
    rows = parquet.read_table(tmp_path).to_pylist()
    assert len(rows) == 14
    assert_same(rows, expected, failures)
