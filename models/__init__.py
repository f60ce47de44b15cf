"""The networks that ptsim brings: the paper's CIFAR ResNets and VGGs, and torchvision's classifiers by name."""

from ptsim.models import resnet_cifar, torchvision_family, vgg_cifar

__all__ = ["resnet_cifar", "torchvision_family", "vgg_cifar"]
