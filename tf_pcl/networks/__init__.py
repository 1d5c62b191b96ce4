"""Target networks by name: the zoo, keras.applications and functions of the user's own.

They take standardised images; `standardise` makes the layer that standardises raw images.
"""

from tf_pcl.networks.applications import load_imagenet
from tf_pcl.networks.densenet import densenet40_12
from tf_pcl.networks.preprocessing import preprocessing, scales_raw_images, standardise
from tf_pcl.networks.registry import NETWORKS, build, find, initialise, target
from tf_pcl.networks.resnets import (
    resnet,
    resnet8,
    resnet14,
    resnet18,
    resnet20,
    resnet32,
    resnet50,
    resnet110,
    wrn20_8,
)
from tf_pcl.networks.resnext import resnext29_2x64d
from tf_pcl.networks.vgg import vgg16
