"""Makes the models that the tests serve; needs TensorFlow, which the tests that use them do not.

    python tests/models/make.py

`echo`    six features in; the first four come back as the scores of four actions
`twin`    another digest, the same behaviour
`slow`    the same behaviour behind about ten times the time
`nan`     scores that are not finite
`narrow`  three features in, four scores out
`hungry`  as `echo`, and adds next to nothing that it takes from a matrix of 4 GiB, planned for when it is loaded
`greedy`  likewise, but how large the matrix is turns out when it runs
`endless` as `echo`, and counts in a loop that never ends
`shifty`  as `echo`, but for a negative first feature it gives all scores twice
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]

FOLDER = Path(__file__).parent
ECHO = np.eye(6, 4, dtype=np.float32)
NEXT_TO_NOTHING = 1e-30  # what is multiplied by zero is optimised away
LARGE = 32768


def dense(inputs: int, weights: np.ndarray, notes: float = 0.0, extra: int = 0) -> bytes:
    """A linear model, with `extra` rows of work whose result is multiplied by zero."""
    random = np.random.default_rng(1)
    wide = tf.constant(random.normal(size=(inputs, extra)).astype(np.float32)) if extra else None
    deep = tf.constant((random.normal(size=(extra, extra)) / max(extra, 1)).astype(np.float32)) if extra else None
    last = tf.constant(np.zeros((extra, weights.shape[1]), np.float32)) if extra else None

    @tf.function(  # type: ignore[untyped-decorator]
        input_signature=[tf.TensorSpec((1, inputs), tf.float32, "features")]
    )
    def scores(features: tf.Tensor) -> dict[str, tf.Tensor]:
        out = tf.matmul(features, tf.constant(weights)) + notes * 1e-30
        if extra:
            out += tf.matmul(tf.nn.relu(tf.matmul(tf.nn.relu(tf.matmul(features, wide)), deep)), last)
        return {"scores": out}

    return converted(scores)


def converted(function: tf.types.experimental.PolymorphicFunction) -> bytes:
    """A TFLite model of built-in operators only."""
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return bytes(converter.convert())


def hostile(spoil: Callable[[tf.Tensor, tf.Tensor], tf.Tensor]) -> bytes:
    """The echo model, with something done to features and scores."""

    @tf.function(input_signature=[tf.TensorSpec((1, 6), tf.float32, "features")])  # type: ignore[untyped-decorator]
    def scores(features: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"scores": spoil(features, tf.matmul(features, tf.constant(ECHO)))}

    return converted(scores)


def hungry(features: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
    """A product of which everything is known before it is computed."""
    rows = tf.tile(features, [LARGE, 1])
    return scores + NEXT_TO_NOTHING * tf.reduce_max(tf.matmul(rows, rows, transpose_b=True))


def greedy(features: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
    """The same product, whose size is computed first."""
    count = tf.cast(tf.reduce_max(features) * 0.0 + LARGE, tf.int32)
    rows = tf.tile(features, [count, 1])
    return scores + NEXT_TO_NOTHING * tf.reduce_max(tf.matmul(rows, rows, transpose_b=True))


def endless(_features: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
    """A loop whose condition stays true."""
    (count,) = tf.while_loop(lambda n: n >= 0.0, lambda n: (tf.minimum(n + 1.0, 1e6),), (tf.reduce_max(scores) ** 2,))
    return scores + NEXT_TO_NOTHING * count


def shifty(features: tf.Tensor, scores: tf.Tensor) -> tf.Tensor:
    """Scores whose count depends on the first feature."""
    times = tf.where(features[0, 0] < 0.0, 2, 1)
    return tf.tile(scores, tf.stack([1, times]))


def main() -> None:
    """Write every model beside this file."""
    narrow = np.zeros((3, 4), np.float32)
    narrow[:3, :3] = np.eye(3)
    models = {
        "echo": dense(6, ECHO),
        "twin": dense(6, ECHO, notes=1.0),
        "slow": dense(6, ECHO, extra=512),
        "nan": dense(6, np.full((6, 4), np.nan, np.float32)),
        "narrow": dense(3, narrow),
        "hungry": hostile(hungry),
        "greedy": hostile(greedy),
        "endless": hostile(endless),
        "shifty": hostile(shifty),
    }
    for name, data in models.items():
        (FOLDER / f"{name}.tflite").write_bytes(data)
        print(f"{name}: {len(data)} bytes")


if __name__ == "__main__":
    main()
