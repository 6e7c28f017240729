"""A small T5 encoder that knows English words: distilled from WordLlama.

    pip install -e ".[demo]"
    python demo/make_t5.py data/train demo/t5         # 3 minutes on two cores

A language model learns that "speedy" is like "fast", and a "fiddle" like a "violin". WordLlama
(Miller, 2024; MIT licence) keeps that as a vector a word, taken out of Llama 2; the vectors come
inside its package. Here each token of a text learns to predict the vector of its word, through a
matrix that is thrown away afterwards. The texts are the captions, with words replaced at random by
any of the 30,000 most frequent English words (wordfreq, Speer 2022), and such words in a row. So a
prompt may use words that no caption has.
"""

import functools
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
import wordfreq
import wordllama

sys.path.insert(0, str(Path(__file__).parent.parent))
import t5_encoder
import train

WORDS, LENGTH, BATCH = 30_000, 20, 64


def make_tokenizer(words, texts, size: int) -> sentencepiece.SentencePieceProcessor:
    """A word comes the more often, the more frequent it is (1 / sqrt(rank)), so that the frequent
    ones are one piece."""
    lines = [word for rank, word in enumerate(words)
             for _ in range(max(1, round(300 / (rank + 1) ** 0.5)))]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*lines, *texts]), model_writer=model, model_type="unigram",
        vocab_size=size, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=True,
        num_threads=1, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def draw_text(rng, words, cumulative, texts) -> list[str]:
    """A caption as words, some of them replaced; or, every other time, words in a row."""
    draw = lambda n: [words[i] for i in np.searchsorted(cumulative, rng.random(n))]
    if rng.random() < 0.5:
        return draw(rng.integers(1, 8))
    text, replaced = texts[rng.integers(len(texts))].split(), rng.random() * 0.7
    return [word if rng.random() > replaced else other
            for word, other in zip(text, draw(len(text)))]


def draw_batch(rng, tokenizer, vector_of, draw):
    """ids (B, L), mask (B, L), and the vector of each token's word (B, L, 256): zeros for padding
    and </s>."""
    ids, targets = np.zeros((BATCH, LENGTH), np.int32), np.zeros((BATCH, LENGTH, 256), np.float32)
    for row in range(BATCH):
        at = 0
        for word in draw(rng):
            pieces = tokenizer.encode(word)[: LENGTH - 1 - at]
            ids[row, at : at + len(pieces)] = pieces
            targets[row, at : at + len(pieces)] = vector_of(word)
            at += len(pieces)
        ids[row, at] = tokenizer.eos_id()
    return ids, ids != tokenizer.pad_id(), targets


@functools.partial(jax.jit, static_argnames=("config", "tx"))
def step(weights, opt, config, tx, ids, mask, targets):
    def loss(weights):
        y = t5_encoder.t5_encoder(weights["t5"], config, ids, mask) @ weights["head"]  # (B, L, 256)
        known = jnp.abs(targets).sum(axis=-1) > 0
        cosine = jnp.sum(y * targets, axis=-1) / (jnp.linalg.norm(y, axis=-1) + 1e-6)
        return jnp.sum((1 - cosine) * known) / known.sum()

    value, grads = jax.value_and_grad(loss)(weights)
    updates, opt = tx.update(grads, opt)
    return optax.apply_updates(weights, updates), opt, value


def parse_args():
    parser = train.new_parser("make_t5.py", __doc__)
    parser.add_argument("data", type=Path, help="a folder with captions.jsonl")
    parser.add_argument("out", type=Path, help="the T5 folder to make")
    parser.add_argument("--steps", type=train.count, default=4000)
    return parser.parse_args()


def make(args):
    tracks = train.read_tracks(args.data, needs_text=True)
    texts = sorted({text for track in tracks for text in track.long + (", ".join(track.short),)})
    words = [word for word in wordfreq.top_n_list("en", WORDS) if word.isalpha() and word.isascii()]
    cumulative = np.cumsum(1 / np.arange(10, len(words) + 10) ** 0.5)
    cumulative /= cumulative[-1]
    draw = functools.partial(draw_text, words=words, cumulative=cumulative, texts=texts)

    inside = Path(wordllama.__file__).parent
    teacher = wordllama.WordLlama.load(cache_dir=inside, disable_download=True)
    bare = lambda word: "".join(c for c in word.lower() if c.isalpha() or c == "-") or word
    vector_of = functools.cache(lambda word: teacher.embed([bare(word)], norm=True)[0])

    t5 = t5_encoder.random_t5([], seed=0, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4)
    tokenizer = make_tokenizer(words, texts, 8000)
    embed = 0.1 * jax.random.normal(jax.random.key(1), (tokenizer.get_piece_size(), 128))
    config = replace(t5.config, vocab_size=tokenizer.get_piece_size())
    head = jax.random.normal(jax.random.key(2), (128, 256)) / 128**0.5
    weights = {"t5": {**t5.params, "embed": embed}, "head": head}
    tx = optax.adam(optax.warmup_cosine_decay_schedule(
        0, 3e-3, min(100, args.steps // 2), args.steps))
    opt, rng, losses, begin = tx.init(weights), np.random.default_rng(0), [], time.monotonic()
    for n in range(1, args.steps + 1):
        batch = draw_batch(rng, tokenizer, vector_of, draw)
        weights, opt, loss = step(weights, opt, config, tx, *batch)
        losses.append(loss)
        if n % 100 == 0:
            print(f"step {n}/{args.steps}  1 - cosine {float(np.mean(losses[-100:])):.4f}  "
                  f"{time.monotonic() - begin:.0f} s", flush=True)
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights["t5"])
    t5_encoder.save_t5(args.out, t5_encoder.T5(config, params, tokenizer))
    print(f"{args.out}: {sum(a.size for a in jax.tree.leaves(params)) / 1e6:.1f} M parameters")


if __name__ == "__main__":
    train.run_command(make, parse_args())
