"""The training step of PCL in PyTorch: what tf_pcl is measured against, without TensorFlow.

It computes what tf_pcl's PCL does by default, on the CIFAR ResNets of basic blocks, and begins with
tf_pcl's weights (`load`). It is tuned as its framework advises: ReLU and additions in place, SGD
and the moving average as one operation for all weights, no count of batches in BatchNorm.
"""

import contextlib
import copy
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn


def conv_norm(channels: int, filters: int, size: int, stride: int = 1) -> nn.Sequential:
    """Builds a convolution without bias and BatchNorm; the latter's defaults are tf_pcl's."""
    norm = nn.BatchNorm2d(filters)
    norm.num_batches_tracked = None
    return nn.Sequential(nn.Conv2d(channels, filters, size, stride, size // 2, bias=False), norm)


class Block(nn.Module):
    """Two 3×3 convolutions with a shortcut, which is a 1×1 convolution where shapes differ."""

    def __init__(self, channels: int, filters: int, stride: int):
        super().__init__()
        self.first = conv_norm(channels, filters, 3, stride)
        same = stride == 1 and channels == filters
        # In the order in which Keras lists these layers, for `load`.
        self.shortcut = nn.Identity() if same else conv_norm(channels, filters, 1, stride)
        self.second = conv_norm(filters, filters, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.second(F.relu(self.first(x), inplace=True))
        return F.relu(y.add_(self.shortcut(x)), inplace=True)


def section(number: int, blocks: int) -> list[nn.Module]:
    """Builds a section: the first has 16 channels at full size, each next one twice at half."""
    filters = 16 * 2**number
    rest = [Block(filters, filters, 1) for _ in range(blocks - 1)]
    return [Block(filters // 2, filters, 2) if number else Block(16, 16, 1), *rest]


class Peers(nn.Module):
    """Peers on a shared trunk, which is all before the last section, and their ensemble.

    Args:
      blocks: in each of the three sections; 5 make a ResNet-32.
      peers: m.
      classes: C.
      apart: whether the views pass the trunk one after another, and not in one batch.
    """

    def __init__(self, blocks: int, peers: int, classes: int, apart: bool):
        super().__init__()
        self.apart = apart
        stem = [conv_norm(3, 16, 3), nn.ReLU(inplace=True)]
        self.trunk = nn.Sequential(*stem, *section(0, blocks), *section(1, blocks))
        self.branches = nn.ModuleList(nn.Sequential(*section(2, blocks)) for _ in range(peers))
        self.classifiers = nn.ModuleList(nn.Linear(64, classes) for _ in range(peers))
        self.ensemble = nn.Linear(64 * peers, classes)

    def forward(self, images: torch.Tensor, narrow: bool) -> list[torch.Tensor]:
        """Returns the logits float32 [B, C] of the peers and, last, of the ensemble.

        Args:
          images: uint8 [m·B, 3, H, W], one view after another.
          narrow: whether convolutions are computed in bfloat16. As in tf_pcl, classifiers are not.
        """
        m = len(self.branches)
        with torch.autocast("cpu", torch.bfloat16) if narrow else contextlib.nullcontext():
            x = (images.float() - 128) / 64
            low = (
                [self.trunk(view) for view in x.chunk(m)] if self.apart else self.trunk(x).chunk(m)
            )
            maps = [branch(view) for branch, view in zip(self.branches, low)]
            features = [y.mean((2, 3)).float() for y in maps]
        logits = [classify(f) for classify, f in zip(self.classifiers, features)]
        return [*logits, self.ensemble(torch.cat(features, 1))]


def losses(
    labels: torch.Tensor,
    student: Sequence[torch.Tensor],
    teacher: Sequence[torch.Tensor],
    weight: torch.Tensor,
    temperature: float = 3.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (L_c, ω L_pe, ω L_pm) of logits as `Peers` gives them; ω is `weight`."""
    (*z, z_e), z_t, m = student, teacher, len(student) - 1
    log_p = [F.log_softmax(one / temperature, 1) for one in z]
    log_q_e, *log_q = (F.log_softmax(one.detach() / temperature, 1) for one in (z_e, *z_t[:m]))

    def distilled(pairs: Iterable[tuple]) -> torch.Tensor:
        lessons = (F.kl_div(p, q, reduction="batchmean", log_target=True) for q, p in pairs)
        return weight * temperature**2 * sum(lessons)

    others = ((log_q[i], log_p[j]) for j in range(m) for i in range(m) if i != j)
    return (
        sum(F.cross_entropy(one, labels) for one in student),
        distilled((log_q_e, p) for p in log_p),
        distilled(others) / (m - 1),
    )


class Step:
    """Takes training steps on one batch.

    Args:
      model: the peers; they are copied.
      views: uint8 [m·B, 3, H, W], one view after another.
      labels: int64 [B].
      narrow: bfloat16 autocast in place of float32.
      channels_last: the layout of weights and images.
      compiled: whether torch.compile compiles forward pass, losses and backward pass.
    """

    def __init__(
        self,
        model: Peers,
        views: torch.Tensor,
        labels: torch.Tensor,
        *,
        narrow: bool,
        channels_last: bool,
        compiled: bool,
    ):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.student = copy.deepcopy(model).to(memory_format=layout)
        self.mean = copy.deepcopy(self.student).requires_grad_(False)
        self.views, self.labels = views.contiguous(memory_format=layout), labels
        self.narrow = narrow
        self.optimizer = torch.optim.SGD(
            self.student.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True, fused=True
        )
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, weight: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            teacher = self.mean(self.views, self.narrow)
        return sum(losses(self.labels, self.student(self.views, self.narrow), teacher, weight))

    def __call__(self, weight: float, decay: float) -> torch.Tensor:
        """Takes a step and returns its loss; `weight` is ω and `decay` φ of this step."""
        # As a tensor, since torch.compile would compile again for another number.
        loss = self.loss(torch.tensor(weight, dtype=torch.float32))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        average = get_ema_multi_avg_fn(decay)
        average(list(self.mean.parameters()), list(self.student.parameters()), None)
        return loss.detach()


def load(model: Peers, arrays: dict[str, list]) -> None:
    """Gives the peers the weights of tf_pcl's.

    Args:
      model: what gets them.
      arrays: {"Conv2D", "BatchNormalization" or "Dense": [the weights of each such layer, as Keras
        lists them]}, the trunk's first and the ensemble's last.
    """
    kinds = {"Conv2D": nn.Conv2d, "BatchNormalization": nn.BatchNorm2d, "Dense": nn.Linear}
    order = {"Conv2D": (3, 2, 0, 1), "Dense": (1, 0)}
    for name, kind in kinds.items():
        modules = [one for one in model.modules() if isinstance(one, kind)]
        for module, (first, *rest) in zip(modules, arrays[name]):
            first = first.transpose(order[name]) if name in order else first
            tensors = [*module.parameters(), *module.buffers()]
            for tensor, array in zip(tensors, [first, *rest]):
                tensor.data.copy_(torch.tensor(array))
