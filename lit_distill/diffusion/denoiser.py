"""One wrapper for all networks that denoise: what they predict, how they see noise, what "no condition" is to them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lit_distill.core.errors import UsageError
from lit_distill.core.networks import pretrained as load_pretrained
from lit_distill.diffusion.networks import Condition, call_network
from lit_distill.diffusion.paths import Coefficients, GaussianPath, Prediction, check_prediction

_TOLD_APART = (1e-4, 1e4)  # noise-to-signal ratios; beyond these a sample looks like data, or like noise, alone


class Denoiser(nn.Module):
    r"""A network on a path: `denoiser(x_t, t, condition)` is its estimate of the data x0, or what else is asked for.

    With prediction "edm" the network F is preconditioned, with r the noise and s the standard deviation of the data:

    .. math:: x_0 = c_{skip} \, x + c_{out} \, F(c_{in} \, x, \tfrac14 \ln r), \quad x = x_t / \alpha, \quad
        c_{skip} = \frac{s^2}{r^2 + s^2}, \; c_{out} = \frac{r s}{\sqrt{r^2 + s^2}}, \; c_{in} = (r^2 + s^2)^{-1/2}

    Args:
        network: Called as `call_network` says.
        path: The path that it was, or is to be, trained on.
        prediction: What the network's output is: x0, eps, v, u, score, or "edm".
        num_classes: Classes, where conditions are class numbers; this number itself then means "no condition".
        data_std: s above.
        time_input: What the network is given as time: "log_noise" (ln r / 4, with r between 1e-4 and 1e4: at pure noise
            and pure data it has no bound), "time" (t), "thousandths" (1000 t), or "saturating" (1000 r / (1 + r), for
            networks with sinusoidal embeddings made for 0 ... 1000).
        no_condition: What "no condition" is where conditions are tensors by name: "zeros" (SDXL), "empty_prompt" (the
            data give its embedding, see `set_null`), or None where there is none.

    Raises:
        UsageError: Prediction and path do not go together.

    Reference: Karras, Aittala, Aila, Laine, 2022, arXiv 2206.00364 (preconditioning).
    """

    def __init__(
        self,
        network: nn.Module,
        path: GaussianPath,
        prediction: Literal["x0", "eps", "v", "u", "score", "edm"] = "edm",
        num_classes: int | None = None,
        data_std: float = 0.5,
        time_input: Literal["log_noise", "time", "thousandths", "saturating"] = "log_noise",
        no_condition: Literal["zeros", "empty_prompt"] | None = None,
    ) -> None:
        super().__init__()
        check_prediction(prediction, path)
        self.network = network
        self.path = path
        self.prediction = prediction
        self.num_classes = num_classes
        self.data_std = data_std
        self.time_input = time_input
        self.no_condition = no_condition
        self._null: Mapping[str, Tensor] | None = None

    def forward(
        self,
        x_t: Float[Tensor, "b *sample"],
        t: Float[Tensor, " b"] | float,
        condition: Condition = None,
        prediction: Prediction = "x0",
    ) -> Float[Tensor, "b *sample"]:
        """Denoises.

        Args:
            x_t: Noisy samples.
            t: Their times.
            condition: Class numbers (B,), or tensors by name.
            prediction: What is wanted.

        Returns:
            The prediction (B, ...) in float32. What modules inside computed is seen by `FeatureTaps(denoiser, names)`,
            with names such as "network.mid_block".
        """
        t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).expand(len(x_t))
        dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), torch.float32)
        found = self.path.at(t, x_t)  # once for all three
        given, time = self._input(x_t, found), self._time(t, found)
        out = call_network(self.network, given.to(dtype), time.float(), condition)
        return self._estimate(out, x_t, t, prediction, found)

    def network_input(self, x_t: Float[Tensor, "b *sample"], t: Float[Tensor, " b"]) -> Float[Tensor, "b *sample"]:
        """Returns what the network sees of noisy samples."""
        return self._input(x_t, self.path.at(t, x_t))

    def _input(self, x_t: Tensor, found: Coefficients) -> Tensor:
        if self.prediction != "edm":
            return x_t
        alpha, sigma, _, _ = found
        # c_in x = (x_t / alpha) / sqrt(r^2 + s^2), without dividing by an alpha of 0.
        return x_t / _beside((sigma.square() + (alpha * self.data_std).square()).sqrt(), x_t)

    def estimate(
        self, out: Float[Tensor, "b *sample"], x_t: Float[Tensor, "b *sample"], t: Tensor, prediction: Prediction
    ) -> Float[Tensor, "b *sample"]:
        """Returns the prediction that is wanted, in float32, from what the network said."""
        return self._estimate(out, x_t, t, prediction, self.path.at(t, x_t))

    def _estimate(self, out: Tensor, x_t: Tensor, t: Tensor, prediction: Prediction, found: Coefficients) -> Tensor:
        out = out.float()
        if self.prediction != "edm":
            return self.path.convert(out, x_t.float(), t, self.prediction, prediction)
        alpha, sigma, _, _ = found
        variance = self.data_std**2
        spread = sigma.square() + alpha.square() * variance
        skip, scale = alpha * variance / spread, sigma * self.data_std / spread.sqrt()
        x0 = (_beside(skip, x_t) * x_t + _beside(scale, out) * out).float()
        return self.path.convert(x0, x_t.float(), t, "x0", prediction)

    def network_time(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Returns times (B,) as the network is given them."""
        return self._time(t, self.path.at(t))

    def _time(self, t: Tensor, found: Coefficients) -> Tensor:
        if self.time_input == "time":
            return t
        if self.time_input == "thousandths":
            return 1000 * t
        alpha, sigma = found.alpha.flatten(), found.sigma.flatten()
        if self.time_input == "saturating":
            return 1000 * sigma / (alpha + sigma)
        return (sigma / alpha).clamp(*_TOLD_APART).log() / 4

    def save_for_pipelines(self, folder: Path, kept: Mapping[str, Any]) -> str:
        """See `lit_distill.diffusion.pipelines.save_for_pipelines`."""
        from lit_distill.diffusion.pipelines import save_for_pipelines

        return save_for_pipelines(self, folder, kept)

    # ---- no condition ----------------------------------------------------------------------------------------------

    def set_null(self, condition: Mapping[str, Tensor]) -> None:
        """Says what "no condition" is: tensors (1, ...) by name, such as the embedding of an empty prompt."""
        self._null = dict(condition)

    def null_condition(self, condition: Condition) -> Condition:
        """Returns "no condition" for as many samples as `condition` is for.

        Raises:
            UsageError: The network knows none.
        """
        if isinstance(condition, Tensor) and self.num_classes is not None:
            return torch.full_like(condition, self.num_classes)
        if isinstance(condition, Mapping):
            if self._null is not None:
                return {
                    name: self._null[name].to(value).expand_as(value) if name in self._null else value
                    for name, value in condition.items()
                }
            if self.no_condition == "zeros":
                # Sizes are no part of what is said.
                return {k: v if k == "time_ids" else torch.zeros_like(v) for k, v in condition.items()}
        raise UsageError(
            "model.guidance needs a network that knows 'no condition'; train it with label_dropout and give "
            "num_classes, or set no_condition for text, or guide with 1.0"
        )


