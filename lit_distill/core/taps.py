"""Feature taps: what a network computes inside, by the names its own `named_modules()` gives."""

import difflib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle

from lit_distill.core.errors import UsageError


class _SeenAll(Exception):  # noqa: N818 (no error: the rest of a forward is not needed)
    """Ends a forward whose features have all been seen."""


class FeatureTaps:
    """Runs a network and returns its output together with what the named modules returned on the way.

    Hooks live only while the network runs. So nothing is left behind in copies (EMA) or between forwards; and under DDP
    and FSDP2, which run the same modules, names and features are the same. A network that is compiled (`nn.Module.
    compile`) runs as it is, since compiled code knows no hooks that come later.

    A module that runs several times in one forward (a shared ReLU, a shared transformer block) has one output per run:
    `"relu:0"` is the first, `"relu:-1"` the last. The plain name of such a module is refused, since it is ambiguous.

    `"relu@input"` is what the module was given (its first argument): the way to features before an activation. Where
    the module works in place, the tap keeps a copy.

    Args:
        network: The network to watch.
        names: Module names, as `network.named_modules()` gives them, with an optional `:run` and then an optional
            `@input`.

    Raises:
        UsageError: A name is not in the network; the message lists the nearest real names.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self.network = network
        self.names = tuple(dict.fromkeys(names))
        self._runs = {name: _split(name) for name in self.names}
        for name, (path, _, _) in self._runs.items():
            if not path or not _holds(network, path):
                known = [key for key, _ in network.named_modules() if key]
                near = difflib.get_close_matches(path, known, n=4, cutoff=0.3)
                raise UsageError(
                    f"tap '{name}' is not a module of {type(network).__name__}; nearest: {', '.join(near) or 'none'}"
                )

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Runs the network.

        Returns:
            The network's output, and the tapped outputs by name.

        Raises:
            UsageError: A tapped module did not run, ran several times under its plain name, returned no tensor, or one
                that was overwritten later.
        """
        if not self.names:
            return self.network(*args, **kwargs), {}
        seen: dict[tuple[str, bool], list[tuple[Any, int]]] = {
            (path, given): [] for path, _, given in self._runs.values()
        }
        handles = [_watch(self.network.get_submodule(path), given, runs) for (path, given), runs in seen.items()]
        try:
            with self._plainly():
                output = self.network(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return output, {name: self._pick(name, seen) for name in self.names}

    def features(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Runs the network for its features alone: it stops when all have been seen, where they have plain names.

        Under FSDP2, whose modules must run to their ends, it runs on.

        Returns:
            See `__call__`, which says what is refused, too.
        """
        plain = all(run is None for _, run, _ in self._runs.values())
        if not plain or any(isinstance(module, FSDPModule) for module in self.network.modules()):
            return self(*args, **kwargs)[1]
        missing = {(path, given) for path, _, given in self._runs.values()}
        seen: dict[tuple[str, bool], list[tuple[Any, int]]] = {key: [] for key in missing}

        def stop(key: tuple[str, bool]) -> None:
            missing.discard(key)
            if not missing:
                raise _SeenAll

        # A second hook behind that of each tap.
        handles = [_watch(self.network.get_submodule(path), given, runs) for (path, given), runs in seen.items()]
        for key in seen:
            ends = self.network.get_submodule(key[0])
            handles.append(
                ends.register_forward_pre_hook(lambda *_, key=key: stop(key))
                if key[1]
                else ends.register_forward_hook(lambda *_, key=key: stop(key))
            )
        try:
            with self._plainly():
                self.network(*args, **kwargs)
        except _SeenAll:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return {name: self._pick(name, seen) for name in self.names}

    def _plainly(self) -> AbstractContextManager[Any]:
        """Keeps compiled code from running, where it would run the tapped modules."""
        compiled = any(
            self.network.get_submodule(".".join(path.split(".")[:depth]))._compiled_call_impl is not None
            for path, _, _ in self._runs.values()
            for depth in range(path.count(".") + 2)
        )
        return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

    def _pick(self, name: str, seen: Mapping[tuple[str, bool], list[tuple[Any, int]]]) -> Tensor:
        path, run, given = self._runs[name]
        outputs = seen[path, given]
        if not outputs:
            raise UsageError(f"tap '{name}' did not run in this forward; tap a module that the network calls")
        if run is None and len(outputs) > 1:
            raise UsageError(
                f"tap '{name}' ran {len(outputs)} times in one forward; say which run: '{path}:0' ... '{path}:-1'"
            )
        index = run or 0
        if not -len(outputs) <= index < len(outputs):
            raise UsageError(f"tap '{name}': the module ran {len(outputs)} times; use :0 to :{len(outputs) - 1}")
        feature, version = outputs[index]
        if not isinstance(feature, Tensor):
            verb = "was given" if given else "returned"
            raise UsageError(f"tap '{name}' {verb} {type(feature).__name__}, not a tensor; tap a module inside it")
        if _version(feature) != version:
            raise UsageError(
                f"tap '{name}' was overwritten by an operation in place after it, such as ReLU(inplace=True); "
                "tap the module that did it, or build it without inplace"
            )
        return feature


def _holds(network: nn.Module, path: str) -> bool:
    try:
        network.get_submodule(path)
    except AttributeError:
        return False
    return True


def _version(output: Any) -> int:
    # Tensors made in inference mode do not count their changes.
    return output._version if isinstance(output, Tensor) and not output.is_inference() else 0


def _watch(module: nn.Module, given: bool, runs: list[tuple[Any, int]]) -> RemovableHandle:
    if not given:
        return module.register_forward_hook(lambda _module, _args, output: runs.append((output, _version(output))))

    def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
        value = args[0] if args else None
        if isinstance(value, Tensor) and getattr(module, "inplace", False):
            value = value.clone()
        runs.append((value, _version(value)))

    return module.register_forward_pre_hook(keep)


def _split(name: str) -> tuple[str, int | None, bool]:
    location, at, what = name.partition("@")
    if at and what != "input":
        raise UsageError(f"tap '{name}': after the @ stands 'input', or there is no @ (for the module's output)")
    path, colon, run = location.partition(":")
    if not colon:
        return path, None, bool(at)
    try:
        return path, int(run), bool(at)
    except ValueError:
        raise UsageError(f"tap '{name}': after the colon stands the run, a whole number such as :0 or :-1") from None


@torch.no_grad()
def probe(
    network: nn.Module, sample_shape: Sequence[int], names: Sequence[str] = ()
) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Finds output and feature shapes by running the network once on zeros.

    Runs in eval mode on a batch of two, on the network's own device, and leaves mode and buffers as they were.

    Args:
        network: The network.
        sample_shape: Shape of one sample without the batch dimension, such as (3, 32, 32).
        names: Taps, see `FeatureTaps`.

    Returns:
        The output for two samples, and the shape of each tapped feature without the batch dimension.

    Raises:
        UsageError: The network does not accept such a sample.
    """
    parameter = next(network.parameters(), torch.empty(0))
    sample = torch.zeros((2, *sample_shape), device=parameter.device, dtype=parameter.dtype)
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        output, features = FeatureTaps(network, names)(sample)
    except UsageError:
        raise
    except Exception as error:  # a network may raise anything at a sample it was not made for
        reason = str(error).partition("\n")[0] or type(error).__name__  # a bare `assert` has no message
        raise UsageError(
            f"{type(network).__name__} does not accept a sample of shape {tuple(sample_shape)}: {reason}"
        ) from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return output, {name: tuple(feature.shape[1:]) for name, feature in features.items()}
