"""Networks that run compiled."""

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_distill.core.errors import UsageError


class Compile(Callback):
    """Runs networks of a method through `torch.compile`, in place.

    Names of weights stay as they are, so checkpoints of compiled and plain runs are the same; copies, such as averages,
    are plain. What a network computes inside (`FeatureTaps`) is computed by the network as it is.

    Args:
        networks: Their names in the method, such as "teacher", "student.network" or "fake.network".
        backend: Backend of `torch.compile`. "inductor" needs a C++ compiler on the CPU.
        mode: Mode of `torch.compile`, such as "reduce-overhead".

    Raises:
        UsageError: There is no such backend, or no C++ compiler; later, there is no such network.
    """

    def __init__(
        self, networks: Sequence[str] = ("teacher",), backend: str = "inductor", mode: str | None = None
    ) -> None:
        known = torch.compiler.list_backends(exclude_tags=())
        if backend not in known:
            raise UsageError(f"callback Compile: there is no backend '{backend}'; give one of {', '.join(known)}")
        self.networks, self.backend, self.mode = list(networks), backend, mode

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compiles the networks, which the method has built by now. The work is done at their first batches."""
        if self.backend == "inductor" and pl_module.device.type == "cpu":
            _check_compiler()
        for name in self.networks:
            try:
                network = pl_module.get_submodule(name)
            except AttributeError as error:
                roles = ", ".join(role for role, _ in pl_module.named_children())
                raise UsageError(
                    f"callback Compile: {type(pl_module).__name__} has no network '{name}'; it has {roles}"
                ) from error
            if network._compiled_call_impl is None:
                network.compile(backend=self.backend, mode=self.mode)

    on_validation_start = on_test_start = on_predict_start = on_fit_start


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UsageError(
            "callback Compile: there is no C++ compiler on this machine; install g++, or name one in CXX"
        ) from error
