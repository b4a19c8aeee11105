"""One step of the transformer on a CPU for a few tokens, of any sequences, as one kernel over all layers.

The same computation as `Transformer.forward` with a cache, in float32 whatever the weights are stored in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from data.compiled import kernel
from inference.binding import Bound
from inference.crew import called_again, meet, share
from inference.kernels import activate, attend, exponential, keep, normalise, place
from inference.multiplication import Operands, multiply, prepare
from inference.vectors import widened

QUERY, KEY, VALUE, OUTPUT, UP, GATE, DOWN, HEAD = MATRICES = range(8)


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


class Tokens(NamedTuple):
    """The tokens of a step, int64 arrays with room for more: `counts` is how many there are and are `wanted`.

    Token t is number `ids[t]` of the vocabulary, at position `positions[t]` of row `rows[t]` of the cache;
    `value_rows` `(tables, tokens, kv_heads * head_dim)`, float32, are the tokens' value embeddings. The logits after
    token `wanted[i]` go to `Memory.logits[i]`.
    """

    counts: Any
    ids: Any
    rows: Any
    positions: Any
    value_rows: Any
    wanted: Any


class Memory(NamedTuple):
    """What a step writes over, float32: a row per token; or operands of `multiplication.multiply`.

    `x` is the residual stream; `scores` has a row per thread, and `normal` rows `(threads, tokens, width)`. `queues`
    `(8, threads, 8)` int64: which rows of the matrices have been taken, each with a line of the cache.
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
    queues: Any


@kernel
def step(
    thread: int,
    threads: int,
    counter: int,
    bound: Bound,
) -> None:
    """Run tokens through all layers; all threads of a `Crew` call it. Bound are (Shape, Weights, Memory, Tokens, keys,
    values).

    What a token sees of the cache, `keys` and `values` `(layers, rows, kv_heads, length, head_dim)`, float32 or the
    bits of bfloat16, are the positions up to its own in its row, of which those of this step's tokens are written here.
    """
    shape, weights, memory, tokens, keys, values = bound.arguments
    while True:
        _run(thread, threads, counter, shape, weights, memory, tokens, keys, values)
        if not called_again(thread, threads, counter):
            return


@kernel
def _run(
    thread: int,
    threads: int,
    counter: int,
    shape: Shape,
    weights: Weights,
    memory: Memory,
    now: Tokens,
    keys: Any,
    values: Any,
) -> None:
    # Each thread makes for itself what it would else have to wait for; its heads, where they can be shared out evenly,
    # are its own. Each empties its queues between two meetings at which nobody takes from them.
    tokens, wanted = now.counts[0], now.counts[1]
    queues = memory.queues
    queues[:, thread, 0] = 0
    width, none = memory.x.shape[1], weights.final_norm[0, :0]
    apart = shape.kv_heads % threads == 0
    normal = Operands(memory.normal.rows[thread], memory.normal.digits, memory.normal.units)
    for t in range(tokens):
        _embed(thread, threads, now.ids[t], now.positions[t], weights, memory.x[t])
    for layer in range(len(weights.matrices)):
        matrices, norms = weights.matrices[layer], weights.norms[layer]
        if weights.residual_scales.size:
            meet(thread, threads, counter)
            _mix_in_embedding(thread, threads, layer, tokens, weights, memory)
        meet(thread, threads, counter)
        for t in range(tokens):
            normalise(memory.x[t], norms[0, 0], norms[0, 1], shape.rms, shape.eps, normal.rows[t])
        prepare(thread, weights.kind, normal, tokens)
        first = 0
        for which in range(3):
            height, bias = (shape.heads if which == 0 else shape.kv_heads) * shape.head_dim, weights.qkv_bias[layer]
            queue, matrix, out = queues[which], matrices[which], memory.qkv
            multiply(thread, threads, queue, weights.kind, matrix, bias, normal, tokens, out, first, height, False)
            first += height
        meet(thread, threads, counter)
        queues[OUTPUT:HEAD, thread, 0] = 0
        _place_all(thread, threads, layer, shape, weights, memory, normal, now, keys, values)
        if not apart:
            meet(thread, threads, counter)
        _attend_all(thread, threads, layer, shape, weights, memory, now, keys, values)
        meet(thread, threads, counter)
        prepare(thread, weights.kind, memory.mixed, tokens)
        queue, matrix, bias, out = queues[OUTPUT], matrices[OUTPUT], weights.output_bias[layer], memory.x
        multiply(thread, threads, queue, weights.kind, matrix, bias, memory.mixed, tokens, out, 0, width, True)
        meet(thread, threads, counter)
        for t in range(tokens):
            normalise(memory.x[t], norms[1, 0], norms[1, 1], shape.rms, shape.eps, normal.rows[t])
        prepare(thread, weights.kind, normal, tokens)
        queues[QUERY:OUTPUT, thread, 0] = 0
        _widen(thread, threads, layer, tokens, shape, weights, memory, normal)
        meet(thread, threads, counter)
        _activate_all(thread, threads, tokens, shape, memory)
        meet(thread, threads, counter)
        prepare(thread, weights.kind, memory.hidden, tokens)
        queue, matrix, bias, out = queues[DOWN], matrices[DOWN], weights.down_bias[layer], memory.x
        multiply(thread, threads, queue, weights.kind, matrix, bias, memory.hidden, tokens, out, 0, width, True)
    meet(thread, threads, counter)
    for i in range(wanted):
        scale, bias = weights.final_norm[0], weights.final_norm[1]
        normalise(memory.x[now.wanted[i]], scale, bias, shape.rms, shape.eps, normal.rows[i])
    kind, matrix, queue, out = weights.head_kind, weights.head, queues[HEAD], memory.logits
    prepare(thread, kind, normal, wanted)
    multiply(thread, threads, queue, kind, matrix, none, normal, wanted, out, 0, shape.vocab_size, False)


