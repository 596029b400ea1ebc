"""Makes the models that the tests serve; needs TensorFlow, which the tests that use them do not.

    python tests/models/make.py

`echo`    six features in; the first four come back as the scores of four actions
`twin`    another digest, the same behaviour
`slow`    the same behaviour behind about ten times the time
`nan`     scores that are not finite
`narrow`  three features in, four scores out
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]

FOLDER = Path(__file__).parent


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

    converter = tf.lite.TFLiteConverter.from_concrete_functions([scores.get_concrete_function()])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return bytes(converter.convert())


def main() -> None:
    """Write every model beside this file."""
    echo = np.zeros((6, 4), np.float32)
    echo[:4, :4] = np.eye(4)
    narrow = np.zeros((3, 4), np.float32)
    narrow[:3, :3] = np.eye(3)
    models = {
        "echo": dense(6, echo),
        "twin": dense(6, echo, notes=1.0),
        "slow": dense(6, echo, extra=512),
        "nan": dense(6, np.full((6, 4), np.nan, np.float32)),
        "narrow": dense(3, narrow),
    }
    for name, data in models.items():
        (FOLDER / f"{name}.tflite").write_bytes(data)
        print(f"{name}: {len(data)} bytes")


if __name__ == "__main__":
    main()
