"""The training methods: one file a method, one page of its paper."""

from tf_pcl.methods.ban import BAN
from tf_pcl.methods.baseline import Baseline
from tf_pcl.methods.byot import BYOT
from tf_pcl.methods.cl import CL
from tf_pcl.methods.ctsl_mkt import CTSLMKT
from tf_pcl.methods.distiller import Distiller
from tf_pcl.methods.dml import DML
from tf_pcl.methods.ffl import FFL
from tf_pcl.methods.kd import KD
from tf_pcl.methods.okddip import OKDDip
from tf_pcl.methods.one import ONE
from tf_pcl.methods.pcl import PCL

# {name: class}. The options of a method are the keyword arguments of its class and its stages.
METHODS: dict[str, type[Distiller]] = {
    "ban": BAN,
    "baseline": Baseline,
    "byot": BYOT,
    "cl": CL,
    "ctsl_mkt": CTSLMKT,
    "dml": DML,
    "ffl": FFL,
    "kd": KD,
    "okddip": OKDDip,
    "one": ONE,
    "pcl": PCL,
}

# What every other method is compared with: a network that is trained alone.
BASELINE = "baseline"
