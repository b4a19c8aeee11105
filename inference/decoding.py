"""One step of the transformer on a CPU for a few tokens, of any sequences, as one kernel over all layers.

The same computation as `Transformer.forward` with a cache, in float32 whatever the weights are stored in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from data.compiled import kernel
from inference.crew import meet, share
from inference.kernels import activate, attend, exponential, keep, normalise, place
from inference.multiplication import Operands, multiply, prepare
from inference.vectors import widened

QUERY, KEY, VALUE, OUTPUT, UP, GATE, DOWN = range(7)


class Shape(NamedTuple):
    """Numbers and switches of a model; `d_ff` and `vocab_size` are heights of matrices, `activation` see `kernels`."""

    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    vocab_size: int
    activation: int
    rms: bool
    qk_norm: bool
    eps: float


class Weights(NamedTuple):
    """What a model has learned, by layer. Arrays are float32 and empty where the model has no such thing.

    `token_table` and `position_table`, which may be empty, hold embeddings as float32 or the bits of bfloat16.
    `matrices` `(layers, 7, 3)` and `head` `(3,)` are addresses as `multiplication.multiply` takes them, of types `kind`
    and `head_kind`. `norms` `(layers, 2, 2, d_model)` are scale and bias, before attention and before the feed-forward
    layer.
    `windows` `(layers,)` int64: 0 is the whole context. `value_table` `(layers,)` int64: which of the tables of value
    embeddings a layer has, or -1.
    """

    token_table: Any
    position_table: Any
    kind: Any
    head_kind: Any
    matrices: Any
    head: Any
    qkv_bias: Any
    output_bias: Any
    up_bias: Any
    down_bias: Any
    norms: Any
    final_norm: Any
    residual_scales: Any
    value_gates: Any
    value_table: Any
    windows: Any
    cos: Any
    sin: Any


class Memory(NamedTuple):
    """What a step writes over, float32: a row per token; or operands of `multiplication.multiply`.

    `x` is the residual stream; `scores` has a row per thread.
    """

    x: Any
    embedding: Any
    normal: Operands
    qkv: Any
    mixed: Operands
    hidden: Operands
    gate: Any
    scores: Any
    logits: Any


@kernel
def step(
    thread: int,
    threads: int,
    counter: int,
    shape: Shape,
    weights: Weights,
    memory: Memory,
    keys: Any,
    values: Any,
    ids: Any,
    rows: Any,
    positions: Any,
    value_rows: Any,
    wanted: Any,
) -> None:
    """Run tokens through all layers; all threads of a `Crew` call it.

    Token t is number `ids[t]` of the vocabulary, at position `positions[t]` of row `rows[t]` of the cache `keys` and
    `values` `(layers, rows, kv_heads, length, head_dim)`, float32 or the bits of bfloat16. What it sees are the
    positions up to its own in that row, of which those of this step's tokens are written here. `value_rows` `(tables,
    tokens, kv_heads * head_dim)` are the tokens' value embeddings. The logits after token `wanted[i]` go to
    `memory.logits[i]`.
    """
    tokens, none = len(rows), weights.final_norm[0, :0]
    begin, end = share(tokens, thread, threads)
    for t in range(begin, end):
        _embed(ids[t], positions[t], weights, memory.x[t])
        if weights.residual_scales.size:
            memory.embedding[t] = memory.x[t]
    for layer in range(len(weights.matrices)):
        matrices, norms = weights.matrices[layer], weights.norms[layer]
        for t in range(begin, end):
            if weights.residual_scales.size:
                keeps, adds = weights.residual_scales[layer, 0], weights.residual_scales[layer, 1]
                for i in range(memory.x.shape[1]):
                    memory.x[t, i] = memory.x[t, i] * keeps + memory.embedding[t, i] * adds
            normalise(memory.x[t], norms[0, 0], norms[0, 1], shape.rms, shape.eps, memory.normal.rows[t])
        meet(thread, threads, counter)
        prepare(thread, weights.kind, memory.normal, tokens)
        first = 0
        for which in range(3):
            height = (shape.heads if which == 0 else shape.kv_heads) * shape.head_dim
            multiply(
                thread,
                threads,
                weights.kind,
                matrices[which],
                weights.qkv_bias[layer],
                memory.normal,
                tokens,
                memory.qkv,
                first,
                height,
                False,
            )
            first += height
        meet(thread, threads, counter)
        _place_all(thread, threads, layer, shape, weights, memory, keys, values, rows, positions, value_rows)
        meet(thread, threads, counter)
        _attend_all(thread, threads, layer, shape, weights, memory, keys, values, rows, positions)
        meet(thread, threads, counter)
        width, bias = memory.x.shape[1], weights.output_bias[layer]
        prepare(thread, weights.kind, memory.mixed, tokens)
        multiply(thread, threads, weights.kind, matrices[OUTPUT], bias, memory.mixed, tokens, memory.x, 0, width, True)
        meet(thread, threads, counter)
        for t in range(begin, end):
            normalise(memory.x[t], norms[1, 0], norms[1, 1], shape.rms, shape.eps, memory.normal.rows[t])
        meet(thread, threads, counter)
        prepare(thread, weights.kind, memory.normal, tokens)
        _widen(thread, threads, layer, tokens, shape, weights, memory)
        meet(thread, threads, counter)
        bias = weights.down_bias[layer]
        prepare(thread, weights.kind, memory.hidden, tokens)
        multiply(thread, threads, weights.kind, matrices[DOWN], bias, memory.hidden, tokens, memory.x, 0, width, True)
        meet(thread, threads, counter)
    begin, end = share(len(wanted), thread, threads)
    for i in range(begin, end):
        scale, bias = weights.final_norm[0], weights.final_norm[1]
        normalise(memory.x[wanted[i]], scale, bias, shape.rms, shape.eps, memory.normal.rows[i])
    meet(thread, threads, counter)
    prepare(thread, weights.head_kind, memory.normal, len(wanted))
    multiply(
        thread,
        threads,
        weights.head_kind,
        weights.head,
        none,
        memory.normal,
        len(wanted),
        memory.logits,
        0,
        shape.vocab_size,
        False,
    )


@kernel
def _embed(token: int, position: int, weights: Weights, out: Any) -> None:
    for i in range(len(out)):
        out[i] = widened(weights.token_table[token, i])
    if weights.position_table.size:
        for i in range(len(out)):
            out[i] += widened(weights.position_table[position, i])


@kernel
def _place_all(
    thread: int,
    threads: int,
    layer: int,
    shape: Shape,
    weights: Weights,
    memory: Memory,
    keys: Any,
    values: Any,
    rows: Any,
    positions: Any,
    value_rows: Any,
) -> None:
    """Normalise and turn queries and keys, add value embeddings to values, and write keys and values to the cache."""
    width, group, table = shape.head_dim, shape.heads // shape.kv_heads, weights.value_table[layer]
    begin, end = share(len(rows) * shape.kv_heads, thread, threads)
    for task in range(begin, end):
        t, head = task // shape.kv_heads, task % shape.kv_heads
        place_in_row, qkv = positions[t], memory.qkv[t]
        cos, sin = weights.cos[place_in_row], weights.sin[place_in_row]
        for i in range(head * group, (head + 1) * group):
            place(qkv[i * width : (i + 1) * width], width, shape.qk_norm, shape.eps, cos, sin)
        start = (shape.heads + head) * width
        key = qkv[start : start + width]
        place(key, width, shape.qk_norm, shape.eps, cos, sin)
        start += shape.kv_heads * width
        value = qkv[start : start + width]
        if table >= 0:
            opening: Any = np.float32(0.0)
            for i in range(weights.value_gates.shape[2]):
                opening += weights.value_gates[table, head, i] * memory.normal.rows[t, i]
            opening = np.float32(2.0) / (np.float32(1.0) + exponential(-opening))
            for i in range(width):
                value[i] += opening * value_rows[table, t, head * width + i]
        keep(key, keys[layer, rows[t], head, place_in_row])
        keep(value, values[layer, rows[t], head, place_in_row])


@kernel
def _attend_all(
    thread: int,
    threads: int,
    layer: int,
    shape: Shape,
    weights: Weights,
    memory: Memory,
    keys: Any,
    values: Any,
    rows: Any,
    positions: Any,
) -> None:
    """The attention of every head and token, of which a window reads no more than the window."""
    width, group, window = shape.head_dim, shape.heads // shape.kv_heads, weights.windows[layer]
    begin, end = share(len(rows) * shape.heads, thread, threads)
    for task in range(begin, end):
        t, head = task // shape.heads, task % shape.heads
        after = positions[t] + 1
        seen_keys, seen_values = keys[layer, rows[t], head // group], values[layer, rows[t], head // group]
        attend(
            memory.qkv[t, head * width : (head + 1) * width],
            seen_keys,
            seen_values,
            max(0, after - window) if window else 0,
            after,
            memory.scores[thread],
            memory.mixed.rows[t, head * width : (head + 1) * width],
        )


@kernel
def _widen(thread: int, threads: int, layer: int, tokens: int, shape: Shape, weights: Weights, memory: Memory) -> None:
    """The first half of the feed-forward layer, with its activation."""
    matrices, rows, up_bias = weights.matrices[layer], shape.d_ff, weights.up_bias[layer]
    gated = memory.gate.size > 0
    if gated:
        bias = up_bias[rows:]
        multiply(
            thread, threads, weights.kind, matrices[GATE], bias, memory.normal, tokens, memory.gate, 0, rows, False
        )
    multiply(
        thread,
        threads,
        weights.kind,
        matrices[UP],
        up_bias[:rows],
        memory.normal,
        tokens,
        memory.hidden.rows,
        0,
        rows,
        False,
    )
    begin, end = share(rows, thread, threads)
    for t in range(tokens):
        activate(
            memory.hidden.rows[t], memory.gate[t] if gated else memory.hidden.rows[t], begin, end, shape.activation
        )
