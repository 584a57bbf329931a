"""Pictures of every kind in, the same answer out; alone, in batches, from threads; nothing given is changed."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from malformed import encoded, malformed_pictures, resident_bytes
from PIL import Image
from sure_network import save_sure_network

from fpnssd.data.images import DataError, load_image
from fpnssd.inference.detector import Detections, evaluation_mode, load_detector
from model import FPNSSD, ModelConfig
from utils import InputError


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """Of a network that finds something in noise."""
    return load_detector(save_sure_network(tmp_path_factory.mktemp("detector") / "small.pth.tar"))


@pytest.fixture(scope="module")
def pixels():
    noise = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(noise).resize((120, 90)))  # (90, 120, 3)


def same(one, other):
    assert one.names == other.names
    assert one.size == other.size
    torch.testing.assert_close(one.boxes, other.boxes, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-5)


def test_one_picture_in_many_forms(detector, pixels, tmp_path):
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    expected = detector.predict(image)
    assert len(expected) > 3
    unit = pixels.astype(np.float32) / 255
    forms = [
        pixels, unit, pixels.astype(np.uint16) * 257, tmp_path / "a.png", str(tmp_path / "a.png"),
        encoded(image, "PNG"), bytearray(encoded(image, "PNG")), torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        torch.from_numpy(unit.copy()).permute(2, 0, 1), image.convert("RGBA"), np.asarray(image.convert("RGBA")),
    ]  # fmt: skip
    for form in forms:
        before = (
            form.copy() if isinstance(form, np.ndarray) else form.clone() if isinstance(form, torch.Tensor) else form
        )
        found = detector.predict(form)
        same(found, expected)
        if isinstance(form, np.ndarray):
            np.testing.assert_array_equal(form, before)
        elif isinstance(form, torch.Tensor):
            assert torch.equal(form, before)
    assert detector.predict(str(tmp_path / "a.png")).source == str(tmp_path / "a.png")
    for mode in ("L", "P", "CMYK", "1", "I;16", "LA"):
        kind = image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
        before = kind.tobytes()
        assert detector.predict(kind).size == (90, 120)
        assert kind.tobytes() == before


def test_grey_in_many_forms():
    grey = np.arange(60, dtype=np.uint8).reshape(6, 10) * 4
    expected = np.repeat(grey[..., None], 3, axis=2)
    for form in (grey, grey[..., None], torch.from_numpy(grey)[None], grey.astype(np.uint16) * 257, grey / 255.0):
        np.testing.assert_array_equal(np.asarray(load_image(form)), expected)


def test_exif_turns_the_picture(detector, pixels):
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: to be shown turned by 90 degrees
    lying = encoded(image.rotate(90, expand=True), "PNG", exif=exif)
    same(detector.predict(lying), detector.predict(image))
    opened = Image.open(io.BytesIO(lying))
    before = opened.tobytes()
    assert detector.predict(opened).size == (90, 120)
    assert opened.tobytes() == before


def test_batches_of_mixed_sizes(detector, pixels):
    pictures = [Image.fromarray(pixels).resize(size) for size in ((120, 90), (40, 200), (300, 300), (1, 1), (64, 64))]
    together = detector.predict(pictures, batch_size=2)
    for picture, found in zip(pictures, together, strict=True):
        same(found, detector.predict(picture))
    assert detector.predict([]) == []


def test_threads_get_their_own_answers(detector, pixels):
    pictures = [Image.fromarray(np.roll(pixels, 7 * k, axis=1)) for k in range(12)]
    expected = [detector.predict(picture) for picture in pictures]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(detector.predict, pictures), expected, strict=True):
            same(found, wanted)


def test_suppressed_classes_go_to_background(detector, pixels):
    everything = detector.predict(pixels, min_score=0.1, top_k=10_000)
    without = detector.predict(pixels, min_score=0.1, top_k=10_000, suppress=["cat"])
    assert set(everything.names) == {"cat", "dog"}
    assert set(without.names) == {"dog"}
    dogs = everything.labels == 2
    torch.testing.assert_close(without.scores, everything.scores[dogs])  # no dog gains from it
    torch.testing.assert_close(without.boxes, everything.boxes[dogs])


def test_other_forms_of_the_answer():
    found = Detections(
        torch.tensor([[1.0, 2, 4, 8]]), torch.tensor([0.5]), torch.tensor([2]), ["dog"], (10, 20), "a.jpg"
    )
    assert found.to_dict() == {
        "source": "a.jpg", "height": 10, "width": 20,
        "objects": [{"name": "dog", "label": 2, "score": 0.5, "box": [1, 2, 4, 8]}],
    }  # fmt: skip
    row = {"image_id": 7, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert found.to_coco(7) == [{**row, "category_id": 2}]
    assert found.to_coco(7, category_ids=(11, 18)) == [{**row, "category_id": 18}]
    supervision = pytest.importorskip("supervision")
    theirs = found.to_supervision()
    assert isinstance(theirs, supervision.Detections)
    assert (theirs.class_id.tolist(), theirs.data["class_name"].tolist()) == ([1], ["dog"])
    assert theirs.xyxy.tolist() == [[1, 2, 4, 8]]


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (np.zeros((2, 3, 5), np.uint8), r"shape \(2, 3, 5\)"),
        (np.zeros((0, 3, 3), np.uint8), r"shape \(0, 3, 3\)"),
        (np.full((3, 3, 3), 2.0), "floats must be finite and in 0..1"),
        (np.full((3, 3, 3), np.nan), "floats must be finite and in 0..1"),
        (np.zeros((3, 3, 3), np.int64), "array of int64"),
        (torch.zeros(3, 3), r"tensor of shape \(3, 3\)"),
        (b"hello", "image from bytes is not a readable image"),
        (42, "an object of type int is not an image"),
        ("nowhere.jpg", "image nowhere.jpg is missing"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "20000 x 20000 pixels is refused"),
    ],
)
def test_what_is_no_picture_is_named(detector, picture, said):
    with pytest.raises(InputError, match=said):
        detector.predict(picture)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about what is damaged
@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.long)])
def test_malformed_pictures(detector, pixels, count):
    """An answer or an error each time, memory that stays, and then a good picture answered."""
    good = encoded(Image.fromarray(pixels), "PNG")
    expected, refused = detector.predict(good), 0
    for number, data in enumerate(malformed_pictures(count)):
        try:
            detector.predict(data)
        except DataError:
            refused += 1
        if number == count // 10:
            before = resident_bytes()
    assert count / 4 < refused < count
    same(detector.predict(good), expected)
    if count >= 5000:
        assert resident_bytes() <= 1.05 * before


@pytest.fixture
def training_model():
    """Of which a part was put into evaluation mode, as people freeze a backbone's batch norm."""
    model = FPNSSD(ModelConfig(("cat",), "test_resnet", image_size=64, fpn_channels=16)).train()
    model.backbone.bn1.eval()
    return model


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def test_predicting_leaves_every_mode_and_statistic_alone(training_model, pixels):
    """Also after an error, and after a picture that is none."""
    before, state = modes(training_model), copy.deepcopy(training_model.state_dict())
    detector = load_detector(training_model)
    seen = []
    hook = training_model.fpn.register_forward_hook(lambda module, inputs, output: seen.append(modes(training_model)))
    first = detector.predict(pixels)
    assert modes(training_model) == before
    assert not any(seen[0].values())
    hook.remove()

    def fails(module, inputs):
        raise RuntimeError("out of memory")

    hook = training_model.fpn.register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError):
        detector.predict(pixels)
    hook.remove()
    assert modes(training_model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in training_model.state_dict().items())
    same(load_detector(training_model.eval()).predict(pixels), first)
    assert detector.info["runtime"] == "torch"


