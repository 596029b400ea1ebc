"""Makes the models that are measured, in a process of its own: `python -m benchmarks.models FOLDER`. Needs TensorFlow.

`small` is dense 64/32/softmax; `large` is the same behind a table of 100 MB, of which an answer reads one row. So
swapping it costs what 100 MB cost, and answering does not.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf  # type: ignore[import-untyped]

from benchmarks.fleet import ACTIONS, FEATURES

NAMES = ("small", "large")
TABLE_ROWS = 100 * 1024 * 1024 // (4 * FEATURES)


def network(*, table: bool) -> bytes:
    """A model of `(1, FEATURES)` to `(1, ACTIONS)`."""
    random = np.random.default_rng(7)

    def weights(*shape: int) -> Any:
        return tf.constant(random.normal(0, 0.2, shape).astype(np.float32))

    first, second, last = weights(FEATURES, 64), weights(64, 32), weights(32, ACTIONS)
    rows = weights(TABLE_ROWS, FEATURES) if table else None

    def scores(features: Any) -> dict[str, Any]:
        hidden = features
        if rows is not None:
            row = tf.cast(tf.abs(features[:, 0]) * 1000.0, tf.int32)
            hidden += tf.gather(rows, row)
        hidden = tf.nn.relu(tf.matmul(tf.nn.relu(tf.matmul(hidden, first)), second))
        return {"scores": tf.nn.softmax(tf.matmul(hidden, last))}

    function = tf.function(scores, input_signature=[tf.TensorSpec((1, FEATURES), tf.float32, "features")])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    return bytes(converter.convert())


def main() -> None:
    """Write both into a folder."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        (folder / f"{name}.tflite").write_bytes(network(table=name == "large"))


if __name__ == "__main__":
    main()