def pretrained(weights: str, network: Denoiser | None = None) -> Denoiser:
    """Loads a denoiser that a run has left, see `lit_distill.core.pretrained`.

    Args:
        weights: A run folder, its `student/` folder, or a file with weights.
        network: The denoiser to fill; folders say themselves which one it is.

    Raises:
        UsageError: There are no such weights, or they are of another kind of network.
    """
    found = load_pretrained(weights, network)
    if not isinstance(found, Denoiser):
        raise UsageError(f"weights: {weights} holds a {type(found).__name__}, no Denoiser; give the run of a teacher")
    return found


def guided(
    denoiser: Denoiser,
    x_t: Float[Tensor, "b *sample"],
    t: Float[Tensor, " b"] | float,
    condition: Condition,
    scale: float | Float[Tensor, " b"] = 1.0,
    prediction: Prediction = "x0",
    null: Condition = None,
) -> Float[Tensor, "b *sample"]:
    """Denoises with classifier-free guidance: uncond + scale (cond - uncond), so 1 is no guidance.

    Both halves run as one batch. Guidance is linear, hence the same in all predictions.

    Args:
        denoiser: The network.
        x_t: Noisy samples.
        t: Their times.
        condition: Their conditions.
        scale: Guidance scale, one for all or one a sample.
        prediction: What is wanted.
        null: What to be guided away from; the denoiser's own "no condition" if None.

    Raises:
        UsageError: The network knows no "no condition".

    Reference: Ho, Salimans, Classifier-Free Diffusion Guidance, 2022, arXiv 2207.12598 (whose w is this scale - 1).
    """
    if isinstance(scale, int | float) and math.isclose(scale, 1.0):
        return denoiser(x_t, t, condition, prediction)
    null = denoiser.null_condition(condition) if null is None else null
    t = torch.as_tensor(t, dtype=torch.float64, device=x_t.device).expand(len(x_t))
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), joined(condition, null), prediction)
    cond, uncond = both.chunk(2)
    if isinstance(scale, Tensor):
        scale = scale.to(cond).reshape(-1, *(1,) * (cond.ndim - 1))
    return uncond + scale * (cond - uncond)


def _beside(factor: Tensor, samples: Tensor) -> Tensor:
    """Factors to multiply samples by: found in float64, which samples themselves need not be."""
    return factor.to(torch.promote_types(samples.dtype, torch.float32))


def joined(first: Condition, second: Condition) -> Condition:
    """Puts the conditions of two batches together."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return {name: torch.cat([value, second[name]]) for name, value in first.items()}
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.cat([first, second])
    return None


def chosen(condition: Condition, index: Tensor) -> Condition:
    """Returns the conditions of some samples."""
    if isinstance(condition, Mapping):
        return {name: value[index] for name, value in condition.items()}
    return None if condition is None else condition[index]
