"""Images per second of the in-memory batched pipeline against the usual one that works image by image with PIL.

    python benchmarks/augmentation.py

Both crop from 4 pixels of padding, mirror, and normalize 32x32 colour images, in batches of 128, with one thread.
"""

import statistics
import time

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from lit_distill.core.loading import EpochPermutation, TensorLoader
from lit_distill.image.augment import CIFAR10_STATISTICS, Augment, ImageTransform, Normalize

IMAGES, BATCH, REPEATS = 5_000, 128, 7


class PILImages(Dataset):
    """Images and labels the way torchvision's CIFAR10 gives them."""

    def __init__(self, pixels, labels, transform):
        self.pixels, self.labels, self.transform = pixels, labels, transform

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), int(self.labels[index])


def seconds(loader):
    start = time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - start


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (IMAGES, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 10, (IMAGES,))
    mean, std = CIFAR10_STATISTICS
    chain = transforms.Compose(
        [
            transforms.RandomCrop(32, 4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
    loaders = {
        "per image, PIL": DataLoader(PILImages(pixels.numpy(), labels, chain), BATCH, shuffle=True, drop_last=True),
        "batched, in memory": TensorLoader(
            {"images": pixels.permute(0, 3, 1, 2), "labels": labels},
            EpochPermutation(IMAGES),
            BATCH,
            transforms={"images": ImageTransform(Normalize(mean, std), Augment())},
            drop_last=True,
        ),
    }
    for loader in loaders.values():  # warm-up
        seconds(loader)
    # Interleaved, so that both meet the same moods of the machine.
    times = {name: [] for name in loaders}
    for _ in range(REPEATS):
        for name, loader in loaders.items():
            times[name].append(seconds(loader))
    images = IMAGES // BATCH * BATCH
    rates = {name: images / statistics.median(values) for name, values in times.items()}
    slow, fast = (times[name] for name in loaders)
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    print(f"{'pipeline':<20} {'images/s':>10}   (median of {REPEATS} interleaved passes over {images} images)")
    for name, rate in rates.items():
        print(f"{name:<20} {rate:>10,.0f}")
    print(f"ratio {statistics.median(ratios):.1f} (lowest {ratios[0]:.1f}, highest {ratios[-1]:.1f})")


if __name__ == "__main__":
    main()
