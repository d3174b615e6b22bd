import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from lowvram.errors import LowVRAMError
from lowvram.memory.blocks import find_blocks
from lowvram.memory.checkpointing import recomputing
from lowvram.models import backbones


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize(
    ("name", "channels"), [("efficientnet_lite0", (24, 40, 112, 320)), ("efficientnet_lite1", (24, 40, 112, 320))]
)
def test_lite_gives_a_pyramid_of_what_the_whole_network_computes(name: str, channels: tuple[int, ...]) -> None:
    backbone = backbones.make(name)
    x = images()
    maps = backbone(x)
    assert backbone.channels == channels
    sides = (16, 8, 4, 2)
    assert [tuple(m.shape) for m in maps] == [(2, c, side, side) for c, side in zip(channels, sides, strict=True)]
    network = backbones.load_efficientnet_lite(name)
    whole = network.extract_features((x * 127.5 + 127.5 - 127) / 128)
    last = network._swish(network._bn1(network._conv_head(maps[-1])))
    assert torch.allclose(last, whole, atol=1e-4)


def test_an_image_s_features_depend_on_no_other_and_nothing_is_trained() -> None:
    backbone = backbones.make("efficientnet_lite0").train()
    assert not any(module.training for module in backbone.modules())
    assert not any(p.requires_grad for p in backbone.parameters())
    x = images(3).requires_grad_(True)
    together, alone = backbone(x), backbone(x[1:2])
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one[1:2], other, atol=1e-4)
    (gradient,) = torch.autograd.grad(sum(m.square().mean() for m in together), x)
    assert gradient.abs().sum() > 0
    assert all(p.grad is None for p in backbone.parameters())
    assert len(find_blocks(backbone)) == 5


def test_a_network_of_timm_by_name_with_weights_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = timm.create_model("resnet18", pretrained=False).eval()
    path = tmp_path / "resnet18.pth"
    torch.save(whole.state_dict(), path)
    backbone = backbones.make("resnet18", path)
    assert backbone.channels == (64, 128, 256, 512)
    x = images()
    mean, std = (torch.tensor(whole.pretrained_cfg[name])[:, None, None] for name in ("mean", "std"))
    wanted = whole.forward_features((x / 2 + 0.5 - mean) / std)
    assert torch.allclose(backbone(x)[-1], wanted, atol=1e-4)
    assert list(find_blocks(backbone)) == [f"network.layer{i}" for i in range(1, 5)]
    gradients = []
    for blocks in ([], list(find_blocks(backbone).values())):
        x.requires_grad_(True).grad = None
        with recomputing(blocks):
            sum(m.square().mean() for m in backbone(x)).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("executed"),))  # type: ignore[return-value]


def test_what_can_t_be_a_backbone_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LowVRAMError, match="backbone=resnett18"):
        backbones.make("resnett18")
    weights = tmp_path / "x.pth"
    with pytest.raises(LowVRAMError, match="is no file"):
        backbones.make("resnet18", weights)
    weights.write_bytes(pickle.dumps({"conv1.weight": _Evil()}))
    with pytest.raises(LowVRAMError, match="can't be had"):
        backbones.make("resnet18", weights)
    assert not (tmp_path / "executed").exists()
    torch.save(timm.create_model("vit_tiny_patch16_224", pretrained=False).state_dict(), weights)
    with pytest.raises(LowVRAMError, match="1/4, 1/8, 1/16 and 1/32"):
        backbones.make("vit_tiny_patch16_224", weights)