@kernel
def _embed(thread: int, threads: int, token: int, position: int, weights: Weights, out: Any) -> None:
    begin, end = share(len(out), thread, threads)
    for i in range(begin, end):
        out[i] = widened(weights.token_table[token, i])
    if weights.position_table.size:
        for i in range(begin, end):
            out[i] += widened(weights.position_table[position, i])


@kernel
def _mix_in_embedding(thread: int, threads: int, layer: int, tokens: int, weights: Weights, memory: Memory) -> None:
    """Scale the residual stream, and add the embedding that it began as."""
    keeps, adds = weights.residual_scales[layer, 0], weights.residual_scales[layer, 1]
    begin, end = share(memory.x.shape[1], thread, threads)
    for t in range(tokens):
        for i in range(begin, end):
            if layer == 0:
                memory.embedding[t, i] = memory.x[t, i]
            memory.x[t, i] = memory.x[t, i] * keeps + memory.embedding[t, i] * adds


@kernel
def _place_all(
    thread: int,
    threads: int,
    layer: int,
    shape: Shape,
    weights: Weights,
    memory: Memory,
    normal: Operands,
    now: Tokens,
    keys: Any,
    values: Any,
) -> None:
    """Normalise and turn queries and keys, add value embeddings to values, and write keys and values to the cache."""
    width, group, table = shape.head_dim, shape.heads // shape.kv_heads, weights.value_table[layer]
    tokens = now.counts[0]
    begin, end = share(tokens * shape.kv_heads, thread, threads)
    for task in range(begin, end):
        head, t = task // tokens, task % tokens
        place_in_row, qkv = now.positions[t], memory.qkv[t]
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
                opening += weights.value_gates[table, head, i] * normal.rows[t, i]
            opening = np.float32(2.0) / (np.float32(1.0) + exponential(-opening))
            for i in range(width):
                value[i] += opening * now.value_rows[table, t, head * width + i]
        keep(key, keys[layer, now.rows[t], head, place_in_row])
        keep(value, values[layer, now.rows[t], head, place_in_row])


@kernel
def _attend_all(
    thread: int,
    threads: int,
    layer: int,
    shape: Shape,
    weights: Weights,
    memory: Memory,
    now: Tokens,
    keys: Any,
    values: Any,
) -> None:
    """The attention of every head and token, of which a window reads no more than the window."""
    width, group, window = shape.head_dim, shape.heads // shape.kv_heads, weights.windows[layer]
    tokens = now.counts[0]
    begin, end = share(tokens * shape.heads, thread, threads)
    for task in range(begin, end):
        head, t = task // tokens, task % tokens
        after = now.positions[t] + 1
        seen_keys, seen_values = keys[layer, now.rows[t], head // group], values[layer, now.rows[t], head // group]
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
def _widen(
    thread: int,
    threads: int,
    layer: int,
    tokens: int,
    shape: Shape,
    weights: Weights,
    memory: Memory,
    normal: Operands,
) -> None:
    """The products of the first half of the feed-forward layer."""
    rows, kind, queues = shape.d_ff, weights.kind, memory.queues
    up_bias = weights.up_bias[layer]
    if memory.gate.size:
        matrix, bias, out = weights.matrices[layer, GATE], up_bias[rows:], memory.gate
        multiply(thread, threads, queues[GATE], kind, matrix, bias, normal, tokens, out, 0, rows, False)
    matrix, bias, out = weights.matrices[layer, UP], up_bias[:rows], memory.hidden.rows
    multiply(thread, threads, queues[UP], kind, matrix, bias, normal, tokens, out, 0, rows, False)


@kernel
def _activate_all(thread: int, threads: int, tokens: int, shape: Shape, memory: Memory) -> None:
    """The activation of the feed-forward layer."""
    hidden, gated = memory.hidden.rows, memory.gate.size > 0
    begin, end = share(shape.d_ff, thread, threads)
    for t in range(tokens):
        activate(hidden[t], memory.gate[t] if gated else hidden[t], begin, end, shape.activation)
