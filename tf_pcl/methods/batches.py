"""The inputs of a step: images, labels and weights in the forms that Keras's users pass.

Every form is converted to one, or refused in one sentence. Shapes are checked while the step is
traced. Values are asserted in the graph, and `in_one_sentence` turns a failed assertion into a
UserError.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Optional

import tensorflow as tf

from tf_pcl.errors import UserError

FORM = "`fit` and `evaluate` take batches of (images, labels) or (images, labels, weights)"
# Begins the texts of this module's assertions in the graph, so that they can be recognised.
MARK = "tf_pcl"


def parts(data: Any) -> tuple[tf.Tensor, tf.Tensor, Optional[tf.Tensor]]:
    """Returns images, labels and weights or None of a batch as Keras hands it to a step.

    Raises:
      UserError: if it is anything but (images, labels) or (images, labels, weights) of tensors.
    """
    if isinstance(data, dict):
        names = ", ".join(map(str, data))
        raise UserError(
            f"{FORM}, not a dict of {names}: map the data set to (batch[image], batch[label])"
        )
    several = data if isinstance(data, (tuple, list)) else (data,)
    if len(several) == 1 or (len(several) > 1 and several[1] is None):
        raise UserError(f"{FORM}, not images without labels: add the labels")
    if len(several) > 3:
        raise UserError(f"{FORM}, not a tuple of {len(several)}")
    images, labels, weights = (*several, None)[:3]
    return (
        dense("images", images),
        dense("labels", labels),
        None if weights is None else dense("weights", weights),
    )


def dense(what: str, value: Any) -> tf.Tensor:
    """Returns `value`, called `what` in errors; UserError if it is not a tensor of numbers."""
    if isinstance(value, (tuple, list, dict)):
        views = "stack views with tf.stack(views, axis=1)"
        kind = type(value).__name__.lstrip("_").replace("DictWrapper", "dict")
        hint = views if what == "images" else "give one tensor"
        raise UserError(f"{FORM}, and the {what} are a {kind} of {len(value)}: {hint}")
    if isinstance(value, (tf.RaggedTensor, tf.SparseTensor)):
        raise UserError(
            f"the {what} are a {type(value).__name__}: give a dense tensor, with images of one size"
        )
    if not (value.dtype.is_floating or value.dtype.is_integer or value.dtype.is_bool):
        raise UserError(f"the {what} are of type {value.dtype.name}: give numbers")
    if value.shape.rank is None:
        raise UserError(
            f"the {what} have no known shape: give them one with tf.ensure_shape in the data set"
        )
    return value


def as_views(images: tf.Tensor, count: int, image_shape: Optional[tuple] = None) -> tf.Tensor:
    """Returns the views [B, count, H, W, C] of a training batch.

    Args:
      images: [B, count, H, W, C], or [B, H, W, C] for a count of 1.
      count: how many views the method trains on.
      image_shape: (H, W, C) that the network takes, None in it for any; None if not known.

    Raises:
      UserError: if the shape is another one.
    """
    views = images[:, None] if images.shape.rank == 4 else images
    if views.shape.rank != 5 or views.shape[1] not in (None, count):
        wanted = f"{count} views of each image, [batch, {count}, height, width, channels]"
        if count == 1:
            wanted = "one view of each image, [batch, height, width, channels]"
        raise UserError(
            f"the images have the shape {_text(images.shape)}, and the method trains on {wanted}"
            + _hint(images, count)
        )
    return _of_size(views, [None, count, *(image_shape or [None] * 3)], image_shape)


def as_images(images: tf.Tensor, image_shape: Optional[tuple] = None) -> tf.Tensor:
    """Returns the images [B, H, W, C] of a test batch, which has one view of each at most.

    Args:
      images: [B, H, W, C] or [B, 1, H, W, C].
      image_shape: as in `as_views`.

    Raises:
      UserError: if the shape is another one.
    """
    if images.shape.rank == 5 and images.shape[1] == 1:
        images = images[:, 0]
    if images.shape.rank != 4:
        raise UserError(
            f"the images have the shape {_text(images.shape)}, and a test takes each image once, "
            "[batch, height, width, channels]" + _hint(images, 1)
        )
    return _of_size(images, [None, *(image_shape or [None] * 3)], image_shape)


def as_whole(images: tf.Tensor) -> tf.Tensor:
    """Returns images whose values a network of raw images, uint8, can take as they are.

    Raises:
      UserError: if a value known now is a fraction or not in 0–255.
    """
    low, high = tf.reduce_min(images), tf.reduce_max(images)
    whole = tf.reduce_all(images == tf.round(images))
    right = tf.logical_and(tf.logical_and(low >= 0, high <= 255), whole)
    text = "and the teacher takes raw ones, whole numbers from 0 to 255: give it and the student"
    check = demand(right, "the images go from", low, "to", high, text, "the same images")
    return after([check], images)


def _hint(images, count):
    if images.shape.rank == 3:
        return ": batch the data set"
    if images.shape.rank == 4 and count > 1:
        return (
            ": make them with data.train_batches(views=model.num_views), or build the method with "
            "`views=shared` where it has that parameter"
        )
    return ""


def _of_size(images, shape, image_shape):
    """Returns `images` with their known shape; UserError if it is not compatible with `shape`."""
    if not images.shape.is_compatible_with(shape):
        raise UserError(
            f"the images have the shape {_text(images.shape[-3:])}, and the network takes "
            f"{_text(tf.TensorShape(image_shape))}: resize them"
        )
    known = images.shape.merge_with(shape)
    # If the shape is known already, no assertion is added to the graph.
    return images if known.as_list() == images.shape.as_list() else tf.ensure_shape(images, shape)


def _text(shape):
    """Returns a shape as a text, such as [?, 8, 8, 1]."""
    return f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


def as_labels(labels: tf.Tensor, classes: int) -> tf.Tensor:
    """Returns class numbers int32 or int64 [B], or probabilities float32 [B, classes].

    Args:
      labels: class numbers [B] or [B, 1] of any type, as long as they are whole; or one-hot or soft
        labels [B, classes], which are at least 0 and sum to 1.
      classes: C, at least 2.

    Raises:
      UserError: if the shape is another one, or a value known now is out of range.
    """
    if classes < 2:
        raise UserError(
            "the network has one output, and each class needs one: give it at least two"
        )
    shape = labels.shape
    if shape.rank == 1:
        return _numbers(labels, classes)
    if shape.rank == 2 and shape[1] == 1:
        return _numbers(labels[:, 0], classes)
    if shape.rank == 2 and shape[1] == classes:
        return _probabilities(labels, classes)
    if shape.rank == 2 and shape[1] is None:
        return tf.cond(
            tf.shape(labels)[1] == 1,
            lambda: tf.one_hot(_numbers(labels[:, 0], classes), classes),
            lambda: _probabilities(tf.ensure_shape(labels, [None, classes]), classes),
        )
    raise UserError(
        f"the labels have the shape {_text(shape)}, and class numbers [batch] or [batch, 1] or "
        f"probabilities [batch, {classes}] are allowed"
    )


def _numbers(labels, classes):
    """Returns class numbers [B] as int32 or int64."""
    checks = []
    if labels.dtype.is_floating:
        whole = tf.reduce_all(labels == tf.round(labels))
        checks = [demand(whole, "the labels are fractions: give whole class numbers")]
    if labels.dtype not in (tf.int32, tf.int64):
        wide = labels.dtype in (tf.uint32, tf.uint64) or labels.dtype.is_floating
        labels = tf.cast(labels, tf.int64 if wide else tf.int32)
    low, high = tf.reduce_min(labels), tf.reduce_max(labels)
    in_range = tf.logical_and(low >= 0, high < classes)
    allowed = f"and class numbers from 0 to {classes - 1} are allowed"
    checks.append(demand(in_range, "the labels go from", low, "to", high, allowed))
    return after(checks, labels)


def _probabilities(labels, classes):
    """Returns one-hot or soft labels [B, classes] as float32."""
    # Probabilities in half precision have only three digits.
    tolerance = 2e-2 if labels.dtype in (tf.float16, tf.bfloat16) else 1e-3
    p = tf.cast(labels, tf.float32)
    sums = tf.reduce_sum(p, axis=-1)
    right = tf.logical_and(tf.reduce_all(p >= 0), tf.reduce_all(tf.abs(sums - 1) <= tolerance))
    text = (
        f"the labels have {classes} columns, one for each class, but are not probabilities: give "
        "rows of numbers of at least 0 that sum to 1, or class numbers"
    )
    return after([demand(right, text)], p)


def as_weights(
    weights: Optional[tf.Tensor], labels: tf.Tensor, class_weights: tuple[float, ...] = ()
) -> Optional[tf.Tensor]:
    """Returns the weights float32 [B] of a batch's images, or None if all weigh 1.

    Args:
      weights: [B] or [B, 1] of any type, at least 0, or None.
      labels: as `as_labels` gives them.
      class_weights: a weight for each class, with which those of its images are multiplied; a soft
        label's is Σ_c p_c w_c.

    Raises:
      UserError: if the shape is another one, or a value known now is negative or not finite.
    """
    own = None if weights is None else _weights_of_images(weights)
    if not class_weights:
        return own
    w = tf.constant(class_weights, tf.float32)
    of_class = tf.linalg.matvec(labels, w) if labels.shape.rank == 2 else tf.gather(w, labels)
    return of_class if own is None else own * of_class


def _weights_of_images(weights):
    if weights.shape.rank not in (1, 2) or weights.shape[1:].as_list() not in ([], [1], [None]):
        raise UserError(
            f"`sample_weight` has the shape {_text(weights.shape)}: give each image one, [batch]"
        )
    w = tf.cast(weights, tf.float32)
    w = w if w.shape.rank == 1 else tf.squeeze(w, axis=1)
    right = tf.reduce_all(tf.logical_and(w >= 0, tf.math.is_finite(w)))
    return after([demand(right, "`sample_weight` must be finite and at least 0")], w)


def as_class_weights(class_weight: dict, classes: int) -> tuple[float, ...]:
    """Returns the weights of the classes 0 … classes − 1, from a dict as Keras's fit takes it.

    Raises:
      UserError: if a class has none, there is another key, or a weight is negative or not finite.
    """
    try:
        given = {int(c): float(w) for c, w in dict(class_weight).items()}
        right = set(given) == set(range(classes))
        right = right and all(0 <= w < float("inf") for w in given.values())
    except (TypeError, ValueError):
        right = False
    if not right:
        raise UserError(
            "give a dict with a finite weight of at least 0 for each class number from 0 to "
            f"{classes - 1}",
            parameter="class_weight",
            value=str(class_weight)[:60],
        )
    return tuple(given[c] for c in range(classes))


def demand(condition: tf.Tensor, *words: Any) -> Optional[tf.Operation]:
    """Returns an operation that fails with the sentence of `words` if `condition` is false.

    Args:
      condition: a scalar bool. In eager mode it is checked at once; None is returned.
      words: texts without square brackets, and scalars.
    """
    if tf.executing_eagerly():
        if not condition:
            raise UserError(" ".join(w if isinstance(w, str) else str(w.numpy()) for w in words))
        return None
    return tf.debugging.Assert(condition, [MARK, *words])


def after(checks: list, value: tf.Tensor) -> tf.Tensor:
    """Returns `value`, after the operations that `demand` returned."""
    if tf.executing_eagerly():
        return value
    with tf.control_dependencies(checks):
        return tf.identity(value)


def form(data: Any) -> str:
    """Returns a text that differs for data that need another trace; "?" for generators."""
    if isinstance(data, tf.data.Dataset):
        return str(data.element_spec)
    if data is None or hasattr(data, "shape"):
        return str(data is not None and data.shape[1:])
    return "?"


def asserted(classes: int, *batch: Any) -> tuple:
    """Returns a batch of a data set, with its labels checked."""
    images, labels, weights = parts(batch)
    with tf.control_dependencies([as_labels(labels, classes)]):
        return (images, tf.identity(labels), *([] if weights is None else [weights]))


@contextlib.contextmanager
def in_one_sentence() -> Iterator[None]:
    """Turns the errors that a wrong batch causes, wherever they are raised, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = _from_trace(error) or _from_graph(error) or _from_keras(error)
        if sentence is None:
            raise
        raise UserError(sentence) from None


def _from_trace(error):
    """Returns the text of a UserError that AutoGraph has wrapped in another exception."""
    cause: Optional[BaseException] = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__ or cause.__context__
    return cause and str(cause)


def _from_graph(error):
    """Returns the text of a failed assertion of this module, or of `_of_size`, in a graph."""
    if not isinstance(error, tf.errors.InvalidArgumentError):
        return None
    text = error.message
    if said := re.search(rf"assertion failed: \[{MARK}\]((?: \[[^\]]*\])*)", text):
        return " ".join(re.findall(r"\[([^\]]*)\]", said[1]))
    shapes = re.search(r"Shape of tensor \S+ (\[.*?\]) is not compatible with .*? (\[.*?\])", text)
    return (
        shapes
        and f"images or labels of a batch have the shape {shapes[1]}, and {shapes[2]} is needed"
    )


def _from_keras(error):
    """Returns, on one line, the text of Keras's errors for arrays that it cannot take."""
    text = " ".join(str(error).split())
    known = (
        "Data cardinality is ambiguous",
        "Failed to find data adapter",
        "Failed to convert a NumPy array",
    )
    return text[:300] if isinstance(error, ValueError) and text.startswith(known) else None
