import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.dataset.crops import RandomResizedCrop, split_tiles
from lit_distill.dataset.data.relabelled import RelabelledImages
from lit_distill.dataset.methods.rded import PatchSelection, judge, select, tile


class Bright(nn.Module):
    """The brighter an image, the surer it is of class 3, whatever the class."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images):
        return self.scale * images.mean((1, 2, 3))[:, None] * torch.eye(10)[3]


def test_the_least_losses_are_chosen_one_crop_an_image():
    losses = torch.rand(40, 5)
    best, kept = select(losses, 7)
    matrix = losses.numpy()
    order = sorted(range(40), key=lambda image: matrix[image].min())[:7]
    assert kept.tolist() == order
    assert best.tolist() == [int(np.argmin(matrix[image])) for image in order]
    assert losses[kept, best].max() <= np.sort(matrix.min(1))[7]


def test_a_patch_is_judged_by_its_cross_entropy_amid_zeros(small_net):
    network = small_net().eval()
    patches = torch.randn(4, 1, 5, 5)
    canvas = torch.zeros(4, 1, 8, 8)
    canvas[:, :, 1:6, 1:6] = patches
    logits = network(canvas).detach().double().numpy()
    wanted = np.log(np.exp(logits).sum(1)) - logits[:, 2]
    np.testing.assert_allclose(judge(network, patches, 2, size=8).numpy(), wanted, rtol=1e-5)


def test_tiling_is_a_bijection_that_begins_with_the_best():
    patches = torch.randn(12, 2, 3, 3)
    images = tile(patches, 2)
    assert images.shape == (3, 2, 6, 6)
    assert torch.equal(images[:, :, :3, :3], patches[:3])
    assert torch.equal(images[:, :, :3, 3:], patches[3:6])
    assert torch.equal(split_tiles(images, 2).permute(1, 2, 0, 3, 4, 5).flatten(0, 2), patches)
    assert torch.equal(tile(patches, 1), patches)


def test_the_set_is_the_crops_of_which_the_network_is_surest(digits):
    module = PatchSelection(digits(), Bright(), per_class=4, images_per_class=15, crops=3, seed=1)
    module.setup()
    source = module.source
    pixels, labels = source.part("train")
    means = module.distilled.network_images().mean((1, 2, 3)).view(10, 4)
    assert module.distilled.images.dtype == torch.uint8
    assert module.distilled.labels.tolist() == sorted(list(range(10)) * 4)
    # Of class 3 the brightest crops are the surest, of all others the darkest.
    assert (means[3].diff() <= 1e-3).all()
    assert (means[[0, 1, 2, 4, 5, 6, 7, 8, 9]].diff(dim=1) >= -1e-3).all()
    average = source.normalize(pixels[labels == 3]).mean()
    assert means[3].min() > average


def test_crops_that_are_whole_images_are_the_images_themselves(digits, monkeypatch):
    monkeypatch.setattr(RandomResizedCrop, "scale", (1.0, 1.0))
    whole = RandomResizedCrop.boxes
    monkeypatch.setattr(
        RandomResizedCrop,
        "boxes",
        lambda self, draws, h, w: torch.tensor([0, 0, h, w]).expand(len(whole(self, draws, h, w)), 4),
    )
    module = PatchSelection(digits(), Bright(), per_class=3, crops=2, seed=1)
    module.setup()
    pixels, labels = module.source.part("train")
    for image, label in zip(module.distilled.images, module.distilled.labels, strict=True):
        assert (pixels[labels == label] == image).flatten(1).all(1).any()


@pytest.mark.parametrize("grid", [1, 2])
def test_tiles_are_crops_of_real_images_made_as_large_as_a_tile(digits, small_net, grid):
    module = PatchSelection(digits(), small_net(), per_class=2, images_per_class=12, crops=2, grid=grid, seed=1)
    module.setup()
    source = module.source
    pixels, labels = source.part("train")
    tiles = split_tiles(module.distilled.network_images(), grid)
    # Every crop of class 0 that there could have been, of all images and all square boxes.
    possible = []
    for side in range(2, 9):
        for top in range(9 - side):
            for left in range(9 - side):
                cut = source.normalize(pixels[labels == 0])[:, :, top : top + side, left : left + side]
                size = (8 // grid, 8 // grid)
                possible.append(F.interpolate(cut, size, mode="bilinear", align_corners=False, antialias=True))
    possible = torch.cat(possible).flatten(1)
    for patch in tiles[:2].flatten(0, 2).flatten(1):
        assert (possible - patch).abs().amax(1).min() < 1 / 255 / source.normalize.std[0]


def test_the_seed_alone_decides(digits, small_net):
    sets = [
        PatchSelection(digits(), small_net(), per_class=2, images_per_class=10, crops=2, seed=seed)
        for seed in (1, 1, 2)
    ]
    for each in sets:
        each.setup()
    first, second, other = (each.distilled.images for each in sets)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_labels_come_from_the_network_batch_by_batch(digits, small_net):
    network = small_net(norm="batch").eval()
    images = PatchSelection(digits(), network, per_class=2, images_per_class=10, crops=2, seed=1)
    data = RelabelledImages(images, [network], batch_statistics=False, crop_scale=(1.0, 1.0), batch_size=10, seed=1)
    batches = list(data.train_dataloader())
    assert len(batches) == 2
    for batch in batches:
        torch.testing.assert_close(batch.targets, network(batch.images).detach())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": 3, "per_class": 1}, "3 square tiles do not fit 8 x 8"),
        ({"per_class": 10, "images_per_class": 8}, r"data\.images_per_class is 8"),
        ({"per_class": 30}, "the smallest class"),
        ({"crops": 0}, r"data\.crops is 0"),
    ],
)
def test_nonsense_is_one_line(digits, small_net, change, message):
    with pytest.raises(UsageError, match=message) as error:
        PatchSelection(digits(), small_net(), **({"per_class": 2} | change)).setup()
    assert "\n" not in str(error.value)
