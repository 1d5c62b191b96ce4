"""What a run on one stack writes, the other stack reads: SavedModels and checkpoints, both ways.

TF_PCL_OTHER_PYTHON names the interpreter of the other stack's environment, as .ci/run sets it. Most
machines have one stack alone and nothing to compare with: there are no tests here then.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from pages import ROOT

OTHER = os.environ.get("TF_PCL_OTHER_PYTHON")
RUN = (
    "train.py --method=pcl --dataset=digits --network=resnet8 --batch_size=64 --epochs=1 "
    "--deterministic"
).split()
# Writes the logits of the SavedModel, by its signature and as Keras loads it, and the newest
# checkpoint's values.
READ = """
import sys, numpy as np, tensorflow as tf
sys.path.insert(0, sys.argv[3])
from tf_pcl.compat import keras
folder = sys.argv[1]
images = np.random.RandomState(0).randint(0, 256, [32, 8, 8, 1]).astype(np.uint8)
signature = tf.saved_model.load(folder + "/export/saved_model/1").signatures["serving_default"]
model = keras.models.load_model(folder + "/export/saved_model/1", compile=False)
values = {"logits": signature(images=tf.constant(images))["logits"], "keras": model(images)}
checkpoint = tf.train.load_checkpoint(tf.train.latest_checkpoint(folder + "/checkpoints"))
for name in checkpoint.get_variable_to_shape_map():
    if name.endswith("VARIABLE_VALUE"):
        values[name] = checkpoint.get_tensor(name)
np.savez(sys.argv[2], **values)
"""


def run(python, *arguments, status=0):
    env = {k: v for k, v in os.environ.items() if k != "TF_USE_LEGACY_KERAS"}
    done = subprocess.run(
        [python, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert done.returncode == status, done.stderr
    return done.stderr if status else done.stdout


def read(python, folder, tmp_path):
    result = tmp_path / "values.npz"
    run(python, "-c", READ, folder, result, ROOT)
    return dict(np.load(result))


if OTHER:

    @pytest.mark.slow
    @pytest.mark.parametrize("direction", ["to the other", "from the other"])
    def test_saved_models_and_checkpoints_cross(direction, tmp_path):
        """The reader's logits and variables are the writer's; it does not go on with the run."""
        writer, reader = (sys.executable, OTHER)[:: 1 if direction == "to the other" else -1]
        folder = tmp_path / "run"
        run(writer, *RUN, f"--workdir={folder}")
        written, taken = (read(python, folder, tmp_path) for python in (writer, reader))
        assert written.keys() == taken.keys() and len(written) > 100
        for name, value in written.items():
            if name in ("logits", "keras"):
                np.testing.assert_allclose(taken[name], value, rtol=1e-4, atol=1e-4)
            else:
                np.testing.assert_array_equal(taken[name], value, name)
        versions = json.loads((folder / "versions.json").read_text())
        said = run(reader, *RUN, f"--workdir={folder}", status=2)
        assert said.count("\n") == 1 and f"a run on TensorFlow {versions['tensorflow']}" in said
