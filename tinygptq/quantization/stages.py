"""The calibration text on its way through a block: one stage's activations, and the unquantised model's beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tinygptq.config import Recipe
from tinygptq.gptq.drift import Cross
from tinygptq.model import Llama
from tinygptq.quantization.placement import Host
from tinygptq.quantization.sensitivity import output_matrices
from tinygptq.weights import DenseLinear, Weights, dense

WRITERS = ("self_attn.o_proj", "mlp.down_proj")  # the linears whose outputs are added to the residual stream


class Activations:
    """One stage's activations, batch by batch: computed when first asked for, and kept as far as there is room.

    Args:
        compute: gives batch number i of ``count``. room: bytes that may be kept. uses: how often each batch will be asked
            for, after which it is not kept any longer.
    """

    def __init__(
        self, place: Host, count: int, compute: Callable[[int], np.ndarray], room: float = 0, uses: float = math.inf
    ) -> None:
        self._count, self._compute, self._clock, self._room = count, compute, place.clock, room
        self._kept: dict[int, np.ndarray] = {}
        self._left = [uses] * count

    def __getitem__(self, i: int) -> np.ndarray:
        self._left[i] -= 1
        if i in self._kept:
            return self._kept[i] if self._left[i] > 0 else self._kept.pop(i)
        with self._clock("forward"):
            x = self._compute(i)
        if x.nbytes <= self._room and self._left[i] > 0:
            self._room -= x.nbytes
            self._kept[i] = x
        return x

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[i] for i in range(self._count))


class Teacher:
    """The unquantised model on the same text, as far as the quantised one has come: what `gptq.drift` corrects towards.

    outputs: for `gptq.feedback`, by the linears' full names; empty where the recipe does without.

    Args:
        model: the model to quantise; of blocks not yet entered it holds the dense linears. ids: the calibration windows.
        done: begin after so many blocks; the text then runs through them first.
    """

    def __init__(self, model: Llama, ids: np.ndarray, recipe: Recipe, place: Host, done: int = 0) -> None:
        self.outputs = output_matrices(model, ids, place) if recipe.outputs else {}
        self._recipe, self._place, self.hidden = recipe, place, place.embed(model, ids)  # each (B, T, C)
        for layer in range(done):
            with place.block(model, layer), place.clock("forward"):
                self.enter(model, layer)
                for i, h in enumerate(self.hidden):
                    self.hidden[i] = self._model.block(layer, h)

    def enter(self, model: Llama, layer: int) -> None:
        """Take hold of a block's linears before any of them is replaced."""
        prefix, weights = f"model.layers.{layer}.", model.weights
        own = {name: self._place.teacher(name, x) for name, x in weights.linears.items() if name.startswith(prefix)}
        own_weights = Weights(weights.embedding, weights.head, weights.norms, own)
        self.layer, self._model = layer, Llama(model.config, own_weights, model.functions)

    def inputs(self, name: str, before: Activations | None, room: float = 0) -> Activations:
        """The unquantised inputs of a stage, given those of the stage before where it is one that mixes them.

        Args:
            name: any linear of the stage. before: the inputs of q, k, v for o_proj, of gate and up for down_proj.
        """
        model, layer = self._model, self.layer
        if before is None:
            begin = model.attention_input if name.startswith("self_attn.") else model.mlp_input
            return Activations(self._place, len(self.hidden), lambda i: begin(layer, self.hidden[i]), room)
        mix = model.attention_mix if name.startswith("self_attn.") else model.mlp_mix
        return Activations(self._place, len(self.hidden), lambda i: mix(layer, before[i]), room)

    def write(self, name: str, inputs: Activations) -> None:
        """Add what a linear makes of its inputs to the residual stream."""
        with self._place.clock("forward"):
            for i in range(len(self.hidden)):
                self.hidden[i] += self._model.linear(self.layer, name, inputs[i])

    def cross(self, name: str, inputs: Activations, wanted: Activations, hidden: Any) -> Cross:
        """What `gptq.drift.target` needs, summed over the text.

        Args:
            name: a linear of the stage. inputs, wanted: its inputs in the quantised model and in this one. hidden: the
                quantised model's residual stream.
        Returns:
            For a linear that writes to the residual stream ``E X^T``, [out, in]; for the others, which share it,
            ``drift * (X_fp - X) X^T``, [in, in].
        """
        cross, linears = self._place.cross(), self._model.weights.linears
        drift, residual = np.float32(self._recipe.drift), np.float32(self._recipe.residual)
        for i, x in enumerate(inputs):
            E = (wanted[i] - x) * drift  # (B, T, in)
            with self._place.clock("Hessian"):
                if name in WRITERS:
                    without_bias = DenseLinear(dense(linears[f"model.layers.{self.layer}.{name}"]).weight)
                    E = self._model.functions.linear(E, without_bias).astype(np.float32, copy=False)  # (B, T, out)
                    E += (self.hidden[i] - hidden[i]) * residual
                cross.add(E, x)
        return cross
