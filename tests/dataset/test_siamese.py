import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from lit_distill.core.errors import UsageError
from lit_distill.dataset.siamese import OPERATIONS, SiameseAugment

SIZES = [(3, 8, 8), (1, 12, 9)]


@pytest.fixture(params=SIZES, ids=str)
def images(request):
    return torch.randn(6, *request.param, generator=torch.Generator().manual_seed(4))


def numbers(*values):
    """Draws of a single operation: its number, 0, and three uniform numbers for each row."""
    return torch.tensor([[0.0, *value] for value in values])


def draws_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.zeros(count, 1), torch.rand(count, 3, generator=generator)], dim=1)


# ---- each operation ------------------------------------------------------------------------------------------------


def test_color_is_brightness_then_saturation_then_contrast(images):
    draws = draws_of(6)
    found = SiameseAugment("color")(images, draws)
    for own, image, (_, brightness, saturation, contrast) in zip(found, images, draws.tolist(), strict=True):
        bright = image.numpy() + (brightness - 0.5)
        gray = bright.mean(0, keepdims=True)
        saturated = (bright - gray) * 2 * saturation + gray
        expected = (saturated - saturated.mean()) * (contrast + 0.5) + saturated.mean()
        torch.testing.assert_close(own, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_crop_shifts_by_whole_pixels_and_brings_in_zeros(images):
    height, width = images.shape[2:]
    reach = [int(length * 0.125 + 0.5) for length in (height, width)]
    draws = torch.cat([draws_of(4), numbers([0.0, 0.0, 0.5], [0.999999, 0.999999, 0.5])])
    found = SiameseAugment("crop")(images, draws)
    shifts = []
    for own, image, (_, *uniform) in zip(found, images, draws.tolist(), strict=True):
        down, right = (int(u * (2 * r + 1)) - r for u, r in zip(uniform, reach, strict=False))
        shifts.append((down, right))
        for y in range(height):
            for x in range(width):
                inside = 0 <= y + down < height and 0 <= x + right < width
                pixel = image[:, y + down, x + right] if inside else torch.zeros(len(image))
                assert torch.equal(own[:, y, x], pixel)
    assert shifts[-2:] == [(-reach[0], -reach[1]), (reach[0], reach[1])]


def test_cutout_blackens_half_the_side_and_is_cut_off_at_the_edge(images):
    height, width = images.shape[2:]
    sides = [int(length * 0.5 + 0.5) for length in (height, width)]
    draws = torch.cat([draws_of(4), numbers([0.0, 0.0, 0.5], [0.999999, 0.999999, 0.5])])
    found = SiameseAugment("cutout")(images, draws)
    for own, image, (_, *uniform) in zip(found, images, draws.tolist(), strict=True):
        expected = image.clone()
        places = []
        for u, length, side in zip(uniform, (height, width), sides, strict=False):
            center = int(u * (length + 1 - side % 2))
            places.append([min(max(center - side // 2 + step, 0), length - 1) for step in range(side)])
        for y in places[0]:
            for x in places[1]:
                expected[:, y, x] = 0  # clamped into the image, as the public code does
        assert torch.equal(own, expected)


def test_flip_mirrors_half_of_the_images(images):
    draws = numbers(*([u, 0.5, 0.5] for u in (0.0, 0.49, 0.5, 0.51, 0.9, 0.1)))
    found = SiameseAugment("flip")(images, draws)
    for own, image, mirrored in zip(found, images, (True, True, False, False, False, True), strict=True):
        assert torch.equal(own, tv.horizontal_flip(image) if mirrored else image)


def sampled(image, matrix):
    """Bilinear sampling by hand at the places to which the matrix takes pixel centers, in units of half the image."""
    height, width = image.shape[1:]
    expected = torch.zeros_like(image)
    for y in range(height):
        for x in range(width):
            u, v = (2 * x + 1) / width - 1, (2 * y + 1) / height - 1
            column = ((matrix[0][0] * u + matrix[0][1] * v + 1) * width - 1) / 2
            row = ((matrix[1][0] * u + matrix[1][1] * v + 1) * height - 1) / 2
            top, left = math.floor(row), math.floor(column)
            for yy in (top, top + 1):
                for xx in (left, left + 1):
                    if 0 <= yy < height and 0 <= xx < width:
                        expected[:, y, x] += image[:, yy, xx] * (1 - abs(row - yy)) * (1 - abs(column - xx))
    return expected


def test_scale_resamples_by_a_factor_of_each_direction(images):
    draws = torch.cat([draws_of(4), numbers([0.0, 0.0, 0.5], [1.0, 0.0, 0.5])])
    found = SiameseAugment("scale")(images, draws)
    for own, image, (_, across, down, _) in zip(found, images, draws.tolist(), strict=True):
        across, down = (u * (1.2 - 1 / 1.2) + 1 / 1.2 for u in (across, down))
        torch.testing.assert_close(own, sampled(image, [[across, 0], [0, down]]), rtol=1e-3, atol=1e-4)


def test_rotate_turns_by_up_to_15_degrees(images):
    draws = torch.cat([draws_of(4), numbers([0.0, 0.5, 0.5], [1.0, 0.5, 0.5])])
    found = SiameseAugment("rotate")(images, draws)
    for own, image, (_, u, _, _) in zip(found, images, draws.tolist(), strict=True):
        angle = math.radians(30 * (u - 0.5))
        matrix = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
        torch.testing.assert_close(own, sampled(image, matrix), rtol=1e-3, atol=1e-4)
        if image.shape[1] == image.shape[2]:
            turned = tv.rotate(image, math.degrees(angle), interpolation=InterpolationMode.BILINEAR)
            torch.testing.assert_close(own, turned, rtol=1e-3, atol=1e-4)


# ---- draws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_draw_does_the_same_to_images_of_batches_of_any_size(name, images):
    augment = SiameseAugment(name)
    shared = augment.draw(1)
    real = augment(images, shared)
    twins = augment(images[2:4].clone(), shared)
    assert torch.equal(real[2:4], twins)
    assert torch.equal(augment(images[:1].repeat(3, 1, 1, 1), shared)[0], real[0])
    own = augment.draw(6)
    assert not torch.equal(augment(images[:1].repeat(6, 1, 1, 1), own), augment(images[:1], own[:1]).repeat(6, 1, 1, 1))


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_reach_the_images_finite_and_not_zero(name, images):
    pixels = images.clone().requires_grad_()
    augment = SiameseAugment(name)
    draws = draws_of(6, seed=2)
    target = torch.randn(images.shape, generator=torch.Generator().manual_seed(8))
    (augment(pixels, draws) * target).sum().backward()
    assert pixels.grad.isfinite().all()
    assert (pixels.grad.flatten(1).norm(dim=1) > 0.1).all()
    # All operations are affine in the images: a step along a direction is what the gradient says.
    step = torch.randn(images.shape, generator=torch.Generator().manual_seed(9))
    rise = ((augment(images + step, draws) - augment(images, draws)) * target).sum()
    torch.testing.assert_close(rise, (pixels.grad * step).sum(), rtol=1e-3, atol=1e-3)


def test_none_is_the_identity(images):
    augment = SiameseAugment("none")
    assert augment(images, augment.draw(1)) is images
    assert augment(images, augment.draw(6)) is images
    assert not augment.random
    assert SiameseAugment("flip").random


def test_draws_can_be_repeated_and_take_every_operation():
    augment = SiameseAugment("color_crop_flip")
    first, second = (augment.draw(5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, augment.draw(5, torch.Generator().manual_seed(2)))
    torch.manual_seed(0)
    operations = torch.stack([augment.draw(5)[:, 0] for _ in range(200)])
    assert (operations == operations[:, :1]).all()  # one for the batch
    counts = operations[:, 0].long().bincount(minlength=3)
    assert len(counts) == 3
    assert counts.min() > 40
    uniform = augment.draw(2000)[:, 1:]
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)


def test_the_operation_that_was_drawn_is_done(images):
    augment = SiameseAugment("flip_cutout")
    draws = draws_of(6)
    assert torch.equal(augment(images, draws), SiameseAugment("flip")(images, draws))
    draws[:, 0] = 1
    assert torch.equal(augment(images, draws), SiameseAugment("cutout")(images, F.pad(draws[:, 1:], (1, 0))))


@pytest.mark.parametrize("operations", ["color_blur", "Color", "", "color-crop"])
def test_an_unknown_name_is_told_in_one_line(operations):
    with pytest.raises(UsageError, match=f"augmentation '{operations}': there is no .*; join names by underscores"):
        SiameseAugment(operations)
