"""lit_distill: model distillation of every kind as Lightning modules.

Importing the package costs nothing: domains (`lit_distill.image`, ...) import their libraries when they are imported.
"""

__version__ = "0.1.0"
