"""The artifact: nothing is lost on disk, bytes are counted, and what does not fit is refused in one line."""

import json

import pytest
import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from lit_distill.core.errors import RunError, UsageError
from lit_distill.dataset.synthetic import SyntheticSet, check_classes

MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)


def make(images=None, soft=None, **kwargs):
    pixels = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8)
    return SyntheticSet(
        images=pixels if images is None else images,
        labels=torch.arange(3).repeat_interleave(2),
        classes=("cat", "dog", "ape"),
        mean=MEAN,
        std=STD,
        soft_labels=soft,
        description={"method": "X"},
        **kwargs,
    )


def test_round_trip(tmp_path):
    before = make(torch.randn(6, 3, 8, 8), torch.randn(6, 3), lr=0.02)
    before.save(tmp_path)
    after = SyntheticSet.load(tmp_path)
    for name in ("images", "labels", "soft_labels"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    assert (after.classes, after.mean, after.std, after.lr, after.description) == (
        before.classes,
        MEAN,
        STD,
        0.02,
        {"method": "X"},
    )


def test_pixels_and_network_images_are_inverse():
    pixels = make()
    expected = (pixels.images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.allclose(pixels.network_images().double(), expected, atol=1e-5)
    floating = make(pixels.network_images())
    assert torch.equal(floating.pixels(), pixels.images)
    assert torch.equal(floating.quantized().images, pixels.images)


def test_colors_that_do_not_exist_are_cut_off():
    extreme = torch.tensor([-100.0, 100.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8).repeat(3, 1, 1, 1)
    pixels = make(extreme).pixels()
    assert pixels[0].unique().tolist() == [0]
    assert pixels[1].unique().tolist() == [255]


def test_bytes():
    assert make().footprint() == {"bytes": 6 * 3 * 64 + 6, "label_bytes": 6}
    soft = make(torch.zeros(6, 3, 8, 8), torch.zeros(6, 3))
    assert soft.footprint() == {"bytes": 4 * 6 * 3 * 64 + 4 * 18, "label_bytes": 4 * 18}


def test_export_is_an_image_folder(tmp_path):
    distilled = make()
    distilled.export(tmp_path / "out")
    folder = ImageFolder(str(tmp_path / "out"))
    assert folder.classes == ["0_cat", "1_dog", "2_ape"]
    assert [label for _, label in folder.samples] == distilled.labels.tolist()
    assert torch.equal(torch.stack([pil_to_tensor(image) for image, _ in folder]), distilled.images)


def test_picture(tmp_path):
    make().save(tmp_path)
    assert (tmp_path / "images.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(UsageError, match="holds no distilled images"):
        SyntheticSet.load(tmp_path)
    make().save(tmp_path)
    description = json.loads((tmp_path / "distilled.json").read_text())
    for change, message in (({"version": 99}, "version 99"), ({"kind": "trees"}, "distilled trees, not images")):
        (tmp_path / "distilled.json").write_text(json.dumps(description | change))
        with pytest.raises(UsageError, match=message):
            SyntheticSet.load(tmp_path)


@pytest.mark.parametrize("name", ["images.safetensors", "distilled.json"])
def test_truncated_file(tmp_path, name):
    make().save(tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match="corrupt"):
        SyntheticSet.load(tmp_path)


def test_other_classes():
    check_classes(("a", "b"), ["a", "b"])
    with pytest.raises(UsageError, match=r"2 classes, data\.source 3"):
        check_classes(("a", "b"), ("a", "b", "c"))
    with pytest.raises(UsageError, match=r"class 'b' where data\.source has 'c'"):
        check_classes(("a", "b"), ("a", "c"))


def test_other_dtypes_are_refused():
    with pytest.raises(UsageError, match="float64"):
        make(torch.zeros(6, 3, 8, 8, dtype=torch.float64))
