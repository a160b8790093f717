import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop
from torchvision.transforms.functional import resized_crop

from lit_distill.core.errors import UsageError
from lit_distill.dataset.crops import CutMix, RandomResizedCrop, ShuffleTiles, interpolation, join_tiles, split_tiles


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    return torch.randn(6, 3, 12, 12, generator=generator())


def test_crops_equal_torchvisions_resized_crop_and_interpolate(images):
    crop = RandomResizedCrop(flip=False)
    draws = crop.draw(6, generator(1))
    boxes = crop.boxes(draws, 12, 12).tolist()
    result = crop(images, draws)
    assert len({tuple(box) for box in boxes}) == 6
    for image, (top, left, h, w), found in zip(images, boxes, result, strict=True):
        cut = image[None, :, top : top + h, left : left + w]
        wanted = F.interpolate(cut, (12, 12), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(found, resized_crop(image, top, left, h, w, [12, 12]), atol=1e-5, rtol=0)
    assert result.is_contiguous(memory_format=torch.channels_last)


def test_a_crop_that_shrinks_is_smoothed_as_in_torchvision(images):
    crop = RandomResizedCrop(scale=(0.5, 1.0), ratio=(1.0, 1.0), flip=False, size=5)
    draws = crop.draw(6, generator(2))
    for image, box, found in zip(images, crop.boxes(draws, 12, 12).tolist(), crop(images, draws), strict=True):
        assert box[2] == box[3] > 5
        torch.testing.assert_close(found, resized_crop(image, *box, [5, 5], antialias=True), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (20, 31)])
def test_boxes_follow_from_the_draws_as_torchvision_makes_them(height, width):
    crop = RandomResizedCrop(scale=(0.3, 1.0))
    draws = crop.draw(40, generator(3))
    for row, found in zip(draws.double().numpy(), crop.boxes(draws, height, width).tolist(), strict=True):
        wanted = [0, 0, height, width]
        if width / height > 4 / 3:
            w = round(height * 4 / 3)
            wanted = [0, (width - w) // 2, height, w]
        for area, ratio in zip(row[:10], row[10:20], strict=True):
            target = height * width * (0.3 + 0.7 * area)
            ratio = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * ratio)
            w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
            if 0 < w <= width and 0 < h <= height:
                wanted = [int(row[20] * (height - h + 1)), int(row[21] * (width - w + 1)), h, w]
                break
        assert found == wanted


def test_boxes_are_distributed_as_torchvisions():
    draws = RandomResizedCrop().draw(2000, generator(4))
    own = RandomResizedCrop().boxes(draws, 32, 32).numpy()
    image = torch.zeros(3, 32, 32)
    other = np.array([TorchvisionCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)])
    for column in range(4):
        assert ks_2samp(own[:, column], other[:, column]).pvalue > 0.001
    assert ks_2samp(own[:, 2] * own[:, 3], other[:, 2] * other[:, 3]).pvalue > 0.001


def test_a_box_that_never_fits_gives_way_to_the_largest_that_is_allowed():
    crop = RandomResizedCrop(scale=(1.0, 1.0))
    draws = crop.draw(1, generator())
    draws[:, 10:20] = 1.0  # the widest ratio each time
    assert crop.boxes(draws, 30, 30).tolist() == [[0, 0, 30, 30]]
    draws[:, 10:20] = 0.0
    assert crop.boxes(draws, 30, 60).tolist() == [[0, 10, 30, 40]]
    draws[:, 10:20] = 1.0
    assert crop.boxes(draws, 60, 30).tolist() == [[10, 0, 40, 30]]


def test_whole_images_stay_bit_for_bit_and_half_of_them_are_mirrored():
    images = torch.randn(400, 1, 8, 8, generator=generator())
    crop = RandomResizedCrop(scale=(1.0, 1.0))
    draws = crop.draw(400, generator(5))
    result = crop(images, draws)
    mirrored = draws[:, -1] < 0.5
    assert torch.equal(result[~mirrored], images[~mirrored])
    assert torch.equal(result[mirrored], images[mirrored].flip(3))
    assert 160 < int(mirrored.sum()) < 240
    assert torch.equal(RandomResizedCrop(scale=(1.0, 1.0), flip=False)(images, draws), images)


