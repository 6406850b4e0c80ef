"""Greedy generation by a small decoder over a paged FP8 cache; token for token that of the same model without a cache.

One function serves prompts of any lengths and single tokens: queries are packed, and a call appends what it is given.
The model has random weights. Keys and values are rounded to FP8 in either case.
"""

import jax
import jax.numpy as jnp
import numpy as np

import jax_flash

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 512, 256, 3, 8, 2, 64
PAGE_SIZE, PAGES, NEW_TOKENS = 16, 5, 24
CAPACITY = PAGE_SIZE * PAGES  # of a sequence
PROMPT_LENGTHS = (19, 3, 37)
FP8 = jnp.float8_e4m3fn
DESCALE = jnp.float32(1 / 32)  # what one unit of a stored key or value is worth

angles = np.arange(CAPACITY)[:, None] * 10000.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
COS, SIN = jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def random_weights(key):
    shapes = {
        "qkv": (WIDTH, HEADS + 2 * KV_HEADS, HEAD_DIM),
        "out": (HEADS, HEAD_DIM, WIDTH),
        "up": (WIDTH, 4 * WIDTH),
        "down": (4 * WIDTH, WIDTH),
    }
    keys = iter(jax.random.split(key, 2 + LAYERS * len(shapes)))
    layers = [{n: 0.1 * jax.random.normal(next(keys), s) for n, s in shapes.items()} for _ in range(LAYERS)]
    embedding, unembedding = (jax.random.normal(next(keys), (VOCABULARY, WIDTH)) for _ in range(2))
    return embedding, layers, unembedding


def logits(weights, tokens, attend):
    """Of each token, (.., VOCABULARY); `attend(i, q, k, v)` is the attention of layer i."""
    embedding, layers, unembedding = weights
    x = embedding[tokens]
    for i, layer in enumerate(layers):
        qkv = jnp.einsum("...w,whd->...hd", normalised(x), layer["qkv"], precision="highest").astype(jnp.bfloat16)
        out = attend(i, *jnp.split(qkv, (HEADS, HEADS + KV_HEADS), axis=-2)).astype(jnp.float32)
        x += jnp.einsum("...hd,hdw->...w", out, layer["out"], precision="highest")
        hidden = jax.nn.gelu(jnp.matmul(normalised(x), layer["up"], precision="highest"))
        x += jnp.matmul(hidden, layer["down"], precision="highest")
    return jnp.matmul(normalised(x), unembedding.T, precision="highest")


def normalised(x):
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


# With a cache: (LAYERS, 2, pages of all sequences, PAGE_SIZE, KV_HEADS, HEAD_DIM), for keys and values.


def next_tokens(weights, caches, page_table, cache_seqlens, tokens, cu_seqlens):
    """Appends packed tokens to their sequences; the most likely next token of each, and the caches."""
    caches = list(caches)

    def attend(i, q, k, v):
        out, *caches[i] = jax_flash.attention_with_kv_cache(
            q,
            *caches[i],
            k,
            v,
            cache_seqlens=cache_seqlens,
            page_table=page_table,
            cu_seqlens_q=cu_seqlens,
            rotary_cos=COS,
            rotary_sin=SIN,
            k_descale=DESCALE,
            v_descale=DESCALE,
        )
        return out

    last = logits(weights, tokens, attend)[cu_seqlens[1:] - 1]
    return jnp.argmax(last, -1).astype(jnp.int32), tuple(map(tuple, caches))


@jax.jit
def generate(weights, caches, page_table, prompts, cu_seqlens):
    """NEW_TOKENS tokens behind each packed prompt, (sequences, NEW_TOKENS)."""
    sequences = len(page_table)
    lengths = jnp.diff(cu_seqlens)
    tokens, caches = next_tokens(weights, caches, page_table, jnp.zeros_like(lengths), prompts, cu_seqlens)

    def step(carry, _):
        tokens, lengths, caches = carry
        one_each = jnp.arange(sequences + 1, dtype=jnp.int32)
        following, caches = next_tokens(weights, caches, page_table, lengths, tokens, one_each)
        return (following, lengths + 1, caches), tokens

    _, tokens = jax.lax.scan(step, (tokens, lengths, caches), length=NEW_TOKENS)
    return tokens.T


# Without one: all tokens of all sequences again for each new token.


@jax.jit
def next_tokens_without_cache(weights, tokens, lengths):
    """The most likely next token of sequences (B, CAPACITY), of which `lengths` tokens count."""

    def rotated(x):
        x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = COS[:, None], SIN[:, None]
        return jnp.concatenate([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1)

    def attend(i, q, k, v):
        k8, v8 = (jnp.clip(x.astype(jnp.float32) / DESCALE, -448, 448).astype(FP8) for x in (rotated(k), v))
        q = rotated(q).astype(q.dtype)
        return jax_flash.attention(
            q, k8, v8, causal=True, seqused_q=lengths, seqused_k=lengths, k_descale=DESCALE, v_descale=DESCALE
        )

    last = jnp.take_along_axis(logits(weights, tokens, attend), lengths[:, None, None] - 1, axis=1)[:, 0]
    return jnp.argmax(last, -1).astype(jnp.int32)


weights = random_weights(jax.random.key(0))
sequences = len(PROMPT_LENGTHS)
prompts = [np.random.default_rng(i).integers(0, VOCABULARY, n) for i, n in enumerate(PROMPT_LENGTHS)]
cu_seqlens = jnp.asarray(np.cumsum([0, *PROMPT_LENGTHS]), jnp.int32)
page_table = np.random.default_rng(9).permutation(sequences * PAGES).reshape(sequences, PAGES).astype(np.int32)
pool = (sequences * PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM)
caches = tuple((jnp.zeros(pool, FP8), jnp.zeros(pool, FP8)) for _ in range(LAYERS))
generated = generate(weights, caches, page_table, jnp.asarray(np.concatenate(prompts), jnp.int32), cu_seqlens)

expected = np.zeros((sequences, CAPACITY), np.int32)
lengths = np.array(PROMPT_LENGTHS, np.int32)
for row, prompt in zip(expected, prompts, strict=True):
    row[: len(prompt)] = prompt
for _ in range(NEW_TOKENS):
    expected[np.arange(sequences), lengths] = next_tokens_without_cache(weights, expected, lengths)
    lengths += 1
expected = np.stack([row[n : n + NEW_TOKENS] for row, n in zip(expected, PROMPT_LENGTHS, strict=True)])

different = int((np.asarray(generated) != expected).sum())
print(f"{sequences} sequences on {generated.device.device_kind}, beginning with {generated[:, :6].tolist()}:")
print(f"{different} of {generated.size} tokens differ from the reference, the same model without a cache")
assert different == 0
