"""Draws docs/figures/pcl.svg, Peer Collaborative Learning in one picture.

    python docs/figures/pcl.py [PATH.svg or PATH.png]

It needs matplotlib (the extra `docs`); the pictures of a digit come with scikit-learn.
"""

import pathlib
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyBboxPatch
from sklearn.datasets import load_digits

INK, PALE, FRAME = "#33414e", "#eef2f6", "#8795a3"
LABELS, ENSEMBLE, MEAN, DEPLOYED = "#3d8b4f", "#d9762b", "#3c6fb0", "#b3315f"
ROWS = {1: 5.45, 2: 4.45, 3: 3.45}  # of the peers
MEAN_ROWS = {1: 1.95, 2: 1.1, 3: 0.25}
JOINT_ROW, LABEL_ROW = 6.6, 7.5
IMAGE, VIEW, TRUNK, BRANCH, BUS, JOINT, LOGITS = 0.4, 1.75, 3.35, 5.2, 6.4, 7.35, 8.7
CE, FROM_ENSEMBLE, FROM_MEAN = 10.0, 11.55, 13.1
SHIFTS = {1: (1, 0), 2: (0, -1), 3: (-1, 1)}


def main(path):
    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans", "svg.hashsalt": "pcl"}
    )
    figure, axes = plt.subplots(figsize=(14.2, 8.4))
    axes.set(xlim=(-0.35, 14.0), ylim=(-1.0, 8.2), aspect="equal")
    axes.axis("off")
    digit = load_digits().images[8]

    panel(axes, 2.5, 9.2, 2.95, 6.02, PALE)
    panel(axes, 2.5, 9.2, -0.3, 2.5, "#e6edf7")
    axes.text(2.62, 6.2, "the peers, trained by gradient", color=INK, size=11)
    axes.text(5.4, 2.62, "the mean teacher, averages of the peers", color=MEAN, size=11)

    picture(axes, digit, IMAGE, ROWS[2], 0.62)
    axes.text(IMAGE, ROWS[2] - 0.72, "image $x$", color=INK, ha="center", va="top", size=11)
    for j, y in ROWS.items():
        view = np.roll(digit, SHIFTS[j], (0, 1))
        picture(axes, view, VIEW, y, 0.42)
        picture(axes, view, VIEW, MEAN_ROWS[j], 0.3)
        arrow(axes, (IMAGE + 0.66, ROWS[2]), (VIEW - 0.46, y), FRAME)
    axes.text(VIEW, ROWS[1] + 0.5, "one view for\neach peer", color=INK, ha="center", size=11)
    axes.text(
        VIEW - 0.18,
        MEAN_ROWS[3] - 0.36,
        "the same views",
        color=INK,
        ha="center",
        va="top",
        size=11,
    )

    network(axes, ROWS, 0.56, "{}", "-", "white")
    network(axes, MEAN_ROWS, 0.5, "{}^t", "--", "white")
    for x in (TRUNK, BRANCH):
        arrow(axes, (x, ROWS[3] - 0.42), (x, MEAN_ROWS[1] + 0.34), MEAN, width=1.6, style="--")

    # The ensemble teacher, on the features of all peers.
    axes.plot([BUS, BUS], [ROWS[3], JOINT_ROW], color=FRAME, lw=1.4, zorder=2)
    for j, y in ROWS.items():
        axes.plot([BUS], [y], "o", color=FRAME, ms=5, zorder=3)
        axes.text(BUS + 0.08, y + 0.13, f"$f_{j}$", color=INK, size=12)
    arrow(axes, (BUS, JOINT_ROW), (JOINT - 0.68, JOINT_ROW), FRAME)
    box(axes, JOINT, JOINT_ROW, 1.36, 0.66, "ensemble\nclassifier", "#fdeee0", ENSEMBLE, size=10)
    arrow(axes, (JOINT + 0.68, JOINT_ROW), (LOGITS - 0.25, JOINT_ROW), FRAME)
    circle(axes, LOGITS, JOINT_ROW, "$z_e$", ENSEMBLE)

    # The losses: what stands on a peer's line is added for this peer.
    for y in ROWS.values():
        axes.plot([LOGITS + 0.25, FROM_MEAN], [y, y], color=FRAME, lw=1.4, zorder=2)
    axes.plot([CE, CE], [LABEL_ROW, ROWS[3]], color=LABELS, lw=2, zorder=2)
    axes.text(CE, LABEL_ROW + 0.08, "label $y$", color=LABELS, ha="center", va="bottom", size=12)
    axes.plot(
        [LOGITS, FROM_ENSEMBLE, FROM_ENSEMBLE],
        [JOINT_ROW, JOINT_ROW, ROWS[3]],
        color=ENSEMBLE,
        lw=2,
        zorder=2,
    )
    for y in MEAN_ROWS.values():
        axes.plot([LOGITS, FROM_MEAN], [y, y], color=MEAN, lw=2, zorder=2)
    axes.plot([FROM_MEAN, FROM_MEAN], [MEAN_ROWS[3], ROWS[1]], color=MEAN, lw=2, zorder=2)
    pill(axes, CE, JOINT_ROW, "CE", LABELS)
    for y in ROWS.values():
        pill(axes, CE, y, "CE", LABELS)
        pill(axes, FROM_ENSEMBLE, y, "KL", ENSEMBLE)
        pill(axes, FROM_MEAN, y, "KL", MEAN)
    axes.text(
        FROM_ENSEMBLE, JOINT_ROW + 0.12, "ensemble\nteacher", color=ENSEMBLE, ha="center", size=11
    )
    axes.text(
        FROM_MEAN + 0.12, 2.62, "from the\nother peers'\nmeans", color=MEAN, size=11, va="center"
    )

    # Deployed: the average of the trunk and of branch 1.
    axes.text(
        LOGITS + 0.62,
        MEAN_ROWS[1] + 0.1,
        "deployed",
        color=DEPLOYED,
        size=12,
        weight="bold",
        va="bottom",
    )
    axes.text(
        7.0,
        -0.72,
        "$L\\;=\\;$cross-entropy of every peer and of the ensemble"
        "$\\;+\\;\\omega\\,($KL from the ensemble $+$ KL from the other peers' means$)$",
        color=INK,
        ha="center",
        va="center",
        size=13,
    )
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05, dpi=110, metadata=metadata(path))


