"""eval.py reads what bulk_detect.py wrote."""

import json
import os

import numpy as np
import pytest
import torch
from test_metrics import make_detections, make_list, random_case

import eval as eval_command
from fpnssd.data.data_list import DataList, Strings
from fpnssd.data.images import DataError
from fpnssd.evaluation.metrics import compute_metrics
from fpnssd.evaluation.parquet_results import read_parquet
from fpnssd.inference import bulk

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError:
    if os.environ.get("CI"):  # make test installs it
        raise
    pytest.skip("no pyarrow: pip install -e '.[bulk]'", allow_module_level=True)


def row(data_list, path, size, found, **changes):
    """A row as bulk_detect.py writes it, of one image's detections."""
    names = [data_list.classes[label - 1] for label in found["labels"].tolist()]
    lists = {name: found[name].tolist() for name in ("boxes", "scores", "labels")}
    return {"path": path, "height": int(size[0]), "width": int(size[1]), **lists, "names": names, **changes}


def write(folder, rows, parts=1):
    for number in range(parts):
        parquet.write_table(pa.Table.from_pylist(rows[number::parts], bulk.schema()), folder / f"{number}.parquet")
    return folder


def named(data_list, folder):
    """The list, with files 0.jpg, 1.jpg and so on in a folder."""
    data_list.file_names = Strings.of([f"{index}.jpg" for index in range(len(data_list))])
    data_list.image_root = folder
    return data_list


def test_the_same_detections_score_the_same(tmp_path):
    """In three files, in another order, among pictures of others; the first half of the paths relative."""
    rng = np.random.default_rng(0)
    for case in range(5):
        objects, found = random_case(rng)
        data_list = named(make_list(objects), tmp_path / "photos")
        detections = make_detections(found)
        paths = [f"photos/{k}.jpg" if k % 2 else str(tmp_path / f"photos/{k}.jpg") for k in range(len(data_list))]
        rows = [row(data_list, *one) for one in zip(paths, data_list.sizes, detections, strict=True)]
        rows += [{**rows[0], "path": "photos/other.jpg"}, {**rows[0], "path": "s3://bucket/10.jpg#1"}]
        (folder := tmp_path / str(case)).mkdir()
        again, problems = read_parquet(write(folder, [rows[k] for k in rng.permutation(len(rows))], 3), data_list)
        assert problems == {}
        for result in detections:  # files hold float32
            result |= {name: result[name].float().double() for name in ("boxes", "scores")}
        assert compute_metrics(data_list, again) == compute_metrics(data_list, detections)


def test_a_row_is_of_one_image(tmp_path):
    """Of cam1/0.jpg and cam2/0.jpg: a path of its own decides, the name alone does not."""
    data_list = named(make_list([[], []], 2), tmp_path / "photos")
    data_list.file_names = Strings.of(["cam1/0.jpg", "cam2/0.jpg"])
    found = make_detections([[((1, 2, 3, 4), 0.5, 1)]])[0]
    (tmp_path / "short").mkdir()
    (tmp_path / "own").mkdir()
    with pytest.raises(DataError, match=r"0\.jpg may be both .*cam1/0\.jpg and .*cam2/0\.jpg"):
        read_parquet(write(tmp_path / "short", [row(data_list, "0.jpg", data_list.sizes[0], found)]), data_list)
    own = row(data_list, str(tmp_path / "photos/cam1/0.jpg"), data_list.sizes[0], found)
    again, problems = read_parquet(write(tmp_path / "own", [own]), data_list, skip_bad=True)
    assert [len(result["scores"]) for result in again] == [1, 0]
    assert problems == {"no row": 1}


@pytest.fixture
def two(tmp_path):
    """A list of two images, and the rows of their detections."""
    data_list = named(make_list([[((10, 10, 110, 110), 1, False, False)], []], 2), tmp_path / "photos")
    found = {"boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]), "scores": torch.tensor([0.5]), "labels": torch.tensor([2])}
    return data_list, [row(data_list, f"photos/{k}.jpg", data_list.sizes[k], found) for k in range(2)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "photos/2.jpg"}, "no row"),
        ({"path": "x0.jpg"}, "no row"),
        ({"error": "image is damaged"}, "could not read"),
        ({"height": 7}, "another size"),
        ({"names": ["unicorn"]}, r"lacks \(unicorn\)"),
    ],
)
def test_images_without_detections_are_named(two, tmp_path, changes, words):
    data_list, rows = two
    write(tmp_path, [{**rows[0], **changes}, rows[1]])
    with pytest.raises(DataError, match=rf"1 images: .*{words}.*, first {tmp_path}/photos/0\.jpg\. --skip-bad"):
        read_parquet(tmp_path, data_list)
    (first, second), problems = read_parquet(tmp_path, data_list, skip_bad=True)
    assert list(problems.values()) == [1]
    assert len(first["scores"]) == 0
    assert second["boxes"].tolist() == [[1, 2, 3, 4]]
    assert second["labels"].tolist() == [2]


def test_two_rows_of_one_image(two, tmp_path):
    data_list, rows = two
    write(tmp_path, [*rows, {**rows[0], "path": "/elsewhere/0.jpg"}])
    with pytest.raises(DataError, match=r"photos/0\.jpg and /elsewhere/0\.jpg may both be "):
        read_parquet(tmp_path, data_list)
    own = {**rows[0], "path": str(tmp_path / "photos/0.jpg"), "boxes": [[5, 6, 7, 8]]}
    for order in ([*rows, own], [own, *rows]):
        assert read_parquet(write(tmp_path, order), data_list)[0][0]["boxes"].tolist() == [[5, 6, 7, 8]]


def test_other_folders_are_refused(two, tmp_path):
    with pytest.raises(DataError, match="holds no Parquet files"):
        read_parquet(tmp_path, two[0])
    parquet.write_table(pa.table({"path": ["0.jpg"]}), tmp_path / "x.parquet")
    with pytest.raises(DataError, match="is not a result of bulk_detect"):
        read_parquet(tmp_path, two[0])
    (tmp_path / "x.parquet").write_text("text")
    with pytest.raises(DataError, match="is not a result of bulk_detect"):
        read_parquet(tmp_path, two[0])


def test_the_command_reads_a_folder(drawn, tmp_path):
    """Detections that are the ground truth: all AP is 100."""
    data_list = DataList.load(drawn / "val.json")
    rows = []
    for index in range(len(data_list)):
        target = data_list.target(index)
        found = {"boxes": target["boxes"], "labels": target["labels"], "scores": np.full(len(target["labels"]), 0.9)}
        rows.append(row(data_list, str(data_list.image_path(index)), target["size"], found))
    (folder := tmp_path / "found").mkdir()
    arguments = ["--detections", str(write(folder, rows[1:])), "--data", str(drawn), "--intervals", "0"]
    with pytest.raises(SystemExit, match="eval: .*1 images: no row"):
        eval_command.main(arguments)
    write(folder, rows)
    eval_command.main([*arguments, "--json", str(tmp_path / "metrics.json")])
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["voc2007_ap50"] == metrics["coco_ap"] == 1
