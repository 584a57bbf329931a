"""From a checkpoint and a list to the table; whoever predicts is scored alike."""

import json
import statistics

import pytest
import torch

from eval import main
from fpnssd.data.data_list import DataList
from fpnssd.evaluation.predict import Predictor, evaluate, mirror_index
from fpnssd.inference.detector import torch_detector
from model import FPNSSD, ModelConfig, priors_of, save_checkpoint


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


def test_at_scores_are_of_what_is_decoded_from_there_on(checkpoint, drawn, tmp_path, capsys):
    """Scoring once and cutting is scoring what decoding with that min_score gives."""
    common = [str(checkpoint), "--workers", "0", "--intervals", "0", "--images", str(drawn / "voc" / "JPEGImages")]
    main([*common, "--data", str(drawn), "--save-detections", str(tmp_path / "d.json")])
    found = json.loads((tmp_path / "d.json").read_text())
    cut = statistics.median(one["score"] for one in found)
    content = json.loads((drawn / "val.json").read_text())  # with objects where an untrained network sees some
    content["annotations"] = [{**one, "id": k, "iscrowd": 0} for k, one in enumerate(found[::3])]
    (tmp_path / "val.json").write_text(json.dumps(content))
    common += ["--data", str(tmp_path)]
    numbers = []
    for knobs in (["--at-scores", str(cut), "0.01"], ["--min-score", str(cut), "--at-scores", "0"]):
        main([*common, *knobs, "--json", str(tmp_path / "metrics.json"), "--report", str(tmp_path / "report.html")])
        numbers.append(json.loads((tmp_path / "metrics.json").read_text()))
    all_of_them, above_cut = numbers
    assert [row["min_score"] for row in all_of_them["at_scores"]] == [0.01, cut]
    assert all_of_them["at_scores"][1] == above_cut["at_scores"][0]
    assert 0 < above_cut["at_scores"][0]["precision"] < 1
    counts = [sum(row["detections"] for row in metrics["per_class"].values()) for metrics in numbers]
    assert 0 < counts[1] < counts[0]
    for name, row in above_cut["per_class"].items():
        assert row["at_scores"] == all_of_them["per_class"][name]["at_scores"][1:]
    assert f"score > {cut:.4g}: precision " in capsys.readouterr().out
    assert f"precision above {cut:.2f}" in (tmp_path / "report.html").read_text()


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


def test_detections_are_saved_and_scored_again(checkpoint, drawn, tmp_path, capsys):
    common = ["--data", str(drawn), "--workers", "0", "--intervals", "50"]
    saved = ["--save-detections", str(tmp_path / "d.json"), "--voc-files", str(tmp_path / "comp4")]
    main([str(checkpoint), *common, *saved, "--json", str(tmp_path / "a.json")])
    main(["--detections", str(tmp_path / "d.json"), *common, "--json", str(tmp_path / "b.json")])
    first, again = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    for name in ("per_class", "intervals", "coco_ap", "voc2007_ap50"):
        assert first[name] == again[name]
    assert set(first["seconds"]) == {"load", "forward", "decode", "score"}
    assert len(list((tmp_path / "comp4").glob("comp4_det_val_*.txt"))) == 6
    capsys.readouterr()
    main(["--compare", str(tmp_path / "d.json"), str(checkpoint), *common])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert all("+0.0  95 % interval +0.0 .. +0.0" in line and "no significant difference" in line for line in lines[1:])


