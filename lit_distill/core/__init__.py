"""What every domain shares: the Distiller, frozen networks, taps, cache, schedules, strategy, callbacks.

Names are loaded when they are used, so that `lit_distill.core.errors` costs no import of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_distill.core.distiller import Distiller
    from lit_distill.core.errors import RunError, UsageError
    from lit_distill.core.networks import pretrained
    from lit_distill.core.reference import Reference
    from lit_distill.core.schedules import Cosine, Linear, Schedule, Steps
    from lit_distill.core.taps import FeatureTaps, probe

__all__ = [
    "Cosine",
    "Distiller",
    "FeatureTaps",
    "Linear",
    "Reference",
    "RunError",
    "Schedule",
    "Steps",
    "UsageError",
    "pretrained",
    "probe",
]

_MODULES = {
    "Cosine": "schedules",
    "Distiller": "distiller",
    "FeatureTaps": "taps",
    "Linear": "schedules",
    "Reference": "reference",
    "RunError": "errors",
    "Schedule": "schedules",
    "Steps": "schedules",
    "UsageError": "errors",
    "pretrained": "networks",
    "probe": "taps",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'lit_distill.core' has no attribute '{name}'")
    return getattr(import_module(f"lit_distill.core.{_MODULES[name]}"), name)