def test_a_single_row_of_draws_holds_for_the_whole_batch(images):
    crop = RandomResizedCrop()
    draws = crop.draw(1, generator(6))
    torch.testing.assert_close(crop(images, draws), crop(images, draws.expand(6, -1)))


def test_gradients_reach_the_pixels_of_the_box_alone(images):
    crop = RandomResizedCrop(scale=(0.1, 0.3), flip=False)
    draws = crop.draw(1, generator(7))
    top, left, h, w = crop.boxes(draws, 12, 12)[0].tolist()
    images.requires_grad_(True)
    crop(images, draws).sum().backward()
    inside = torch.zeros(12, 12, dtype=torch.bool)
    inside[top : top + h, left : left + w] = True
    assert (images.grad[:, :, inside] > 0).all()
    assert (images.grad[:, :, ~inside] == 0).all()


def test_rows_of_an_interpolation_sum_to_one():
    start, length = torch.tensor([0, 3, 5]), torch.tensor([12, 1, 7])
    for out in (3, 12, 20):
        torch.testing.assert_close(interpolation(start, length, 12, out).sum(2), torch.ones(3, out))
    assert torch.equal(interpolation(start[1:2], length[1:2], 12, 4)[0].argmax(1), torch.full((4,), 3))


def test_cutmix_takes_one_box_by_one_permutation_and_leaves_the_originals(images):
    mix, before = CutMix(), images.clone()
    for seed in range(20):
        draws = mix.draw(6, generator(seed))
        order = draws[:, 0].long()
        assert sorted(order.tolist()) == list(range(6))
        kept, vertical, horizontal = draws[0, 1:].tolist()
        side = int(12 * math.sqrt(1 - kept)) // 2
        wanted = images.clone().numpy()
        for row in range(12):
            for column in range(12):
                y, x = int(vertical * 12), int(horizontal * 12)
                if y - side <= row < y + side and x - side <= column < x + side:
                    wanted[:, :, row, column] = before[order, :, row, column].numpy()
        assert torch.equal(mix(images, draws), torch.from_numpy(wanted))
    assert torch.equal(images, before)


def test_the_share_that_cutmix_keeps_is_uniform():
    kept = [float(CutMix().draw(2, generator(seed))[0, 1]) for seed in range(1000)]
    assert ks_2samp(kept, np.random.default_rng(0).beta(1, 1, 1000)).pvalue > 0.001


def test_tiles_come_apart_and_together_again(images):
    tiles = split_tiles(images, 3)
    assert torch.equal(tiles[2, 1, 2], images[2, :, 4:8, 8:12])
    assert torch.equal(join_tiles(tiles), images)


def test_shuffling_moves_whole_rows_and_columns_of_tiles():
    places = torch.arange(9.0).view(1, 1, 3, 3).repeat(5, 1, 1, 1)
    shuffle = ShuffleTiles(3)
    draws = shuffle.draw(5, generator(8))
    result = shuffle(places.repeat_interleave(2, 2).repeat_interleave(2, 3), draws)
    assert torch.equal(result[:, :, ::2, ::2].repeat_interleave(2, 2).repeat_interleave(2, 3), result)
    for row, found in zip(draws.tolist(), result[:, 0, ::2, ::2].tolist(), strict=True):
        assert found == [[3 * i + j for j in row[3:]] for i in row[:3]]
    assert len({tuple(row) for row in draws.tolist()}) == 5


@pytest.mark.parametrize("transform", [RandomResizedCrop(), CutMix(), ShuffleTiles(2)])
def test_the_same_draws_make_the_same_images_bit_for_bit(transform, images):
    first, second = (transform.draw(6, generator(9)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(transform(images, first), transform(images, second))
    assert not torch.equal(transform(images, first), transform(images, transform.draw(6, generator(10))))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_scales_that_are_no_shares_are_refused(scale):
    with pytest.raises(UsageError, match="crop_scale"):
        RandomResizedCrop(scale=scale)
