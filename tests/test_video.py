"""Videos through the command line: every frame answered, annotated ones in a file of the same length and times."""

import json
import shutil
import signal
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from sure_network import save_sure_network

from detect import main
from fpnssd.data.images import DataError
from fpnssd.inference.detector import Detections, Detector, load_detector
from fpnssd.inference.video import Video, write_video

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With small.pth.tar and clip.mp4: eleven frames of noise that moves, at odd times."""
    folder = tmp_path_factory.mktemp("video")
    save_sure_network(folder / "small.pth.tar")
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 120, 90, "yuv420p"
        for number in range(11):
            picture = Image.fromarray(np.roll(noise, number, axis=1)).resize((120, 90))
            frame = av.VideoFrame.from_image(picture)
            frame.pts = number + (number > 5)  # one is missing
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return folder


def run(folder, tmp_path, *sources):
    arguments = ["--checkpoint", str(folder / "small.pth.tar"), "--out", str(tmp_path), "--runtime", "torch"]
    main([*(str(source) for source in sources), *arguments, "--json", str(tmp_path / "found.jsonl")])


def read(path):
    """[(picture, seconds)] of a video file."""
    video = Video(str(path))
    return [(picture, float(time * video.time_base)) for picture, time in video]


def test_every_frame_is_answered_and_annotated(folder, tmp_path):
    run(folder, tmp_path, folder / "clip.mp4")
    lines = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    before, after = read(folder / "clip.mp4"), read(tmp_path / "clip.mp4")
    assert [line["frame"] for line in lines] == list(range(1, 12))
    seconds = [number / 10 for number in (*range(6), *range(7, 12))]
    assert [line["seconds"] for line in lines] == pytest.approx(seconds, abs=1e-3)
    assert [time for _, time in after] == pytest.approx(seconds, abs=1e-3)
    assert any(line["objects"] for line in lines)
    detector = load_detector(folder / "small.pth.tar", runtime="torch")
    for line, (picture, _), (annotated, _) in zip(lines, before, after, strict=True):
        found = detector.predict(picture)
        assert [one["name"] for one in line["objects"]] == found.names
        assert annotated.size == picture.size == (120, 90)
        assert len(found) == 0 or np.abs(np.asarray(annotated, int) - np.asarray(picture, int)).max() > 60


def test_what_is_damaged_is_said_and_the_rest_goes_on(folder, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("hello")
    whole = bytearray((folder / "clip.mp4").read_bytes())
    whole[100:3000] = bytes(2900)
    (tmp_path / "holes.mp4").write_bytes(whole)
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    sources = (tmp_path / "text.mp4", tmp_path / "holes.mp4", "camera:77", folder / "clip.mp4", tmp_path / "a.png")
    with pytest.raises(SystemExit) as stopped:
        run(folder, tmp_path / "out", *sources)
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    for name in ("text.mp4 cannot be opened", "holes.mp4", "camera:77 cannot be opened"):
        assert name in said
    assert len(read(tmp_path / "out" / "clip.mp4")) == 11
    assert (tmp_path / "out" / "a.png").is_file()


def test_a_video_is_never_written_over(folder):
    before = (folder / "clip.mp4").read_bytes()
    with pytest.raises(SystemExit, match="annotated copy would replace the input"):
        run(folder, folder, folder / "clip.mp4")
    assert (folder / "clip.mp4").read_bytes() == before


def test_ctrl_c_while_the_network_looks_keeps_what_there_is(folder, tmp_path, monkeypatch):
    predict_images, calls = Detector.predict_images, []

    def interrupted(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict_images(self, *arguments, **named)

    monkeypatch.setattr(Detector, "predict_images", interrupted)
    run(folder, tmp_path, folder / "clip.mp4", "--batch-size", "2", "--coco", tmp_path / "found.json")
    monkeypatch.undo()
    assert len(read(tmp_path / "clip.mp4")) == 4
    assert {row["image_id"] for row in json.loads((tmp_path / "found.json").read_text())} == {2, 3, 4, 5}


def test_videos_of_one_name_are_both_kept(folder, tmp_path):
    (tmp_path / "other").mkdir()
    shutil.copy(folder / "clip.mp4", tmp_path / "other")
    run(folder, tmp_path / "out", folder / "clip.mp4", tmp_path / "other" / "clip.mp4")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.mp4", "clip_2.mp4", "found.jsonl"]


def test_times_that_are_missing_or_out_of_order_are_mended(folder, tmp_path):
    """Frames with the times None, 3, 1, None: written files need each later than the one before. Then a clock that
    starts again, as where files were joined."""
    video = Video(str(folder / "clip.mp4"))
    frame = next(av.open(str(folder / "clip.mp4")).decode(video=0))
    step = round(1 / (video.rate * video.time_base))

    class Container:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def decode(self, _):
            for time in times:
                frame.pts = time
                yield frame

    video._container, times = Container(), (None, 3, 1, None)
    assert [time for _, time in video] == [0, 3, 4, 4 + step]
    second = round(1 / video.time_base)
    times = (5 * second, 6 * second, 7, 7 + step, None)
    assert [time for _, time in video] == [5 * second, *(6 * second + step * k for k in range(4))]
    times = (10 * second, 10 * second + step, 0, 10 * second + 3 * step)  # one bad time is no new clock
    assert [time for _, time in video] == [10 * second + step * k for k in range(4)]
    video.source, times = "camera:0", (900 * second, 900 * second + step)
    assert [time for _, time in video] == [0, step]


def write_at_one_time(video, path):
    """Which FFmpeg refuses."""
    with write_video(path, video) as write:
        for picture, _ in video:
            write(picture, 5)


def test_a_video_that_cannot_be_written_is_said(folder, tmp_path):
    video = Video(str(folder / "clip.mp4"))
    with pytest.raises(DataError, match=r"out\.mp4 cannot be written"):
        write_at_one_time(video, tmp_path / "out.mp4")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_what_there_is(folder, tmp_path, monkeypatch):
    def interrupted(self, frames=Video.__iter__):
        for number, frame in enumerate(frames(self)):
            if number == 4:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(Video, "__iter__", interrupted)
    run(folder, tmp_path, folder / "clip.mp4")
    monkeypatch.undo()
    assert len(read(tmp_path / "clip.mp4")) == 4


def test_sigterm_finishes_the_video_and_starts_no_other(folder, tmp_path, monkeypatch):
    """An interrupted video is whole up to there, its results are written, and the next one is not begun."""

    def interrupted(self, frames=Video.__iter__):
        for number, frame in enumerate(frames(self)):
            if number == 4:
                signal.raise_signal(signal.SIGTERM)
            yield frame

    shutil.copy(folder / "clip.mp4", tmp_path / "second.mp4")
    monkeypatch.setattr(Video, "__iter__", interrupted)
    with pytest.raises(SystemExit, match="results so far are written"):
        run(folder, tmp_path / "out", folder / "clip.mp4", tmp_path / "second.mp4", "--coco", tmp_path / "coco.json")
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.mp4", "found.jsonl"]
    assert len(read(tmp_path / "out" / "clip.mp4")) == 4
    assert len((tmp_path / "out" / "found.jsonl").read_text().splitlines()) == 4
    assert {row["image_id"] for row in json.loads((tmp_path / "coco.json").read_text())} == {3, 4, 5, 6}


def test_an_endless_camera_takes_no_memory(folder, tmp_path, monkeypatch):
    """Neither with COCO's results nor with files for each frame: what grows is on the disk."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((32, 24))

    class Camera:
        num_frames, rate, time_base = 0, 25, Fraction(1, 25)

        def __init__(self, source):
            self.source = source

        def __iter__(self):
            for time in range(3000):
                if time in (500, 2999):
                    sizes.append(tracemalloc.get_traced_memory()[0])
                yield image, time

    def found(self, images, *arguments):
        boxes = torch.tensor([[1.0, 2, 20, 21]] * 5)
        names = ["cat"] * 5
        return [Detections(boxes, torch.ones(5), torch.ones(5, dtype=torch.long), names, (24, 32)) for _ in images]

    sizes = []
    monkeypatch.setattr("detect.Video", Camera)
    monkeypatch.setattr(Detector, "predict_images", found)
    tracemalloc.start()
    try:
        checkpoint = ["--checkpoint", str(folder / "small.pth.tar"), "--no-pictures"]
        main(["camera:0", *checkpoint, "--coco", str(tmp_path / "found.json"), "--json", str(tmp_path / "found.jsonl")])
    finally:
        tracemalloc.stop()
    assert len(json.loads((tmp_path / "found.json").read_text())) == 15_000
    assert sizes[1] - sizes[0] < 200_000  # bytes, of 2,500 frames with 12,500 objects
