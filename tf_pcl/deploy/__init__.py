"""Loads, evaluates, uses and converts trained networks.

`runtimes` runs a SavedModel, a TFLite or an ONNX file with its own runtime. `evaluate` measures it
on a data set (`metrics`, `corruptions`, `figures`), and `predict` classifies image files.
"""

from tf_pcl.deploy.runtimes import Runtime, load
