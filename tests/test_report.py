"""The curves show what the log holds; a report holds everything, needs no network and fits the screen."""

import base64
import re

import pytest
import torch
from PIL import Image
from test_metrics import BOX, make_detections, make_list

from fpnssd.data.data_list import DataList
from fpnssd.evaluation.charts import all_charts
from fpnssd.evaluation.error_analysis import find_errors
from fpnssd.evaluation.metrics import compute_metrics, rank
from fpnssd.evaluation.report import main, view_around, write_report
from fpnssd.training.pictures import draw_curves, read_log
from utils import InputError

TOLD = {"settings": {"detections": "made <b>up</b>.json", "device": "cpu"}, "seconds": {"load": 1.0}}

LOG = """epoch,step,lr,loss_box,loss_class,images_per_s,seconds,voc2007_ap50,coco_ap
1,3,0.001,2.5,5.5,9,1,,
2,6,0.0005,1.5,4.5,9,1,0.25,0.125
"""


def test_the_log_is_read_without_its_gaps(tmp_path):
    (tmp_path / "log.csv").write_text(LOG)
    columns = read_log(tmp_path / "log.csv")
    assert columns["loss_box"] == ([1, 2], [2.5, 1.5])
    assert columns["voc2007_ap50"] == ([2], [0.25])


def test_curves_are_drawn(tmp_path, capsys):
    (tmp_path / "log.csv").write_text(LOG)
    main([str(tmp_path)])
    assert "curves.png" in capsys.readouterr().out
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1000
        # The curves are the only saturated colours, and their first one is blue in each panel that has any.
        third = picture.width // 3
        for panel in range(3):
            colours = (
                picture.convert("RGB").crop((panel * third, 0, (panel + 1) * third, picture.height)).getcolors(10**6)
            )
            assert (31, 119, 180) in {colour for _, colour in colours}


def test_bad_logs_are_named(tmp_path):
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"log\.csv is not the log of a training"):
        draw_curves(tmp_path / "log.csv", tmp_path / "curves.png")
    with pytest.raises(SystemExit, match=r"nowhere"):
        main([str(tmp_path / "nowhere")])


# ---------------------------------------------------------------------------------------------------------------------
# The report


@pytest.fixture(scope="module")
def report(drawn, tmp_path_factory):
    """The report of half of the objects of a drawn list, a wrong class, a wrong place, and nothing at all."""
    data_list = DataList.load(drawn / "val.json")
    detections = []
    for index in range(len(data_list)):
        target = data_list.target(index)
        boxes = torch.tensor(target["boxes"])[::2]
        labels = torch.tensor(target["labels"])[::2]
        labels[: index % 2] = 1
        boxes[-1:] += 10.0 * (index % 3)
        detections.append({"boxes": boxes, "scores": torch.linspace(0.9, 0.3, len(boxes)), "labels": labels})
    path = tmp_path_factory.mktemp("report") / "report.html"
    ranked = rank(data_list, detections)
    metrics = compute_metrics(data_list, ranked) | TOLD | {"intervals": {"coco_ap": (0.123, 0.456)}}
    write_report(path, data_list, ranked, metrics)
    return path, metrics


def test_a_report_holds_everything_in_one_file(report):
    path, metrics = report
    html = path.read_text()
    assert path.stat().st_size < 5e6
    addresses = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'>\s]{1,20})""", html)
    assert len(addresses) > 8
    assert all(address.startswith("data:image/") for address in addresses)
    assert all(alt for alt in re.findall(r'<img [^>]*alt="([^"]*)"', html))
    assert html.count("<img ") == html.count("alt=")
    for heading in (
        "Where AP is lost", "AP by class", "Precision and recall", "What a score means", "Confusions", "AP by size",
        "AP by aspect", "The costliest false positives", "The costliest missed objects", "How it was run",
    ):  # fmt: skip
        assert f"<h2>{heading}</h2>" in html
    assert f"{100 * metrics['voc2010_ap50']:.1f}" in html
    assert "12.3 – 45.6" in html


def test_names_are_text_in_a_report(tmp_path, capsys):
    """A class or file called like markup or mathematics is shown as it is."""
    objects = [[((10, 10, 110, 110), 1, False, False), ((150, 150, 250, 250), 2, False, False)]]
    data_list = make_list(objects)
    data_list.classes = ("<script>alert(1)</script>", "$a_1$", "empty")
    data_list.file_names = ["<img src=x>.jpg"]
    ranked = rank(data_list, make_detections([[((10, 10, 110, 110), 0.9, 2)]]))
    write_report(tmp_path / "r.html", data_list, ranked, compute_metrics(data_list, ranked) | TOLD)
    html = (tmp_path / "r.html").read_text()
    assert "<script>" not in html
    assert "<img src=x>" not in html
    assert "<b>up" not in html
    assert "&lt;script&gt;" in html
    # The photograph is not there: the mistake is still told, and why it is not shown.
    assert "not shown: image" in html
    assert re.search(
        r"r\.html: (\d) of \1 pictures, the first of <img src=x>\.jpg, cannot be read", capsys.readouterr().err
    )


def test_reports_of_nothing(tmp_path):
    for objects in ([[]], [[((10, 10, 110, 110), 1, False, False)]]):
        data_list = make_list(objects)
        ranked = rank(data_list, make_detections([[]]))
        write_report(tmp_path / "r.html", data_list, ranked, compute_metrics(data_list, ranked) | TOLD)
        html = (tmp_path / "r.html").read_text()
        assert ("there are no numbers" in html) == (objects == [[]])


def test_views_lie_in_their_image():
    for box in ((0, 0, 4, 4), (90, 30, 100, 60), (0, 0, 400, 300), (200, 299, 210, 300)):
        left, top, right, bottom = view_around(box, (400, 300))
        assert 0 <= left <= box[0]
        assert 0 <= top <= box[1]
        assert box[2] <= right <= 400
        assert box[3] <= bottom <= 300


@pytest.mark.parametrize("width", [390, 1280])
def test_a_report_fits_the_screen_and_asks_nobody(report, browser, width):
    page = browser.new_page(viewport={"width": width, "height": 900})
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(report[0].as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [report[0].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing reaches beyond the screen, every picture is there, and no two figures share a place.
    boxes = page.evaluate(
        """[...document.querySelectorAll("h1, h2, p, table, figure, img")].filter(e => !e.closest("details"))
        .map(e => [e.tagName, ...["left", "top", "right", "bottom"].map(k => e.getBoundingClientRect()[k])])"""
    )
    assert all(box[1] >= 0 and box[3] <= width for box in boxes)
    assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    figures = [box[1:] for box in boxes if box[0] == "FIGURE"]
    for number, one in enumerate(figures):
        for other in figures[:number]:
            assert one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
    page.close()


def test_names_in_other_scripts_are_text_that_the_readers_fonts_draw():
    objects, detections = [[(BOX, 1, False, False)]], make_detections([[(BOX, 0.9, 1)]])
    for name, is_text in (("dog", False), ("犬", True)):
        data_list = make_list(objects)
        data_list.classes = (name, *data_list.classes[1:])
        ranked = rank(data_list, detections)
        metrics = compute_metrics(data_list, detections)
        (chart, *_) = all_charts(data_list, ranked, find_errors(data_list, ranked), metrics)[1:]
        drawn = base64.b64decode(chart.image.partition(",")[2]).decode()
        assert ("<text" in drawn) == is_text
        assert ("犬" in drawn) == is_text
