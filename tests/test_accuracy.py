"""The bench of recipes never mixes photographs that are trained on with those that are scored."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import experiments.accuracy
from experiments.screening import screening_ids

ROOT = Path(__file__).parents[1]
NAMES = {
    "train": [*(f"2008_{k:06d}.jpg" for k in range(6)), "000005.jpg", "000007.jpg", "coco_1.jpg", "coco_2.jpg"],
    "val": ["2009_000001.jpg", "2009_000002.jpg"],
}


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.setattr(experiments.accuracy, "SCREENING_IMAGES", 3)
    return experiments.accuracy


@pytest.fixture
def data(tmp_path):
    """A folder with data lists train and val of photographs that all differ."""
    rng = np.random.default_rng(0)
    (tmp_path / "lists").mkdir()
    for split, names in NAMES.items():
        for name in names:
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(tmp_path / name)
        images = [{"id": k, "file_name": name, "height": 8, "width": 8} for k, name in enumerate(names, start=1)]
        objects = [{"id": k, "image_id": k, "category_id": 1, "bbox": [0, 0, 4, 4]} for k in range(1, len(names) + 1)]
        content = {
            "info": {"image_root": str(tmp_path)}, "images": images, "annotations": objects,
            "categories": [{"id": 1, "name": "a"}],
        }  # fmt: skip
        (tmp_path / "lists" / f"{split}.json").write_text(json.dumps(content))
    return tmp_path / "lists"


def test_screening_scores_what_it_does_not_train_on(accuracy, data):
    folder = accuracy.lists_of("screen", data)
    parts = {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val")}
    names = {split: {image["file_name"] for image in part["images"]} for split, part in parts.items()}
    assert len(names["val"]) == 3
    assert all(name.startswith("2008_") for name in names["val"])  # VOC2012's, by their names
    assert names["train"] | names["val"] == set(NAMES["train"])
    for part in parts.values():
        assert {one["image_id"] for one in part["annotations"]} == {image["id"] for image in part["images"]}
    assert accuracy.lists_of("screen", data) == folder
    assert json.loads((folder / "val.json").read_text()) == parts["val"]  # the same ones again
    assert accuracy.lists_of("confirm", data) == data


def test_a_photograph_under_two_names_is_found(accuracy, data):
    (data.parent / "2009_000001.jpg").write_bytes((data.parent / "coco_2.jpg").read_bytes())
    with pytest.raises(ValueError, match=r"2009_000001\.jpg of val is .*coco_2\.jpg of train"):
        accuracy.lists_of("confirm", data)


def test_table_says_what_differs_and_what_is_noise(accuracy, data, monkeypatch, capsys):
    """Two images of one object: base finds none, good both, the other one with the same boxes as base."""
    monkeypatch.chdir(data.parent)
    found = {"base": [], "good": [[0, 0, 4, 4]], "same": []}
    for name, boxes in found.items():
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        detections = [{"image_id": k, "category_id": 1, "bbox": box, "score": 0.9} for k in (1, 2) for box in boxes]
        (folder / "detections.json").write_text(json.dumps(detections))
        scores = {score: "" if score == "coco_ap_small" else 40.0 + len(boxes) for score in accuracy.SCORES}
        limits = {f"{score}_{end}": 30 for score in ("voc2007_ap50", "coco_ap") for end in ("low", "high")}
        asked = {"stage": "confirm", "variant": name, "seed": "0", "epochs": "12"}
        accuracy.add_row(Path("results.csv"), {"run": name, "minutes": 1} | asked | scores | limits, asked)
    accuracy.main(["table", "confirm", "--data", "lists", "--results", "results.csv"])
    lines = {line.split(" | ")[0].strip("| "): line for line in capsys.readouterr().out.splitlines()}
    assert "40.0 (30.0 .. 30.0) | 40.0 (30.0 .. 30.0) | - / 40.0 / 40.0 | 1.0 |" in lines["base"]
    assert "+100.0 (+100.0 .. +100.0): better" in lines["good"]
    assert "+0.0 (+0.0 .. +0.0): noise (seed 0)" in lines["same"]


def test_rows_of_many_writers_are_all_kept(accuracy, tmp_path):
    results = tmp_path / "new" / "results.csv"
    asked = [{"variant": f"v{k}", "seed": str(seed)} for k in range(8) for seed in range(5)]
    with ThreadPoolExecutor(8) as pool:  # each opens the folder itself, as processes would
        list(pool.map(lambda one: accuracy.add_row(results, one | {"score": "1"}, one), asked))
    accuracy.add_row(results, asked[3] | {"score": "2"}, asked[3])
    rows = accuracy.read_results(results)
    assert sorted((row["variant"], row["seed"]) for row in rows) == [tuple(one.values()) for one in asked]
    assert [row["score"] for row in rows].count("2") == 1


def test_every_variant_is_a_recipe(accuracy):
    base = accuracy.config_hash(accuracy.variant_config("base", "screen", 0, "data", 12), "base")
    for name in accuracy.VARIANTS:
        config = accuracy.variant_config(name, "screen", 0, "data", 12)
        assert (accuracy.config_hash(config, name) == base) == (name == "base"), name
        other = accuracy.replace(config, name="other", workers=3)
        assert accuracy.config_hash(config, name) == accuracy.config_hash(other, name)
    both = accuracy.variant_config("copy_paste+giou", "screen", 0, "data", 12)
    assert (both.augment.copy_paste, both.box_loss) == (0.5, "giou")
    with pytest.raises(ValueError, match="no variant 'giou\\+none'"):
        accuracy.run_variant("screen", "giou+none", 0, "data", 12, Path("results.csv"))


def test_rows_belong_to_the_recipe_as_it_is(accuracy, monkeypatch):
    """Whoever changes a recipe behind its rows has to say so: in TAKEN_BACK, or by running it again."""
    gone = {"atss+tower", "copy_paste+atss_quality+shared_heads"}  # variants of options that left the code
    gone |= {"atss_quality+no_way_down", "copy_paste+atss_quality+balance+train_batch_norm"}
    rows = [row for row in accuracy.read_results(ROOT / accuracy.RESULTS) if not accuracy.peer_of(row["variant"])]
    assert len(rows) > 15
    for row in (one for one in rows if one["variant"] not in gone):
        folder = {
            "screen": "data/vocreal_screen",
            "confirm": "data/vocreal",
            "large": "data/vocreal_large_screen_large",
        }[row["stage"]]
        asked = (row["variant"], row["stage"], int(row["seed"]), folder, int(row["epochs"]))
        assert accuracy.config_hash(accuracy.variant_config(*asked), row["variant"]) == row["config_hash"], row["run"]
    before = accuracy.config_hash(accuracy.variant_config("base", "screen", 0, "data", 12), "base")
    other = accuracy.replace(accuracy.variant_config("base", "screen", 0, "data", 12), box_weight=1.5)
    changed = accuracy.replace(accuracy.TrainConfig(), box_weight=1.5)
    monkeypatch.setattr(accuracy, "TrainConfig", lambda: changed)  # if that were the default
    assert accuracy.config_hash(other, "base") != before


def test_a_run_gone_on_with_has_both_revisions(accuracy, data, monkeypatch, tmp_path):
    """Stopped in its first epoch, gone on with after a commit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(accuracy, "train_ours", lambda config, folder: sys.exit("stopped"))
    for name in ("one", "one", "two"):
        monkeypatch.setattr(accuracy, "revision", lambda name=name: name)
        with pytest.raises(SystemExit, match="stopped"):
            accuracy.run_variant("confirm", "base", 0, data, 12, Path("results.csv"))
    (begun,) = Path("runs").glob("accuracy_confirm_base_0_12_*/revision")
    assert begun.read_text() == "one two"


