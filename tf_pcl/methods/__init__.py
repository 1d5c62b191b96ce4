"""The training methods: one file a method, one page of its paper."""
from tf_pcl.methods.baseline import Baseline
from tf_pcl.methods.pcl import PCL

# --method -> class. A method's flags are the keyword arguments of its class.
METHODS = {
    "baseline": Baseline,
    "pcl": PCL,
}
