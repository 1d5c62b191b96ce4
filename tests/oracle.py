"""The equations in NumPy float64, written from the papers and not from the package."""

import numpy as np


def softmax(z, T=1.0):
    z = np.asarray(z, np.float64) / T
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def ce(y, z, weights=1.0):
    """The mean over the batch of w·CE.

    y are class numbers [B] or probabilities [B, C]; weights are [B] or 1.
    """
    y = np.asarray(y)
    q = np.eye(np.shape(z)[-1])[y] if y.ndim == 1 else y
    return -np.mean(weights * np.sum(q * np.log(softmax(z)), axis=-1))


def kl(q, p, weights=1.0):
    """The mean over the batch of w·Σ_c q_c (log q_c − log p_c)."""
    return np.mean(weights * np.sum(q * (np.log(q) - np.log(p)), axis=-1))


def error(y, z):
    """Percent of the images whose largest logit is another than that of their (likeliest) class."""
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


# The equations of a method of the tables, a function of the logits {exit: z}, ω and its share. It
# returns the weight of every exit's cross-entropy, and lessons (term, weight, teacher's logits,
# pupil), each of which adds weight · T² · KL(p^T(teacher) ‖ p^T(pupil)) to the loss.


def dml(z, w, share):
    lessons = [("mutual", 1 / (len(z) - 1), z[i], j) for j in z for i in z if i != j]
    return dict.fromkeys(z, 1.0), lessons


def cl(z, w, share):
    lessons = [("consensus", share, np.mean([z[j] for j in z if j != h], axis=0), h) for h in z]
    return dict.fromkeys(z, 1 - share), lessons


def one(z, w, share):
    return dict.fromkeys(z, 1.0), [("ensemble", w, z["ensemble"], j) for j in z if j != "ensemble"]


def ffl(z, w, share):
    peers = [j for j in z if j != "ensemble"]
    average = np.mean([z[j] for j in peers], axis=0)
    return dict.fromkeys(z, 1.0), [("fused", w, z["ensemble"], j) for j in peers] + [
        ("average", w, average, "ensemble")
    ]


def byot(z, w, share):
    shallow = [i for i in z if i != "deepest"]
    return {**dict.fromkeys(shallow, 1 - share), "deepest": 1.0}, [
        ("deepest", share, z["deepest"], i) for i in shallow
    ]


def okddip_targets(z, f, w_q, w_k):
    """t_i of each peer: Σ_j a_ij z_j, a_ij = softmax_j((W_q f_i) · (W_k f_j)), image by image."""
    peers = [j for j in z if j != "leader"]
    targets = {i: np.empty_like(z[i]) for i in peers}
    for b in range(len(f[peers[0]])):
        for i in peers:
            a = softmax([np.dot(f[i][b] @ w_q, f[j][b] @ w_k) for j in peers])
            targets[i][b] = sum(a_j * z[j][b] for a_j, j in zip(a, peers))
    return targets


def okddip(z, w, f, w_q, w_k):
    targets = okddip_targets(z, f, w_q, w_k)
    average = np.mean([z[j] for j in targets], axis=0)
    return dict.fromkeys(z, 1.0), [("personal", w, targets[i], i) for i in targets] + [
        ("group", w, average, "leader")
    ]


def losses_of(y, z, weights, lessons, T):
    """{term: value} of the weights and lessons that a method's equations give, for labels y."""
    terms = {"ce": sum(weight * ce(y, z[name]) for name, weight in weights.items())}
    for term, weight, teacher, pupil in lessons:
        lesson = weight * T**2 * kl(softmax(teacher, T), softmax(z[pupil], T))
        terms[term] = terms.get(term, 0.0) + lesson
    return terms


def gradients_of(y, z, weights, lessons, T):
    """{exit: gradient to its logits}, where all that teaches is constant.

    T² KL(q ‖ p^T(z)) has the gradient T (p − q) / B.
    """
    to = {}
    for name, logits in z.items():
        b, classes = logits.shape
        to[name] = weights[name] * (softmax(logits) - np.eye(classes)[y]) / b
    for _, weight, teacher, pupil in lessons:
        to[pupil] += weight * T * (softmax(z[pupil], T) - softmax(teacher, T)) / len(teacher)
    return to


def distances(f):
    d = np.array([[np.sqrt(np.sum((u - v) ** 2)) for v in f] for u in f])
    return d / d[d > 0].mean()


def angles(f):
    a = np.zeros([len(f)] * 3)
    for i, u in enumerate(f):
        for j, v in enumerate(f):
            for k, w in enumerate(f):
                e, g = u - v, w - v
                if np.any(e) and np.any(g):
                    a[j, i, k] = e @ g / np.linalg.norm(e) / np.linalg.norm(g)
    return a


def huber(x, y):
    r = np.abs(x - y)
    return np.mean(np.where(r <= 1, r**2 / 2, r - 0.5))


def ctsl_mkt(y, z, f, z_alone, alpha, beta, gamma, beta_1, beta_2, t, own=None):
    """Returns the loss terms. `own` are the logits and features that vary, where not all do."""
    own_z, own_f = own or (z, f)
    m, terms = len(z), dict.fromkeys(("ce", "mutual", "self", "distance", "angle"), 0.0)
    for k in range(m):
        terms["ce"] += alpha * ce(y, own_z[k])
        terms["self"] += gamma * t**2 * kl(softmax(z_alone[k], t), softmax(own_z[k], t))
        for j in set(range(m)) - {k}:
            terms["mutual"] += beta * beta_2 / (m - 1) * kl(softmax(z[j]), softmax(own_z[k]))
            terms["distance"] += beta / (m - 1) * huber(distances(f[j]), distances(own_f[k]))
            terms["angle"] += beta * beta_1 / (m - 1) * huber(angles(f[j]), angles(own_f[k]))
    return terms


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


def norm_relu(x, weights, training):
    """BatchNorm of [..., c], with the batch's statistics in training, and ReLU.

    weights are gamma, beta, mean and variance, as Keras lists a layer's.
    """
    gamma, beta, mean, variance = weights
    axes = tuple(range(x.ndim - 1))
    mean, variance = (x.mean(axes), x.var(axes)) if training else (mean, variance)
    return np.maximum(batch_norm(x, gamma, beta, mean, variance), 0)


def max_pool(x):
    """3×3 max pooling with stride 2 of [B, H, W, c], padded with −∞ by one pixel on all sides."""
    x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)], constant_values=-np.inf)
    rows, columns = (range(0, n - 2, 2) for n in x.shape[1:3])
    windows = [[x[:, i : i + 3, j : j + 3].max((1, 2)) for j in columns] for i in rows]
    return np.array(windows).transpose(2, 0, 1, 3)