def test_modes_come_back_after_the_last_of_several_threads(training_model):
    before = modes(training_model)
    with evaluation_mode(training_model):
        with ThreadPoolExecutor(1) as pool:

            def other():
                with evaluation_mode(training_model):
                    pass

            pool.submit(other).result()
        assert not any(modes(training_model).values())  # the first one is still predicting
    assert modes(training_model) == before


def test_selected_detections():
    found = Detections(
        torch.arange(12.0).reshape(3, 4), torch.tensor([0.9, 0.6, 0.3]), torch.tensor([2, 1, 2]),
        ["dog", "cat", "dog"], (10, 20), "a.jpg", (11, 18),
    )  # fmt: skip
    for selection in (found.scores > 0.5, slice(2), [0, 1], torch.tensor([0, 1]), np.array([True, True, False])):
        part = found[selection]
        assert (part.names, part.labels.tolist(), len(part)) == (["dog", "cat"], [2, 1], 2)
        assert part.boxes.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert (part.size, part.source, part.category_ids) == ((10, 20), "a.jpg", (11, 18))
    assert found[-1].scores.tolist() == pytest.approx([0.3])
    assert [one.names for one in found] == [["dog"], ["cat"], ["dog"]]
    assert len(found[found.scores > 1]) == 0


def test_coco_rows_have_the_training_lists_ids():
    torch.manual_seed(0)
    config = ModelConfig(("cat", "dog"), "test_resnet", image_size=64, fpn_channels=16, category_ids=(17, 0))
    found = load_detector(FPNSSD(config)).predict(torch.zeros(3, 9, 9), min_score=0.0, top_k=50)
    rows = found.to_coco(7)
    assert {row["category_id"] for row in rows} == {17, 0}
    assert [{17: "cat", 0: "dog"}[row["category_id"]] for row in rows] == found.names


def test_a_model_runs_on_torch(training_model):
    with pytest.raises(InputError, match="a model runs on torch, not on onnx: give the path of its checkpoint"):
        load_detector(training_model, runtime="onnx")
