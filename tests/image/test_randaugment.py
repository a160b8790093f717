"""Operations against Pillow, image by image."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from scipy.stats import chisquare

from lit_distill.image import randaugment
from lit_distill.image.augment import Augment
from lit_distill.image.randaugment import OPERATIONS, STEPS, RandAugment, StrongAugment


def photos(count=16, size=32):
    """Smooth images, so that a pixel's neighbour differs little, with a few hard edges."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    waves = [
        np.stack([np.sin(3 * x * a + 2 * y * b + p) for p in (0, 1, 2)], -1)
        for a, b in generator.uniform(1, 4, (count, 2))
    ]
    pixels = ((np.stack(waves) + 1) * generator.uniform(40, 127, (count, 1, 1, 3))).astype(np.uint8)
    pixels[:, 5:9, 3:20] = generator.integers(0, 256, (count, 1, 1, 3))
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


AFFINE = Image.Transform.AFFINE
PILLOW = {
    "_identity": lambda image, v: image,
    "_auto_contrast": lambda image, v: ImageOps.autocontrast(image),
    "_equalize": lambda image, v: ImageOps.equalize(image),
    "_posterize": lambda image, v: ImageOps.posterize(image, int(v)),
    "_solarize": lambda image, v: ImageOps.solarize(image, v),
    "_brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "_color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "_contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "_sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "_rotate": lambda image, v: image.rotate(v),
    "_shear_x": lambda image, v: image.transform(image.size, AFFINE, (1, v, 0, 0, 1, 0)),
    "_shear_y": lambda image, v: image.transform(image.size, AFFINE, (1, 0, 0, v, 1, 0)),
    "_translate_x": lambda image, v: image.transform(image.size, AFFINE, (1, 0, v * image.size[0], 0, 1, 0)),
    "_translate_y": lambda image, v: image.transform(image.size, AFFINE, (1, 0, 0, 0, 1, v * image.size[1])),
}


@pytest.mark.parametrize("kind", range(len(OPERATIONS)), ids=[operation.__name__ for *_, operation in OPERATIONS])
def test_operations_equal_pillow(kind):
    images = photos()
    low, high, operation = OPERATIONS[kind]
    strengths = torch.linspace(low, high, len(images) + 2)[1:-1]
    found = operation(images, strengths)
    assert found.dtype == torch.uint8
    for image, strength, one in zip(images, strengths.tolist(), found, strict=True):
        expected = np.asarray(PILLOW[operation.__name__](Image.fromarray(image.permute(1, 2, 0).numpy()), strength))
        difference = np.abs(one.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max(-1)
        # Pillow computes places in fixed point: a pixel on the border between two may be taken from the other.
        assert (difference > 1).mean() < 0.01
    if operation is not randaugment._identity:
        assert not torch.equal(found, images)


def test_an_image_of_one_color_stays():
    image = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    for operation in (randaugment._auto_contrast, randaugment._equalize, randaugment._sharpness):
        assert torch.equal(operation(image, torch.tensor([0.5])), image)


def test_each_image_gets_its_own_operations_one_after_the_other():
    images = photos(4)
    draws = torch.tensor([[3, 4], [4, 3], [0, 0], [9, 5]])
    strengths = torch.tensor([[STEPS // 2, STEPS // 2]]).expand(4, 2)
    square = torch.tensor([[0, 0, 0]]).expand(4, 3)  # of one pixel, in the corner
    found = RandAugment((0, 0, 0))(images, torch.cat([draws, strengths, square], 1))
    for image, kinds, one in zip(images, draws.tolist(), found, strict=True):
        expected = image[None]
        for kind in kinds:
            low, high, operation = OPERATIONS[kind]
            expected = operation(expected, torch.tensor([(low + high) / 2]))
        assert torch.equal(one.flatten(1)[:, 1:], expected[0].flatten(1)[:, 1:])
        assert (one[:, 0, 0] == 0).all()


def test_the_square_has_the_drawn_side_and_color():
    images = torch.zeros((1, 3, 32, 32), dtype=torch.uint8)
    draws = torch.tensor([[0, 0, 0, 0, STEPS // 2, STEPS // 2, STEPS // 4]])  # side 8, row 16, column 8
    found = RandAugment((10, 20, 30))(images, draws)[0]
    expected = np.zeros((3, 32, 32), np.uint8)
    expected[:, 12:21, 4:13] = np.array([10, 20, 30])[:, None, None]  # from 12 to 12 + 8, both within
    assert np.array_equal(found.numpy(), expected)


def test_operations_strengths_and_squares_are_uniform():
    draws = RandAugment((0,)).draw(20_000, torch.Generator().manual_seed(0))
    assert chisquare(draws[:, :2].flatten().bincount(minlength=len(OPERATIONS)).numpy()).pvalue > 1e-4
    for column in range(2, 7):
        assert chisquare((draws[:, column] * 20 // (STEPS + 1)).bincount(minlength=20).numpy()).pvalue > 1e-4


@pytest.mark.parametrize("weak", [None, Augment(4)])
def test_the_weak_part_comes_first(weak):
    images = photos(6)
    both = StrongAugment(RandAugment((0, 0, 0)), weak)
    draws = both.draw(6, torch.Generator().manual_seed(1))
    first = images if weak is None else weak(images, draws[:, 7:])
    assert torch.equal(both(images, draws), RandAugment((0, 0, 0))(first, draws[:, :7]))


def test_gray_images_have_no_color_to_lose():
    images = photos(6)[:, :1]
    found = RandAugment((0,))(images, RandAugment((0,)).draw(6, torch.Generator().manual_seed(2)))
    assert found.shape == images.shape
    assert torch.equal(randaugment._color(images, torch.full((6,), 0.3)), images)
