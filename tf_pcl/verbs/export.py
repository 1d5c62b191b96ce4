"""tf-pcl export: writes the network of a run in other formats, with a model card."""

from absl import flags

from tf_pcl import compat
from tf_pcl.errors import UserError
from tf_pcl.verbs.verb import Verb


def _define_flags() -> None:
    flags.DEFINE_list(
        "format",
        ["saved_model", "tflite", "tflite_float16", "tflite_int8"],
        "formats, comma separated: saved_model, tflite, tflite_float16 (weights in float16), "
        "tflite_int8 (integers, calibrated on training images), onnx (needs tf_pcl[onnx])",
    )
    flags.DEFINE_string(
        "exit",
        "deployed",
        "exit whose network is written: deployed; ensemble, which is all peers (the mean peers, if "
        "there are any) with their ensemble classifier (PCL-E); or a peer's name in results.json",
    )
    flags.DEFINE_string("data_dir", None, "folder of the run's data set, if it was moved")
    flags.DEFINE_string(
        "folder",
        None,
        "folder for the files; default: RUN/export, for another exit than the deployed one "
        "RUN/export/EXIT; with --fold_batch_norm, its folder `folded`",
    )
    flags.DEFINE_bool(
        "fold_batch_norm",
        False,
        "fold BatchNorm into the convolution or dense layer before it, which is faster; the "
        "outputs for all test images must stay the same",
    )
    flags.DEFINE_integer(
        "calibration_images",
        200,
        "training images on which tflite_int8 is calibrated",
        lower_bound=1,
    )


def _export(rest: list[str]) -> None:
    if len(rest) != 1:
        raise UserError(
            f"{len(rest)} workdirs were given: give one run, as in tf-pcl export runs/NAME"
        )
    values = flags.FLAGS
    compat.import_tensorflow()
    from tf_pcl.deploy import artifacts

    made = artifacts.export_run(
        rest[0],
        values.format,
        exit_name=values.exit,
        data_dir=values.data_dir,
        folder=values.folder,
        calibration_images=values.calibration_images,
        fold_batch_norm=values.fold_batch_norm,
    )
    print(artifacts.table(made))
    if "batch_norm" in made:
        found = made["batch_norm"]
        left = f", not {', '.join(found['left'])}" if found["left"] else ""
        print(
            f"BatchNorm: {found['folded']} layers folded{left}; logits differ by up to "
            f"{found['largest_difference']:.1e}"
        )
    print(f"Folder: {made['folder']}, with artifacts.json and MODEL_CARD.md")


VERB = Verb(
    "Writes the network of a run as SavedModel, TFLite or ONNX, and a model card.",
    _define_flags,
    _export,
    arguments="RUN",
)
