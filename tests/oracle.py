"""The equations in NumPy float64, written from the papers and not from the package."""

import numpy as np


def softmax(z, T=1.0):
    z = np.asarray(z, np.float64) / T
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ce(y, z, weights=1.0):
    """The mean over the batch of w·CE; y are class numbers [B] or probabilities [B, C], weights [B] or 1."""
    y = np.asarray(y)
    q = np.eye(np.shape(z)[-1])[y] if y.ndim == 1 else y
    return -np.mean(weights * np.sum(q * np.log(softmax(z)), axis=-1))


def kl(q, p, weights=1.0):
    """The mean over the batch of w·Σ_c q_c (log q_c − log p_c)."""
    return np.mean(weights * np.sum(q * (np.log(q) - np.log(p)), axis=-1))


def error(y, z):
    """Percent of the images whose largest logit is not that of their class, or of their most probable one."""
    y = np.asarray(y)
    return 100 * np.mean(np.argmax(z, -1) != (y if y.ndim == 1 else np.argmax(y, -1)))


def omega(e, alpha, weight=1.0):
    return weight * np.exp(-5 * (1 - e / alpha) ** 2) if e < alpha else weight


def phi(g, beta):
    return min(1 - 1 / g, beta)


def pcl(y, z, z_e, z_t, T, w, weights=1.0):
    """(L_c, ω L_pe, ω L_pm)."""
    m = len(z)
    l_c = sum(ce(y, zj, weights) for zj in z) + ce(y, z_e, weights)
    l_pe = T**2 * sum(kl(softmax(z_e, T), softmax(zj, T), weights) for zj in z)
    l_pm = T**2 * sum(
        sum(kl(softmax(z_t[i], T), softmax(z[j], T), weights) for i in range(m) if i != j) / (m - 1)
        for j in range(m)
    )
    return l_c, w * l_pe, w * l_pm


def sgd(w, gradients, rates, momentum=0.9, decay=5e-4, nesterov=True):
    """The weights after each step of the frameworks' SGD with coupled decay."""
    v, path = np.zeros_like(w), []
    for g, lr in zip(gradients, rates):
        d = g + decay * w
        v = momentum * v + d
        w = w - lr * (d + momentum * v if nesterov else v)
        path.append(w)
    return path


def convolve(x, kernel, stride=1):
    """Convolution of [B, H, W, c] with [k, k, c, n], k odd, padded alike on all sides."""
    k, sides = kernel.shape[0], x.shape[1:3]
    x = np.pad(x, [(0, 0), *[(k // 2, k // 2)] * 2, (0, 0)])
    out = np.zeros((len(x), *(-(-n // stride) for n in sides), kernel.shape[-1]))
    for i in range(out.shape[1]):
        for j in range(out.shape[2]):
            patch = x[:, i * stride : i * stride + k, j * stride : j * stride + k]
            out[:, i, j] = np.einsum("bhwc,hwcn->bn", patch, kernel)
    return out


def batch_norm(x, gamma, beta, mean, variance):
    """BatchNorm of [..., c] with the statistics that are given."""
    return gamma * (x - mean) / np.sqrt(np.asarray(variance, np.float64) + 1e-5) + beta


def max_pool(x):
    """3×3 max pooling with stride 2 of [B, H, W, c], padded with −∞ by one pixel on all sides."""
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    rows, columns = (range(0, n - 2, 2) for n in x.shape[1:3])
    windows = [[x[:, i : i + 3, j : j + 3].max((1, 2)) for j in columns] for i in rows]
    return np.array(windows).transpose(2, 0, 1, 3)
