"""Behaviour cloning: learn to act as somebody else did, as plain classification.

Given pairs of a state s and the action a that was played there, minimise -log π(a|s) by stochastic gradient descent
(Pomerleau, "Efficient training of artificial neural networks for autonomous navigation", Neural Computation 3, 1991;
Bain & Sammut, "A framework for behavioural cloning", Machine Intelligence 15, 1995). Optimiser: Adam (Kingma & Ba,
2015).

A whole epoch is one compiled call. A step of a small network takes less time than calling it from Python does, so
stepping from Python would spend most of its time outside TensorFlow.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer_host.backend import keras, tf
from trainer_host.dataset import Examples, Split
from trainer_host.recipes.recipe import CloningSettings


class Epoch(NamedTuple):
    """How one epoch went.

    Losses are means of -log π(a|s); accuracies are shares of rows whose best score is the played action's.
    """

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    val_loss: float
    val_accuracy: float
    seconds: float


def clone(
    model: keras.Model,
    data: Split,
    settings: CloningSettings,
    *,
    seed: int,
    board: Path,
    on_epoch: Callable[[Epoch], None],
) -> list[Epoch]:
    """Train `model` in place, and leave it with the weights of its best epoch.

    Args:
        model: From `(batch, features)` to `{"scores": (batch, actions)}`, probabilities.
        data: What to learn from, and what to stop by.
        settings: Learning rate, batch and when to stop.
        seed: Orders the examples.
        board: Folder for TensorBoard.
        on_epoch: Called after each epoch.

    Returns:
        Every epoch, in order; the best is the one with the lowest `val_loss`.
    """
    weights = model.trainable_variables
    optimizer = keras.optimizers.Adam(settings.learning_rate)
    optimizer.build(weights)
    features, actions = _tensors(data.train)
    val_features, val_actions = _tensors(data.validation)

    def judge(states: tf.Tensor, played: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        scores = model(states, training=True)["scores"]
        loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(played, scores))
        return loss, tf.reduce_mean(tf.cast(tf.argmax(scores, axis=1) == played, tf.float32))

    def learn(order: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        loss_sum = accuracy_sum = tf.constant(0.0)
        for rows in order:
            with tf.GradientTape() as tape:
                loss, accuracy = judge(tf.gather(features, rows), tf.gather(actions, rows))
            optimizer.apply(tape.gradient(loss, weights), weights)
            loss_sum, accuracy_sum = loss_sum + loss, accuracy_sum + accuracy
        steps = tf.cast(tf.shape(order)[0], tf.float32)
        return loss_sum / steps, accuracy_sum / steps

    learn_compiled = tf.function(learn, jit_compile=settings.xla)
    judge_compiled = tf.function(judge)
    rng = np.random.default_rng(seed)
    batch = min(settings.batch, len(features))
    steps = len(features) // batch
    history: list[Epoch] = []
    best_loss, best_weights, best_epoch = np.inf, model.get_weights(), 0

    with tf.summary.create_file_writer(str(board)).as_default():
        for number in range(1, settings.epochs + 1):
            started = time.monotonic()
            order = rng.permutation(len(features))[: steps * batch].reshape(steps, batch)
            loss, accuracy = learn_compiled(tf.constant(order, tf.int32))
            val_loss, val_accuracy = judge_compiled(val_features, val_actions)
            history.append(
                Epoch(
                    epoch=number,
                    epochs=settings.epochs,
                    loss=float(loss),
                    accuracy=float(accuracy),
                    val_loss=float(val_loss),
                    val_accuracy=float(val_accuracy),
                    seconds=time.monotonic() - started,
                )
            )
            for name in ("loss", "accuracy", "val_loss", "val_accuracy", "seconds"):
                tf.summary.scalar(name, getattr(history[-1], name), step=number)
            on_epoch(history[-1])
            if history[-1].val_loss < best_loss:
                best_loss, best_weights, best_epoch = history[-1].val_loss, model.get_weights(), number
            elif number - best_epoch >= settings.patience:
                break
    model.set_weights(best_weights)
    return history


def _tensors(examples: Examples) -> tuple[tf.Tensor, tf.Tensor]:
    return tf.constant(examples.features), tf.constant(examples.actions)
