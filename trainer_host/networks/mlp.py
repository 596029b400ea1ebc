"""A multilayer perceptron from a feature vector to one score per action.

The names are part of the exported signature: input `features`, output `scores`. Softmax is a layer of its own, so
that `logits` can be reached by name. The legal mask is not in the graph: it is applied where the decision is made,
which keeps the model quantisable.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer_host.backend import keras


def mlp(features: int, actions: int, hidden: Sequence[int] = (64, 32)) -> keras.Model:
    """Build the network with fresh weights.

    Args:
        features: Length of the input vector.
        actions: Length of the output.
        hidden: Width of each hidden layer; ReLU follows each.

    Returns:
        A model from `(batch, features)` to `{"scores": (batch, actions)}`; the scores of a row are probabilities.
    """
    inputs = keras.Input((features,), name="features")
    x = inputs
    for number, width in enumerate(hidden, start=1):
        x = keras.layers.Dense(width, activation="relu", name=f"hidden_{number}")(x)
    logits = keras.layers.Dense(actions, name="logits")(x)
    return keras.Model(inputs, {"scores": keras.layers.Softmax(name="scores")(logits)})
