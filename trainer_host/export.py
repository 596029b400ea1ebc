"""From Keras to TFLite: the only module that converts.

Only built-in operators are allowed, because by default Keras lets the converter fall back on TensorFlow's own
("Flex"), which no device has. Dynamic range stores weights as int8 and computes with float32 activations. Dense
weights are quantised per tensor, not
per channel: per channel needs FULLY_CONNECTED version 12, and tflite-runtime 2.14 stops at 11. The switch for it is a
private attribute of the converter, which Keras refuses by name should it ever disappear; a test loads the result on
the old runtime.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from trainer_host.backend import keras, tf
from trainer_host.networks.mlp import mlp
from trainer_host.recipes.recipe import Format, Recipe

PADDING_PASSES = 8


def network(recipe: Recipe) -> keras.Model:
    """The recipe's network, with fresh weights from the process's seed."""
    return mlp(recipe.features.length, len(recipe.actions), recipe.network.hidden)


def to_tflite(model: keras.Model, format_: Format) -> bytes:
    """Convert a model for one state at a time: `(1, features)` to `(1, actions)`.

    Args:
        model: With one input, `features`, and one output, `scores`.
        format_: `float32` keeps the weights; `dynamic_range` stores them in a quarter of the bytes.
    """
    width = model.inputs[0].shape[1]
    options: dict[str, Any] = {"target_spec": {"supported_ops": [tf.lite.OpsSet.TFLITE_BUILTINS]}}
    if format_ == "dynamic_range":
        options["optimizations"] = [tf.lite.Optimize.DEFAULT]
        options["_experimental_disable_per_channel_quantization_for_dense_layers"] = True
    signature = [tf.TensorSpec((1, width), tf.float32, name="features")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.tflite")
        model.export(path, format="litert", input_signature=signature, verbose=False, **options)
        return path.read_bytes()


def untrained(recipe: Recipe, seed: int) -> bytes:
    """A float32 model that has learned nothing: the recipe's network as it is initialised from `seed`."""
    keras.utils.set_random_seed(seed)
    return to_tflite(network(recipe), "float32")


def padded(model: keras.Model, width: int) -> keras.Model:
    """The same policy, made slower by work whose result is multiplied by zero.

    For showing, and testing, that a slower model is caught. A branch of `PADDING_PASSES` square layers runs beside
    the network and ends in a layer of zero weights, which is added to the logits. The passes share one matrix, so the
    file grows by `4·width²` bytes only. ReLU6 keeps the branch finite whatever the input, so it adds exactly zero.

    Args:
        model: With layers `logits` and `scores`, as `trainer_host.networks.mlp` builds it.
        width: Of the square layers; the work grows with its square.
    """
    inputs, logits = model.inputs[0], model.get_layer("logits").output
    square = keras.layers.Dense(width, activation="relu6", name="padding")
    x = keras.layers.Dense(width, activation="relu6", name="padding_first")(inputs)
    for _ in range(PADDING_PASSES):
        x = square(x)
    nothing = keras.layers.Dense(logits.shape[1], kernel_initializer="zeros", use_bias=False, name="padding_last")(x)
    total = keras.layers.Add(name="padded_logits")([logits, nothing])
    return keras.Model(inputs, {"scores": keras.layers.Softmax(name="scores")(total)})