def test_peers_take_the_variants_of_what_they_share(accuracy):
    plain = accuracy.variant_config("torchvision_fcos", "screen", 0, "data", 12)
    slower = accuracy.variant_config("torchvision_fcos+half_lr", "screen", 0, "data", 12)
    assert slower.lr == plain.lr / 2
    assert accuracy.config_hash(plain, "torchvision_fcos") != accuracy.config_hash(slower, "torchvision_fcos+half_lr")
    accuracy.check_name("torchvision_fcos+half_lr")
    with pytest.raises(ValueError, match="peers have their own augment.close_epochs, augment.copy_paste"):
        accuracy.check_name("torchvision_fcos+copy_paste")


def test_the_large_screening_list_has_all_classes_and_sources():
    rng = np.random.default_rng(0)
    names = (
        [f"coco_{k}.jpg" for k in range(120)]
        + [f"2008_{k:06}.jpg" for k in range(60)]
        + [f"{k:06}.jpg" for k in range(20)]
    )
    images = [{"id": k, "file_name": name} for k, name in enumerate(names, start=1)]
    classes = rng.choice([1, 2, 3], p=[0.9, 0.07, 0.03], size=(200, 4))
    annotations = [{"image_id": k, "category_id": int(c)} for k, row in enumerate(classes, start=1) for c in row]
    taken = screening_ids({"images": images, "annotations": annotations}, count=40, per_class=5)
    assert taken == screening_ids({"images": images[::-1], "annotations": annotations[::-1]}, count=40, per_class=5)
    assert [sum(low < k <= high for k in taken) for low, high in ((0, 120), (120, 180), (180, 200))] == [24, 12, 4]
    assert min(np.bincount(classes[np.array(sorted(taken)) - 1].ravel(), minlength=4)[1:]) >= 5
