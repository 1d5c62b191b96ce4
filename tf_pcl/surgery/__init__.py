"""What is done to any Keras model: made functional, copied, cut in two, given weights from a file."""

from tf_pcl.surgery.copies import clone, copy, functional, keep_weights
from tf_pcl.surgery.cuts import costs, cut_points, propose_cut, section_names
from tf_pcl.surgery.features import with_features
from tf_pcl.surgery.slices import split
from tf_pcl.surgery.weights import load_weights
