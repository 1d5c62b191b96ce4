"""Online knowledge distillation in Keras: peers train together, teach each other; one is deployed.

    from tf_pcl import data, methods, networks

Names are imported on first use, so that parts without TensorFlow (flags, help) do not wait for it.
"""

import importlib

from tf_pcl import compat

# Before anything imports TensorFlow, which reads this once.
compat.use_keras_2()

__version__ = "0.2.0.dev0"
__all__ = ["data", "methods", "networks", "surgery", "losses", "optimizer", "schedules"]


def __getattr__(name):
    if name in __all__:
        return importlib.import_module(f"tf_pcl.{name}")
    raise AttributeError(f"module 'tf_pcl' has no attribute {name!r}")