def metadata(path):
    """Without a date, so that the same picture is the same file."""
    return {"Date": None} if str(path).endswith(".svg") else None


def network(axes, rows, height, name, line, fill):
    """Draws a trunk, a branch in each row and their logits."""
    mean = line == "--"
    edge = MEAN if mean else INK
    top, bottom = max(rows.values()), min(rows.values())
    box(
        axes,
        TRUNK,
        (top + bottom) / 2,
        1.25,
        top - bottom + height + 0.1,
        "trunk\n$\\theta_l" + ("^{\\,t}" if mean else "") + "$",
        "#fbe4ec" if mean else fill,
        DEPLOYED if mean else edge,
        line=line,
        size=13,
    )
    for j, y in rows.items():
        deployed = mean and j == 1
        color = DEPLOYED if deployed else edge
        arrow(axes, (VIEW + (0.34 if mean else 0.46), y), (TRUNK - 0.63, y), FRAME)
        arrow(axes, (TRUNK + 0.63, y), (BRANCH - 0.8, y), FRAME)
        text = f"branch {j}  $\\theta_{{h,{j}}}" + ("^{\\,t}" if mean else "") + "$"
        box(axes, BRANCH, y, 1.6, height, text, "#fbe4ec" if deployed else fill, color, line=line)
        arrow(axes, (BRANCH + 0.8, y), (LOGITS - 0.25, y), FRAME)
        circle(axes, LOGITS, y, f"$z_{j}" + ("^{\\,t}" if mean else "") + "$", color)


def panel(axes, left, right, bottom, top, color):
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            right - left,
            top - bottom,
            boxstyle="round,pad=0.08,rounding_size=0.15",
            fc=color,
            ec="none",
            zorder=0,
        )
    )


def box(axes, x, y, width, height, text, fill, edge, line="-", size=11):
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.1",
            fc=fill,
            ec=edge,
            lw=1.8,
            ls=line,
            zorder=3,
        )
    )
    axes.text(x, y, text, ha="center", va="center", color=INK, size=size, zorder=4)


def circle(axes, x, y, text, edge):
    axes.add_patch(plt.Circle((x, y), 0.25, fc="white", ec=edge, lw=1.8, zorder=3))
    axes.text(x, y, text, ha="center", va="center", color=INK, size=12, zorder=4)


def pill(axes, x, y, text, color):
    axes.add_patch(
        FancyBboxPatch(
            (x - 0.32, y - 0.2),
            0.64,
            0.4,
            boxstyle="round,pad=0,rounding_size=0.2",
            fc=color,
            ec="white",
            lw=1.5,
            zorder=3,
        )
    )
    axes.text(
        x,
        y,
        text,
        ha="center",
        va="center_baseline",
        color="white",
        size=11,
        weight="bold",
        zorder=4,
    )


def picture(axes, image, x, y, half):
    axes.imshow(
        image,
        extent=(x - half, x + half, y - half, y + half),
        cmap="gray_r",
        interpolation="nearest",
        zorder=3,
    )
    axes.add_patch(
        plt.Rectangle((x - half, y - half), 2 * half, 2 * half, fc="none", ec=FRAME, zorder=4)
    )


def arrow(axes, start, end, color, width=1.4, style="-"):
    axes.annotate(
        "",
        end,
        start,
        arrowprops=dict(
            arrowstyle="-|>",
            color=color,
            lw=width,
            ls=style,
            shrinkA=0,
            shrinkB=0,
            mutation_scale=12,
        ),
        zorder=2,
    )


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else pathlib.Path(__file__).with_suffix(".svg"))
