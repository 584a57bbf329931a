"""From a checkpoint and a list to the table; whoever predicts is scored alike."""

import json

import pytest
import torch

from datasets import DataList
from eval import evaluate, main
from model import FPNSSD, ModelConfig, save_checkpoint


@pytest.fixture(scope="module")
def checkpoint(drawn, tmp_path_factory):
    torch.manual_seed(0)
    classes = DataList.load(drawn / "val.json").classes
    path = tmp_path_factory.mktemp("checkpoint") / "small.pth.tar"
    save_checkpoint(path, FPNSSD(ModelConfig(classes, "resnet18", image_size=64, fpn_channels=16)))
    return path


def test_table_and_json(checkpoint, drawn, tmp_path, capsys):
    main([str(checkpoint), "--data", str(drawn), "--json", str(tmp_path / "metrics.json"), "--workers", "0"])
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("voc2007_ap50", "voc2010_ap50", "coco_ap", "coco_ap50", "coco_ap75", "coco_ap_small", "coco_ar100"):
        assert f"{name}" in printed
        assert metrics[name] is None or 0 <= metrics[name] <= 1
    assert len(metrics["per_class"]) == 6
    assert "min_score 0.01, max_overlap 0.45, top_k 200" in printed
    assert metrics["images"] == 6


def test_perfect_answers_score_one(drawn):
    """The objects themselves, through the same loader and in its order, are the best possible answer."""
    data_list = DataList.load(drawn / "val.json")
    answered = []

    def truth(images, sizes):
        results = []
        for size in sizes:
            target = data_list.target(len(answered))
            assert target["size"] == size
            answered.append(size)
            labels = torch.tensor(target["labels"])
            results.append(
                {"boxes": torch.tensor(target["boxes"]), "scores": torch.ones(len(labels)), "labels": labels}
            )
        return results

    metrics = evaluate(truth, data_list, batch_size=4, workers=0)
    assert metrics["voc2007_ap50"] == metrics["voc2010_ap50"] == 1
    assert metrics["coco_ap"] == pytest.approx(1)


def test_no_detection_at_all(checkpoint, drawn, capsys):
    main([str(checkpoint), "--data", str(drawn), "--min-score", "1.0", "--workers", "0"])
    assert "voc2007_ap50        0.0" in capsys.readouterr().out


def test_other_classes_are_refused(drawn, tmp_path):
    save_checkpoint(tmp_path / "x.pth.tar", FPNSSD(ModelConfig(("cat",), "resnet18", image_size=64, fpn_channels=16)))
    with pytest.raises(SystemExit, match=r"x\.pth\.tar knows 1 classes \(cat\), but .*val\.json has 6 \(circle"):
        main([str(tmp_path / "x.pth.tar"), "--data", str(drawn)])


def test_bad_files_are_named(checkpoint, tmp_path, drawn, monkeypatch):
    with pytest.raises(SystemExit, match=r"no data list .*test\.json"):
        main([str(checkpoint), "--data", str(drawn), "--split", "test"])
    (tmp_path / "bad.pth.tar").write_text("x")
    with pytest.raises(SystemExit, match=r"bad\.pth\.tar is no checkpoint"):
        main([str(tmp_path / "bad.pth.tar"), "--data", str(drawn)])
    with pytest.raises(SystemExit, match=r"^eval: image nowhere/val_00000\.jpg is missing"):
        main([str(checkpoint), "--data", str(drawn), "--images", "nowhere", "--workers", "1"])
