"""Makes the tiny models with which `edge-agent doctor` finds out what a device's runtime can run; needs TensorFlow.

    python scripts/make_probes.py

`dense-float32`          what every runtime since 2.0 runs
`dense-dynamic-range`    weights in 8 bits, one scale per tensor
`dense-per-channel`      weights in 8 bits, one scale per channel: FULLY_CONNECTED version 12, since 2.17
`batch-matmul-softmax`   what attention needs
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf  # type: ignore[import-untyped]

FOLDER = Path(__file__).resolve().parent.parent / "edge_agent" / "probes"
WIDTH = 32


def converted(scores: Callable[[Any], dict[str, Any]], *, quantise: bool, per_channel: bool) -> bytes:
    """A function of `(1, WIDTH)` features as a TFLite model, of built-in operators only."""
    function = tf.function(scores, input_signature=[tf.TensorSpec((1, WIDTH), tf.float32, "features")])
    converter = tf.lite.TFLiteConverter.from_concrete_functions([function.get_concrete_function()])
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS]
    if quantise:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter._experimental_disable_per_channel_quantization_for_dense_layers = not per_channel
    return bytes(converter.convert())


def main() -> None:
    """Write every probe."""
    tf.random.set_seed(1)
    weights = tf.constant(tf.random.normal((WIDTH, WIDTH)).numpy())

    def dense(features: Any) -> dict[str, Any]:
        return {"scores": tf.matmul(features, weights)}

    def attention(features: Any) -> dict[str, Any]:
        tokens = tf.reshape(features, (1, 4, WIDTH // 4))
        seen = tf.nn.softmax(tf.matmul(tokens, tokens, transpose_b=True))
        return {"scores": tf.reshape(tf.matmul(seen, tokens), (1, WIDTH))}

    models = {
        "dense-float32": converted(dense, quantise=False, per_channel=False),
        "dense-dynamic-range": converted(dense, quantise=True, per_channel=False),
        "dense-per-channel": converted(dense, quantise=True, per_channel=True),
        "batch-matmul-softmax": converted(attention, quantise=False, per_channel=False),
    }
    FOLDER.mkdir(exist_ok=True)
    for name, data in models.items():
        (FOLDER / f"{name}.tflite").write_bytes(data)
        sys.stdout.write(f"{name}: {len(data)} bytes\n")


if __name__ == "__main__":
    main()
