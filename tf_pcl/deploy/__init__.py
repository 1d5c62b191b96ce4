"""What is done with a trained network: it is loaded, judged, used and converted.

`runtimes` runs a SavedModel, a TFLite or an ONNX file with its own runtime. `evaluate` judges it by
a data set (`metrics`, `corruptions`, `figures`), and `predict` says what it sees in image files.
"""

from tf_pcl.deploy.runtimes import Runtime, load
