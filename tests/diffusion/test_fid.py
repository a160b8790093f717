"""FID with any extractor, by torchmetrics; and that nothing is downloaded."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn

from lit_distill.core.errors import UsageError
from lit_distill.diffusion.evaluation import GenerationEvaluation
from lit_distill.diffusion.methods.dmd2 import DMD2
from lit_distill.diffusion.metrics import frechet_distance, frechet_inception_distance, inception


class Extractor(nn.Module):
    """Six numbers of an image: means of its upper and lower half by channel."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        return images.float().view(len(images), 3, 2, -1).mean(-1).flatten(1) / 50


def test_it_is_the_frechet_distance_of_the_features():
    generated, real = torch.rand(40, 3, 8, 8), torch.rand(60, 3, 8, 8) ** 2
    found = frechet_inception_distance(generated, real, extractor=Extractor(), batch_size=16)
    first, second = (Extractor()((x * 255).round().byte()).double() for x in (generated, real))
    c1, c2 = (np.cov(x.numpy(), rowvar=False) for x in (first, second))
    mean = float((first.mean(0) - second.mean(0)).square().sum())
    expected = mean + np.trace(c1) + np.trace(c2) - 2 * np.trace(sqrtm(c1 @ c2)).real
    assert float(found) == pytest.approx(expected, rel=1e-3)
    assert float(frechet_distance(first, second)) == pytest.approx(expected, rel=1e-6)
    grey = torch.rand(20, 1, 8, 8)
    same = frechet_inception_distance(grey, grey, extractor=Extractor())
    assert abs(float(same)) < 1e-3


def test_pixels_are_given_as_they_were_in_the_file():
    class Seen(Extractor):
        def forward(self, images):
            seen.append(images)
            return super().forward(images)

    seen = []
    pixels = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    again = ((pixels / 255 - 0.5) / 0.5) * 0.5 + 0.5  # normalized and back: a little less than k / 255, or more
    frechet_inception_distance(again, again, extractor=Seen())
    # Before these torchmetrics gives an image of its own, to count features.
    assert all(torch.equal(images, pixels.expand(-1, 3, -1, -1)) for images in seen[-2:])


def test_a_run_measures_it(trainer, digits, make_denoiser):
    evaluation = GenerationEvaluation(samples=20, val_samples=20, real_samples=30, extractor=Extractor())
    module = DMD2(make_denoiser(1), make_denoiser(), [2.5], evaluation=evaluation)
    fit = trainer(limit_val_batches=1)
    fit.validate(module, datamodule=digits, verbose=False)
    assert fit.callback_metrics["val/fid"] > 0


def test_inceptions_weights_are_the_users(tmp_path):
    with pytest.raises(UsageError, match=r"fid: \S+none.pth does not exist; put Inception's weights there"):
        inception(str(tmp_path / "none.pth"))
    try:
        import torch_fidelity  # noqa: F401
    except ModuleNotFoundError:
        (tmp_path / "some.pth").write_bytes(b"x")
        with pytest.raises(UsageError, match="package torch-fidelity is missing"):
            inception(str(tmp_path / "some.pth"))
