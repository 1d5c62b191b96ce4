"""Operations on any Keras model: making it functional, copying it, cutting it, loading weights."""

from tf_pcl.surgery.convert import built_by, check_keras, functional
from tf_pcl.surgery.cuts import costs, cut_points, propose_cut, section_names
from tf_pcl.surgery.features import with_features, with_logits
from tf_pcl.surgery.files import read_network
from tf_pcl.surgery.fold import fold_batch_norm
from tf_pcl.surgery.recompute import recomputed, recomputing
from tf_pcl.surgery.replicas import replica_bound, synchronize
from tf_pcl.surgery.slices import deployable, prepared, slice_at, split
from tf_pcl.surgery.target import Target
from tf_pcl.surgery.trial import trials
from tf_pcl.surgery.weights import load_weights
