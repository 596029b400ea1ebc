"""The only import of TensorFlow and Keras, and how they are set up.

Only processes that train or convert import this module: it takes two to three seconds and some 400 MB.
"""

from __future__ import annotations

import os

# Both are read when TensorFlow and Keras are imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import keras  # type: ignore[import-untyped]
import tensorflow as tf  # type: ignore[import-untyped]

__all__ = ["configure", "keras", "tf"]


def configure(*, threads: int, seed: int) -> None:
    """Prepare this process: how many threads TensorFlow may use, and the seed of everything random in it.

    Call it before the first tensor is made: TensorFlow refuses to change its threads afterwards. Operations are made
        deterministic, so
    the same data, settings and seed give the same weights on the same machine.
    """
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(seed)
