import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image, ImageOps
from scipy.stats import chisquare

from lit_distill.image.augment import CIFAR10_STATISTICS, Augment, ImageTransform, Normalize


def make_images(count=12, shape=(3, 9, 7)):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw(augment, count, seed=0):
    return augment.draw(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("mode", "torchvision_mode"), [("zero", "constant"), ("reflect", "reflect")])
@pytest.mark.parametrize(
    ("padding", "flip", "shape"), [(4, True, (3, 9, 7)), (2, False, (1, 6, 6)), (0, True, (3, 4, 5))]
)
def test_crops_equal_torchvision_for_the_same_draws(padding, flip, shape, mode, torchvision_mode, layout):
    images = make_images(shape=shape)
    augment = Augment(padding, flip=flip, padding_mode=mode)
    draws = draw(augment, len(images))
    augmented = augment(images.contiguous(memory_format=layout), draws)
    for image, (top, left, mirrored), found in zip(images, draws.tolist(), augmented, strict=True):
        expected = TF.crop(TF.pad(image, padding, padding_mode=torchvision_mode), top, left, *shape[1:])
        expected = TF.horizontal_flip(expected) if mirrored else expected
        assert torch.equal(found, expected)
    assert augmented.dtype == torch.uint8
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    if flip:
        assert 0 < draws[:, 2].sum() < len(images)  # both kinds were compared


def test_crop_and_mirror_equal_pil():
    pixels = make_images(1, (3, 8, 8))
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    padded = ImageOps.expand(image, border=2, fill=0)
    expected = ImageOps.mirror(padded.crop((1, 3, 9, 11)))  # left 1, top 3
    found = Augment(2)(pixels, torch.tensor([[3, 1, 1]]))
    assert np.array_equal(found[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_every_offset_and_mirroring_is_equally_likely():
    draws = draw(Augment(4), 81 * 2 * 100)
    kinds = draws[:, 0] * 18 + draws[:, 1] * 2 + draws[:, 2]
    assert chisquare(kinds.bincount(minlength=162).numpy()).pvalue > 1e-4
    assert draws.min(0).values.tolist() == [0, 0, 0]
    assert draws.max(0).values.tolist() == [8, 8, 1]


def test_draws_follow_from_the_generator():
    for random in (Augment(), ImageTransform(Normalize((0.5,), (0.25,)), Augment())):
        assert torch.equal(draw(random, 50, seed=1), draw(random, 50, seed=1))
        assert not torch.equal(draw(random, 50, seed=1), draw(random, 50, seed=2))


def test_augmentation_without_padding_and_mirroring_is_the_identity():
    augment = Augment(0, flip=False)
    images = make_images()
    assert torch.equal(augment(images, draw(augment, len(images))), images)
    assert not augment.random


def test_augmentation_leaves_the_images_it_is_given():
    images = make_images().contiguous(memory_format=torch.channels_last)
    before = images.clone()
    augment = Augment()
    augment(images, draw(augment, len(images)))
    assert torch.equal(images, before)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_normalization_equals_torchvision(layout):
    images = make_images()
    mean, std = CIFAR10_STATISTICS
    expected = TF.normalize(TF.to_dtype(images, torch.float32, scale=True), list(mean), list(std))
    found = Normalize(mean, std)(images.contiguous(memory_format=layout))
    torch.testing.assert_close(found, expected)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_one_mean_holds_for_all_channels():
    images = make_images()
    torch.testing.assert_close(Normalize((0.5,), (0.25,))(images), (images.float() / 255 - 0.5) / 0.25)


def test_transform_augments_first_and_normalizes_after():
    images = make_images()
    transform = ImageTransform(Normalize((0.5,), (0.25,)), Augment(2))
    draws = draw(transform, len(images))
    expected = torch.stack(
        [
            TF.horizontal_flip(crop) if mirrored else crop
            for image, (top, left, mirrored) in zip(images, draws.tolist(), strict=True)
            for crop in [TF.crop(TF.pad(image, 2), top, left, 9, 7)]
        ]
    )
    torch.testing.assert_close(transform(images, draws), (expected.float() / 255 - 0.5) / 0.25)


def test_transform_without_augmentation_draws_nothing():
    transform = ImageTransform(Normalize((0.5,), (0.25,)))
    assert draw(transform, 5).shape == (5, 0)
    assert not transform.random
    assert ImageTransform(transform.normalize, Augment()).random
    assert not ImageTransform(transform.normalize, Augment(0, flip=False)).random


def test_repr_tells_transforms_apart():
    normalize = Normalize((0.5,), (0.25,))
    transforms = [
        ImageTransform(normalize),
        ImageTransform(Normalize((0.5,), (0.5,))),
        ImageTransform(normalize, Augment()),
        ImageTransform(normalize, Augment(2)),
        ImageTransform(normalize, Augment(flip=False)),
        ImageTransform(normalize, Augment(padding_mode="reflect")),
    ]
    assert len({repr(transform) for transform in transforms}) == len(transforms)
    assert repr(ImageTransform(Normalize((0.5,), (0.25,)))) == repr(transforms[0])
