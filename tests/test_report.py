"""The curves show what the log holds."""

import pytest
from PIL import Image

from report import draw_curves, main, read_log
from utils import InputError

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
    with pytest.raises(InputError, match=r"log\.csv is no log of a training"):
        draw_curves(tmp_path / "log.csv", tmp_path / "curves.png")
    with pytest.raises(SystemExit, match=r"nowhere"):
        main([str(tmp_path / "nowhere")])
