"""What generated samples are worth: distances to real ones in the features of a classifier of the same data."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_distill.core.errors import UsageError, check_least
from lit_distill.core.files import atomic_path
from lit_distill.core.networks import freeze
from lit_distill.core.taps import FeatureTaps
from lit_distill.diffusion.draws import Draws
from lit_distill.diffusion.metrics import (
    frechet_inception_distance,
    nearest_train_ratio,
    precision_recall,
    relative_frechet_distance,
    squared_mmd,
)

PICTURE = "samples.png"


class GenerationEvaluation:
    """Generates as many samples of each class, from the same noise every time, and measures them.

    With a classifier that was trained on the training split of the same data, seeing them as the generator does:

    - `fd`: Frechet distance to the real samples of the part in its features, divided by their total variance. Another
      classifier gives other numbers: give all runs that are compared the same one.
    - `precision`, `recall`: of the manifolds in these features, with equally many samples of both.
    - `acc`: how often the classifier finds the class that was asked for. Alone it misleads: class means score 1.

    Without one, or besides:

    - `mmd`: squared maximum mean discrepancy of the samples themselves.
    - `nearest_train`: median distance to the training set, over that of the real samples; far below 1 if memorised.
    - `std_ratio`: standard deviation of generated over real; shows collapse and over-saturation.
    - `fid`: Frechet distance of pixels in the features of `extractor`, by torchmetrics; FID if that is Inception's.
    - `nfe`, `images_per_second`: calls of the network for a sample, and speed on the machine of the run.

    Args:
        classifier: Such a classifier, from images to logits.
        tap: Its module whose output is the feature; its `penultimate` if None.
        samples: Samples to generate in test.
        val_samples: Samples to generate in validation.
        batch_size: Samples at once.
        columns: Samples of each class in the picture.
        neighbors: k of precision and recall.
        real_samples: Real samples at most, of each part.
        extractor: From uint8 images of three channels to features (N, D), such as `metrics.inception(weights)`.
    """

    def __init__(
        self,
        classifier: nn.Module | None = None,
        tap: str | None = None,
        samples: int = 2000,
        val_samples: int = 1000,
        batch_size: int = 500,
        columns: int = 10,
        neighbors: int = 3,
        real_samples: int = 5000,
        extractor: nn.Module | None = None,
    ) -> None:
        check_least("model.evaluation", 2, samples=samples, val_samples=val_samples, real_samples=real_samples)
        check_least("model.evaluation", 1, batch_size=batch_size, columns=columns, neighbors=neighbors)
        self.classifier = None if classifier is None else freeze(classifier)
        self.extractor = None if extractor is None else freeze(extractor)
        self.samples, self.val_samples = samples, val_samples
        self.batch_size = batch_size
        self.columns = columns
        self.neighbors = neighbors
        self.real_samples = real_samples
        self._taps = None
        if classifier is not None:
            name = tap or getattr(classifier, "penultimate", None)
            if name is None:
                raise UsageError(
                    f"model.evaluation.tap: {type(classifier).__name__} does not say which module's output is its "
                    "feature; name one"
                )
            self._taps, self._tap = FeatureTaps(classifier, [name]), name

    def __call__(self, module: Any, data: Any, part: str) -> dict[str, float]:
        """Measures the student of a module.

        Args:
            module: A `DiffusionDistiller`.
            data: The data module; its `real` gives real samples.
            part: "val" or "test".

        Returns:
            Values by name; the same in all processes.

        Raises:
            UsageError: The data module has no real samples to compare with.
        """
        if not hasattr(data, "real"):
            raise UsageError(
                f"data: {type(data).__name__} has no `real`; wrap it in lit_distill.diffusion.GeneratorImages"
            )
        count = self.samples if part == "test" else self.val_samples
        generated, labels, speed = self._generate(module, data, count)
        real, _ = data.real(part, self.real_samples)
        real = real.to(generated.device)
        train = data.real("train", self.real_samples)[0].to(generated.device)
        size = min(len(real), len(generated))
        values: dict[str, Any] = {
            "mmd": squared_mmd(generated.flatten(1)[:size], real.flatten(1)[:size]),
            "nearest_train": nearest_train_ratio(generated.flatten(1), train.flatten(1), real.flatten(1)),
            "std_ratio": generated.std() / real.std(),
            "nfe": module.sampler.evaluations(),
        }
        if part == "test":
            values["images_per_second"] = speed
        if self.classifier is not None:
            values |= self._by_classifier(generated, labels, real)
        if self.extractor is not None:
            pixels = (data.pixels(samples) for samples in (generated, real))
            network = self.extractor.to(generated.device)
            values["fid"] = frechet_inception_distance(*pixels, extractor=network, batch_size=self.batch_size)
        self._show(module, data, generated, labels, part)
        return {name: float(value) for name, value in values.items()}

    def _generate(self, module: Any, data: Any, count: int) -> tuple[Tensor, Tensor, float]:
        world, device = module.trainer.world_size, module.device
        each = -(-count // world)
        # Classes in turn: any first part of the samples has all of them.
        labels = (torch.arange(each * world, device=device) % data.num_classes).tensor_split(world)
        draws = Draws(0, device, rank=module.global_rank, world_size=world)
        parts: list[Tensor] = []
        was_training = module.student.training
        module.student.eval()
        begun = time.perf_counter()
        for own in labels[module.global_rank].split(self.batch_size):
            noise = draws.normal((len(own), *data.sample_shape))
            parts.append(module.generate(module.classes_of(own), noise, draws).float())
        made = torch.cat(parts)
        if made.is_cuda:
            torch.cuda.synchronize(device)
        speed = len(made) * world / (time.perf_counter() - begun)
        module.student.train(was_training)
        if world > 1:
            made = module.all_gather(made).flatten(0, 1)
        return made, torch.cat(list(labels)), speed

    @torch.no_grad()
    def _features(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        assert self.classifier is not None
        assert self._taps is not None
        self.classifier.to(samples.device)
        found = [self._taps(some) for some in samples.split(self.batch_size)]
        logits = torch.cat([logits for logits, _ in found])
        return logits, torch.cat([features[self._tap].flatten(1) for _, features in found])

    def _by_classifier(self, generated: Tensor, labels: Tensor, real: Tensor) -> Mapping[str, Any]:
        logits, features = self._features(generated)
        real_features = self._features(real)[1]
        size = min(len(features), len(real_features))
        precision, recall = precision_recall(features[:size], real_features[:size], k=self.neighbors)
        return {
            "fd": relative_frechet_distance(features, real_features),
            "precision": precision,
            "recall": recall,
            "acc": (logits.argmax(1) == labels).float().mean(),
        }

    def _show(self, module: Any, data: Any, generated: Tensor, labels: Tensor, part: str) -> None:
        """Keeps a picture in the run's folder: a row for each class, of at most ten."""
        folder = module.trainer.log_dir  # asked by all processes: one tells the others
        if not module.trainer.is_global_zero:
            return
        from torchvision.utils import make_grid, save_image

        classes = min(data.num_classes, 10)
        rows = torch.cat([generated[labels == number][: self.columns] for number in range(classes)])
        grid = make_grid(data.pixels(rows), nrow=min(self.columns, len(rows) // classes or 1), padding=1)
        for logger in module.loggers:
            if hasattr(logger, "log_image"):  # Weights & Biases
                logger.log_image(f"{part}/samples", [grid], step=module.iteration)
        if part != "test" or not folder:
            return
        with atomic_path(Path(folder) / PICTURE) as file:
            save_image(grid, file, format="png")
        module.panels["samples"] = {
            "file": PICTURE,
            "title": f"samples, {module.sampler.evaluations()} evaluations each",
            "summary": f"A row for each of {classes} classes, from noise that is the same in all runs.",
            "head": ["class"],
            "rows": [[name] for name in list(data.classes)[:classes]],
        }
