"""Measures of predictions: error, calibration and confusions.

All functions take logits float [N, K] and labels int [N] in [0, K), N at least 1, and compute in
float64. Probabilities are the softmax of the logits.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import confusion_matrix

# The number of bins of most publications.
BINS = 15


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Returns the logarithms of the probabilities, float64 [N, K]."""
    return log_softmax(logits.astype(np.float64), axis=1)


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Returns the k likeliest classes, int [N, k], the likeliest first; ties keep their order."""
    return np.argsort(-logits, axis=1, kind="stable")[:, :k]


def error(logits: np.ndarray, labels: np.ndarray, k: int = 1) -> float:
    """Returns the share of images, in percent, whose class is not among the k likeliest."""
    return 100 * (1 - float((top_k(logits, k) == labels[:, None]).any(1).mean()))


def nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean negative log-likelihood of the labels, in nats."""
    return -float(log_probabilities(logits)[np.arange(len(labels)), labels].mean())


class Reliability(NamedTuple):
    """How often predictions of about the same confidence are right.

    Attributes:
      images: the number of images, int [bins]. Bin b has confidences in (b / bins, (b + 1) / bins].
      confidence: their mean confidence, float64 [bins]; 0 for an empty bin.
      accuracy: the share of them that is right, float64 [bins]; 0 for an empty bin.
    """

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    def error(self) -> float:
        """Returns the expected calibration error, in [0, 1] (Guo et al., arXiv 1706.04599)."""
        gaps = np.abs(self.confidence - self.accuracy)
        return float(np.average(gaps, weights=self.images))


def reliability(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Sorts predictions by their confidence, the largest probability, into bins of equal width."""
    confidence = np.exp(log_probabilities(logits).max(1))
    right = top_k(logits, 1)[:, 0] == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    mean = lambda of: np.bincount(place, weights=of, minlength=bins) / np.maximum(count, 1)
    return Reliability(count, mean(confidence), mean(right))


def confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns how many images of class i are predicted as class j, int [K, K]."""
    predicted = top_k(logits, 1)[:, 0]
    return confusion_matrix(labels, predicted, labels=np.arange(logits.shape[1]))
