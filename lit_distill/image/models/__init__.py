"""Networks of the distillation literature for small images.

Each names its `stages`, the modules whose outputs are the features of its stages, shallow to deep, and `penultimate`,
the module whose output is the feature vector (b, d) that the last linear layer reads. Parameter counts are those of the
field's common code (Tian, Krishnan, Isola, 2019, arXiv:1910.10699) for 100 classes.
"""

from lit_distill.image.models.columns import Columns
from lit_distill.image.models.mobilenet import MobileNetV2CIFAR
from lit_distill.image.models.resnet import ResNetCIFAR
from lit_distill.image.models.shufflenet import ShuffleNetV1CIFAR, ShuffleNetV2CIFAR
from lit_distill.image.models.small import MLP, ConvNet, LeNet
from lit_distill.image.models.timm_classifier import TimmClassifier
from lit_distill.image.models.vgg import VGG
from lit_distill.image.models.wide_resnet import WideResNet

__all__ = [
    "MLP",
    "VGG",
    "Columns",
    "ConvNet",
    "LeNet",
    "MobileNetV2CIFAR",
    "ResNetCIFAR",
    "ShuffleNetV1CIFAR",
    "ShuffleNetV2CIFAR",
    "TimmClassifier",
    "WideResNet",
]