def test_bad_detections_are_refused(checkpoint, drawn, tmp_path, capsys):
    (tmp_path / "d.json").write_text('[{"image_id": 99, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5}]')
    with pytest.raises(SystemExit, match=r"^eval: .*d\.json: 1 x unknown image_id.*No row is left"):
        main(["--detections", str(tmp_path / "d.json"), "--data", str(drawn), "--skip-bad"])
    known = json.loads((drawn / "val.json").read_text())["images"][0]["id"]
    rows = [{"image_id": k, "category_id": 1, "bbox": [1, 1, 2, 2], "score": 0.5} for k in (known, 99)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    with pytest.raises(SystemExit, match=r"^eval: .*d\.json: 1 x unknown image_id, first row 2.*--skip-bad"):
        main(["--detections", str(tmp_path / "d.json"), "--data", str(drawn)])
    main(["--detections", str(tmp_path / "d.json"), "--data", str(drawn), "--skip-bad"])
    assert "d.json: rows left out: 1 x unknown image_id" in capsys.readouterr().err


def test_a_list_without_objects_has_no_numbers(checkpoint, drawn, tmp_path, capsys):
    content = json.loads((drawn / "val.json").read_text())
    (tmp_path / "test.json").write_text(json.dumps({**content, "annotations": []}))
    images = ["--images", str(drawn / "voc" / "JPEGImages"), "--workers", "0"]
    main([str(checkpoint), "--data", str(tmp_path), "--split", "test", "--voc-files", str(tmp_path), *images])
    assert "nothing to score against" in capsys.readouterr().out
    assert (tmp_path / "comp4_det_test_star.txt").is_file()


@pytest.mark.parametrize("image_size", [64, 128, 300])
def test_mirror_index_mirrors(image_size):
    priors = priors_of(ModelConfig(("a",), "resnet18", image_size=image_size, fpn_channels=16))
    index = mirror_index(priors)
    assert torch.equal(index[index], torch.arange(len(priors)))
    torch.testing.assert_close(priors[index][:, 0], 1 - priors[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(priors[index][:, 1:], priors[:, 1:])


def test_flip_of_a_mirrored_image_is_the_mirrored_answer():
    """With the mean of both views, an image and its mirror image get mirrored detections."""
    torch.manual_seed(1)
    model = FPNSSD(ModelConfig(("a", "b"), "resnet18", image_size=64, fpn_channels=16)).eval()
    for head in model.modules():  # an untrained network says the same everywhere: stir it
        if isinstance(head, torch.nn.Conv2d):
            torch.nn.init.normal_(head.weight, std=0.05)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    predict_fn = Predictor(torch_detector(model, "fp32"), flip=True)
    straight, mirrored = predict_fn(images, [(64, 64)] * 2), predict_fn(images.flip(3), [(64, 64)] * 2)
    for one, other in zip(straight, mirrored, strict=True):
        assert len(one["scores"]) > 10
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-5)
        boxes = other["boxes"].clone()
        boxes[:, [0, 2]] = 64 - boxes[:, [2, 0]]
        # Equal scores may change places.
        assert (torch.cdist(one["boxes"], boxes, p=1).min(dim=1).values < 0.05).float().mean() > 0.95
    plain = Predictor(torch_detector(model, "fp32"))(images, [(64, 64)] * 2)
    assert not torch.allclose(plain[0]["scores"][:10], straight[0]["scores"][:10], atol=1e-4)


def test_no_detection_at_all(checkpoint, drawn, capsys):
    main([str(checkpoint), "--data", str(drawn), "--min-score", "1.0", "--workers", "0"])
    assert "voc2007_ap50        0.0" in capsys.readouterr().out


def test_other_classes_are_refused(drawn, tmp_path):
    save_checkpoint(tmp_path / "x.pth.tar", FPNSSD(ModelConfig(("cat",), "resnet18", image_size=64, fpn_channels=16)))
    with pytest.raises(SystemExit, match=r"x\.pth\.tar has 1 classes \(cat\), but .*val\.json has 6 \(circle"):
        main([str(tmp_path / "x.pth.tar"), "--data", str(drawn)])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare", "a", "b", "--json", "x", "--report", "y"], "--compare cannot be combined with --report, --json"),
        (
            ["--detections", "a", "--flip", "--min-score", "0.1"],
            "--detections cannot be combined with --flip, --min-score",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--min-score", "--max-overlap", "--at-scores", "--voc-overlaps"])
@pytest.mark.parametrize("value", ["40", "nan", "-0.1"])
def test_thresholds_out_of_range_are_refused(checkpoint, drawn, option, value):
    with pytest.raises(SystemExit, match=f"{option.lstrip('-').replace('-', '.')}.*{value}.* it must lie in 0..1"):
        main([str(checkpoint), "--data", str(drawn), option, value])


def test_bad_files_are_named(checkpoint, tmp_path, drawn, monkeypatch):
    with pytest.raises(SystemExit, match=r"no data list .*test\.json"):
        main([str(checkpoint), "--data", str(drawn), "--split", "test"])
    (tmp_path / "bad.pth.tar").write_text("x")
    with pytest.raises(SystemExit, match=r"bad\.pth\.tar is not a checkpoint"):
        main([str(tmp_path / "bad.pth.tar"), "--data", str(drawn)])
    with pytest.raises(SystemExit, match="^eval: --images nowhere is not a folder"):
        main([str(checkpoint), "--data", str(drawn), "--images", "nowhere"])
    with pytest.raises(SystemExit, match=r"^eval: image .*val_00000\.jpg is missing"):
        main([str(checkpoint), "--data", str(drawn), "--images", str(tmp_path), "--workers", "1"])
    with pytest.raises(SystemExit, match=r"--data is the folder of data lists: --data "):
        main([str(checkpoint), "--data", str(drawn / "val.json")])
