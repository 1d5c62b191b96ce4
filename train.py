"""Trains a network with a method of online knowledge distillation.

    python train.py --method=pcl --dataset=cifar100

It is `tf-pcl train` of the checkout that it is in, whether or not that is installed.
"""

import sys

from tf_pcl import cli

if __name__ == "__main__":
    cli.run_verb("train", "train.py", sys.argv[1:])
