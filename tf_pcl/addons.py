"""tensorflow-addons."""
import warnings


def load():
    """The module tensorflow_addons, imported when it is first needed, without its warning at import of its end of life."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import tensorflow_addons
    return tensorflow_addons
