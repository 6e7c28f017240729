"""Train any of the five models of Noise2Music (Secs. 3.6 and 4.1) on a folder of captioned audio.

    python train.py waveform_generator --tiny --overfit song.ogg --out overfit   # try this first
    python train.py waveform_generator --tiny --data music --t5 demo/t5 --out runs
    python train.py waveform_generator --data music --t5 t5-v1_1-xl --out paper  # its sizes

The data folder holds audio that libsndfile reads (wav, flac, ogg, mp3, ...; any rate, any channels,
any length) and either `captions.jsonl`, a JSON object a line,

    {"audio": "jazz/one.flac", "long": ["A slow piano ballad.", ...], "short": ["jazz", "piano"]}

(with `"start": 30` it captions the 30 s from there, otherwise the whole track; a "title" and "tags"
are read as short captions), or, beside each `one.flac`, a `one.txt` with a long caption a line.
`python tools/label.py --help` says how music without captions gets them. OUT/MODEL gets
checkpoints (the last two are kept), `log.jsonl` and, with --sample-every or --overfit, samples.
Where no T5 is named, OUT/t5 gets a random one. `sample.py --models OUT` reads them from there.
`--data music library` mixes two folders, `--data music:97 library:3` in these shares.
"""

import argparse
import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
import warnings
import wave
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, asdict, fields, replace
from datetime import timedelta
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import noise2music as n2m
import t5_encoder
from t5_encoder import check, naming, own_part, parse_json, read_lines, regular, whole_file

# ---- The data set (Secs. 3.6 and 4.1) ----

CLIP_SECONDS, CLIPS_PER_TRACK = 30, 6  # Sec. 3.6: "we extract six non-overlapping 30-second clips"
AUDIO = set(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .au .caf .w64 .rf64".split())
THREADS = os.cpu_count() or 1  # that decode
CACHE = 4 * 2**30  # bytes of decoded audio
MAX_SEED = 2**31 - 1  # of a larger one JAX would read the lower 32 bits
LOUDEST = 10  # times full scale; what is above is integers, or damage
WAITS = 0.5, 1, 2, 4, 8  # seconds between tries of what the system cannot read now


class Track(NamedTuple):
    path: Path
    long: tuple[str, ...] = ()  # captions that each stand alone
    short: tuple[str, ...] = ()  # tags that are joined
    start: float | None = None  # seconds; of the one clip that they caption


class Clip(NamedTuple):
    track: Track
    start: float  # seconds into the track
    seconds: float  # 30, or less where the track is shorter
    folder: int = 0  # which --data it is of


class Example(NamedTuple):
    audio: np.ndarray  # (samples,) at the model's audio_rate
    text: str


def parse_caption(folder: Path, line: str, needs_text: bool) -> Track:
    """A line of captions.jsonl, or a ValueError that says what is wrong with it."""
    entry = parse_json(line)
    check(isinstance(entry, dict) and isinstance(entry.get("audio"), str),
          'not an object with an "audio" path')
    start, texts = entry.get("start"), {}
    check(start is None or type(start) in (int, float) and 0 <= start < math.inf,
          '"start" is not a number of seconds')
    for key in ("long", "title", "tags", "short"):
        value = entry.get(key, [])
        value = [value] if isinstance(value, str) else value
        check(isinstance(value, list) and all(isinstance(text, str) for text in value),
              f'"{key}" is not a list of strings')
        texts[key] = tuple(text.strip() for text in value if text.strip())
    # Sec. 3.6: title, tags, pseudo labels. choice: title and tags are short prompts.
    short = texts["title"] + texts["tags"] + texts["short"]
    track = Track(regular(folder / entry["audio"]), texts["long"], short, start)
    check(track.long or short or not needs_text, f"{entry['audio']}: no caption")
    return track


def read_tracks(folder: Path, needs_text: bool, manifest: str = "captions.jsonl") -> list[Track]:
    """The captioned tracks of a data folder. What is wrong with one is reported, and it skipped."""
    check(folder.is_dir(), f"{folder}: no such folder; give one of audio and captions (see --help)")
    path = folder / manifest
    if os.path.lexists(path):
        lines = [(f"{path}:{n}", line) for n, line in enumerate(read_lines(path), 1)
                 if line.strip()]
        parse = lambda line: parse_caption(folder, line, needs_text)
    else:  # the files that stand for the lines of a manifest
        walked = [*os.walk(folder, onerror=lambda error: warn(f"{reason(error)}; skipped"))]
        files = sorted(Path(at, name) for at, _, names in walked for name in names)
        for path in (Path(at, name) for at, below, _ in walked for name in below):
            if path.is_symlink():
                warn(f"{path}: a link to a folder; skipped")
        texts = {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt"}
        lines = [(file, file) for file in files if file.suffix.lower() in AUDIO]

        def parse(file):
            captions = read_lines(texts[stem]) if (stem := file.with_suffix("")) in texts else []
            entry = {"audio": str(file.relative_to(folder)), "long": captions}
            return parse_caption(folder, json.dumps(entry), needs_text)

    tracks = [track for track in usable(parse, lines) if track]
    check(tracks, f"{folder}: no audio with a caption; put it there, with {manifest} or .txt files")
    return tracks


def patiently(function: Callable, items: list) -> list:
    """function(item) of all items, in threads; or the ValueError or OSError that it ends with.

    What the system cannot read now (its network is away) is tried again, after each of WAITS."""

    def attempt(item):
        try:
            return function(item)
        except (OSError, ValueError) as error:
            return error

    results = [OSError()] * len(items)
    with ThreadPoolExecutor(THREADS) as pool:
        for wait in (0, *WAITS):
            again = [i for i, result in enumerate(results) if isinstance(result, OSError)]
            if again and (wait,) == WAITS[:1]:
                warn(f"{len(again)} of {len(items)} cannot be read; trying for {sum(WAITS):g} s")
            time.sleep(wait if again else 0)
            for i, result in zip(again, pool.map(attempt, [items[i] for i in again])):
                results[i] = result
    return results


def usable(function: Callable, named: list, skipped=(ValueError, OSError)) -> list:
    """function(item) of all (name, item); None, and a warning, where it ends with a `skipped`."""
    results = patiently(function, [item for _, item in named])
    for i, (name, _) in enumerate(named):
        if isinstance(results[i], OSError):  # a failing disk does not say where
            results[i].filename = results[i].filename or str(name)
        if isinstance(results[i], skipped):
            warn(f"{name}: {reason(results[i], name):.300}; skipped")
            results[i] = None
        elif isinstance(results[i], OSError):
            raise results[i]
    if (bad := sum(result is None for result in results)) > 1:
        warn(f"skipped {bad} of {len(named)}")
    return results


@contextlib.contextmanager
def open_audio(path: Path):
    """The file as libsndfile opens it: ValueError where its content is bad, OSError if the system
    cannot read it now."""
    with open(regular(path), "rb") as bytes_of:
        try:
            with soundfile.SoundFile(os.fsencode(path)) as file:
                check(file.samplerate <= 10**6, f"has a rate of {file.samplerate} Hz")
                if file.frames > 2**13 * os.stat(path).st_size:  # more than FLAC makes of silence:
                    file.seekable = lambda: False  # no header to believe, or to seek by
                yield file
        except (soundfile.LibsndfileError, TypeError, ValueError) as error:
            os.stat(path)  # an OSError, if the file was away when libsndfile opened it again,
            while bytes_of.read(2**20):
                pass  # or if it cannot be read
            raise ValueError(f"{path}: {getattr(error, 'error_string', error)}") from None


def duration_of(path: Path) -> float:
    """Seconds of audio in a file."""
    with open_audio(path) as file:
        decoded = iter(lambda: len(file.read(2**16)), 0)
        return (file.frames if file.seekable() else sum(decoded)) / file.samplerate


def track_clips(track: Track, most: int = CLIPS_PER_TRACK) -> list[Clip]:
    """Sec. 3.6: up to six clips that do not overlap. choice: spread evenly; of short tracks one."""
    duration, start = duration_of(track.path), track.start or 0
    check(duration > start, f"{track.path}: has no audio {f'at {start} s' if start else 'in it'}")
    if track.start is not None:
        return [Clip(track, start, min(duration - start, CLIP_SECONDS))]
    n = int(np.clip(duration // CLIP_SECONDS, 1, most))
    return [Clip(track, k * duration / n, min(duration, CLIP_SECONDS)) for k in range(n)]


def find_clips(tracks: list[Track], most: int = CLIPS_PER_TRACK) -> list[Clip]:
    """The clips of all tracks, by their headers. What cannot be opened is reported and skipped."""
    clips = usable(lambda track: track_clips(track, most), [(t.path, t) for t in tracks])
    check(any(clips), f"{tracks[0].path}: this and all other audio files are unusable")
    return [clip for of_track in clips for clip in of_track or []]


def load_audio(path: Path, start: float, seconds: float, rate: int) -> np.ndarray:
    """`seconds` of a file, mono at `rate` Hz, filled up with silence: float32 (seconds * rate,)."""
    check(round(seconds * rate), f"has no sample at {rate} Hz there")
    with open_audio(path) as file:
        first = min(round(start * file.samplerate), file.frames)
        if file.seekable():
            file.seek(first)
        while left := first - file.tell():
            check(len(file.read(min(left, 2**16))), "is cut off")
        wanted = min(round(seconds * file.samplerate), file.frames - first)
        audio = file.read(wanted, dtype="float32", always_2d=True)
        check(len(audio) >= max(1, wanted - file.samplerate // 10),
              "is cut off, or has no audio in it")
        check(np.abs(audio).max() <= LOUDEST,
              f"holds samples that are not numbers, or over {LOUDEST} times full scale")
        audio = audio.mean(axis=1)  # choice: mono
        audio = np.pad(audio, (0, round(seconds * file.samplerate) - len(audio)))
    return n2m.fft_resample(audio, round(seconds * rate), np)


def load_clips(clips: list[Clip], rate: int) -> list[np.ndarray | None]:
    """`load_audio` of clips, or None where its content is bad; OSError if the system cannot
    read one, whose place no other clip takes."""
    load = lambda clip: load_audio(clip.track.path, clip.start, clip.seconds, rate)
    return usable(load, [(clip.track.path, clip) for clip in clips], ValueError)


def text_batch(track: Track, token_length: int, count_tokens: Callable) -> list[str]:
    """Sec. 4.1: the long prompts; and the short ones, "concatenated, then segmented into a set
    token length". choice: joined by ", ", segmented between tags. choice: longer ones are cut."""
    segments = []
    for tag in track.short:
        joined = f"{segments[-1]}, {tag}" if segments else tag
        if segments and count_tokens(joined) < token_length:  # one token is </s>
            segments[-1] = joined
        else:
            segments.append(tag)
    return [*track.long, *segments]


def mixed_clips(data: list, folders: list[list[Track]]) -> list[Clip]:
    """The clips of all --data. Of several folders it prints their shares of the examples."""
    found = [find_clips(tracks) for tracks in folders]
    shares = np.array([weight or len(clips) for (_, weight), clips in zip(data, found)])
    for (path, _), clips, share in zip(data, found, shares / shares.sum()):
        if len(data) > 1:
            print(f"{path}: {len(clips)} clips, {share:.2%} of the examples")
    return [clip._replace(folder=k) for k, clips in enumerate(found) for clip in clips]


def epoch_order(clips: list[Clip], weights: list[float], seed: int, epoch: int) -> np.ndarray:
    """The clips of an epoch, by their numbers, shuffled. choice: each once, also where folders are
    mixed (Sec. 3.6). Or, given weights, each folder has its share, of 10,000 clips at least, and at
    the end of an epoch all of its clips have come equally often, to one."""
    rng, parts = np.random.default_rng([seed, epoch]), []
    if not weights:
        return rng.permutation(len(clips))
    folders, size = np.array([clip.folder for clip in clips]), max(len(clips), 10_000)
    for k, weight in enumerate(weights):
        own, n = np.flatnonzero(folders == k), max(1, round(size * weight / sum(weights)))
        first, start = divmod(epoch * n, len(own))  # the round of this folder, the place in it
        rounds = [np.random.default_rng([seed, 2, k, first + i]).permutation(own)
                  for i in range(-(-(start + n) // len(own)))]
        parts.append(np.concatenate(rounds)[start : start + n])
    return rng.permutation(np.concatenate(parts))


def example_maker(clips: list[Clip], model: n2m.Model, seed: int, count_tokens=None,
                  weights=()) -> Callable:
    """index -> Example, a function of the seed and the index alone, so that a run resumes exactly.

    Without `count_tokens` examples have no text."""
    c, clip_bytes = model.training, 4 * model.audio_rate * np.mean([clip.seconds for clip in clips])
    samples = round(c.seconds * model.audio_rate)
    texts_of = cache(lambda track: text_batch(track, c.token_length, count_tokens))
    order = lru_cache(2)(partial(epoch_order, clips, weights, seed))
    size = len(order(0))

    @lru_cache(int(CACHE / clip_bytes))  # a small data set is decoded once
    def audio_or_none(clip):
        return load_clips([clip], model.audio_rate)[0]

    def example(index):
        rng, (epoch, i) = np.random.default_rng([seed, 1, index]), divmod(index, size)
        for k in range(100):  # others take the place of what cannot be decoded
            clip = clips[rng.integers(len(clips)) if k else order(epoch)[i]]
            if (audio := audio_or_none(clip)) is not None:
                break
        if audio is None:  # an OSError, so that the run is saved
            raise OSError(errno.EIO, "it and 99 others cannot be decoded", str(clip.track.path))
        # Sec. 4.1: "the entire 30-second representation" for the generators, "randomly sampled
        # snippets" for the rest. choice: silence where a file is shorter.
        start = rng.integers(max(len(audio) - samples, 0) + 1)
        audio = audio[start : start + samples]
        audio = np.pad(audio, (0, samples - len(audio)))
        texts = count_tokens and texts_of(clip.track) or [""]
        # Sec. 4.1: "a random element of the corresponding text batch".
        return Example(audio, texts[rng.integers(len(texts))])

    return example


def batches(example: Callable, rows: list[int], batch_size: int, index: int, ahead: int = 4):
    """Lists of the examples index + rows, of the same rows of the next batch, ..., made ahead."""
    pool, queue = ThreadPoolExecutor(THREADS), deque()
    try:
        for first in itertools.count(index, batch_size):
            queue.append(pool.map(example, [first + row for row in rows]))
            if len(queue) > ahead:
                yield list(queue.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def make_batch(examples: list[Example], model: n2m.Model, encode: Callable | None) -> n2m.Batch:
    """The one place where examples become what the loss takes."""
    condition = n2m.Condition()
    if n2m.uses_text(model):
        text, mask = encode([e.text for e in examples], model.training.token_length)
        condition = condition._replace(text=text, text_mask=mask)  # (B, L, E), (B, L)
    return n2m.Batch(np.stack([e.audio for e in examples]), condition)  # (B, samples)


# ---- The step (Sec. 4.1) ----

class State(NamedTuple):
    params: dict
    ema: dict
    opt: optax.OptState
    step: jax.Array


def optimizer(c: n2m.TrainingConfig):
    """Sec. 4.1: Adam; 10k warm-up steps to 1e-4, then a cosine to 2.5 M. choice: it ends at 0."""
    rate = optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, c.warmup_steps, c.decay_steps)
    return optax.adam(rate, c.beta1, c.beta2)


def init_state(model: n2m.Model, seed: int, params=None) -> State:
    params = n2m.init_params(jax.random.key(seed), model.unet) if params is None else params
    ema = jax.tree.map(jnp.copy, params)  # a copy, since `update` gives the state's memory away
    return State(params, ema, optimizer(model.training).init(params), jnp.zeros((), jnp.int32))


@partial(jax.jit, static_argnames="model")
def gradients(params, model: n2m.Model, key, batch: n2m.Batch):
    """Gradients of the mean of Eq. 1 over a batch, and what is logged of it: losses, t (B,)."""

    def mean_loss(params):
        losses, t = n2m.diffusion_loss(params, model, key, batch)
        return losses.mean(), (n2m.constrain(losses), n2m.constrain(t))  # whole, to be logged

    grads, logged = jax.grad(mean_loss, has_aux=True)(params)
    return on_mesh(grads, lambda mesh: n2m.shardings(model.unet, mesh, 1)), logged


@partial(jax.jit, static_argnames="model", donate_argnames="state")
def update(state: State, model: n2m.Model, grads):
    """Sec. 4.1: a step of Adam and of the EMA. Returns the unclipped norm of the gradients too."""
    c, n = model.training, state.step
    norm = optax.tree.norm(grads)
    if c.clip_norm:  # for small batches, whose rare large gradients would set Adam's pace
        grads = jax.tree.map(lambda g: g * jnp.minimum(1, c.clip_norm / norm), grads)
    updates, opt = optimizer(c).update(grads, state.opt)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(c.ema, (1 + n) / (10 + n))  # departs: Sec. 4.1 has 0.9999
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    state = on_mesh(State(params, ema, opt, n + 1), partial(state_layout, model))
    return state, norm


average = jax.jit(optax.incremental_update, donate_argnums=1)  # (new, old, s): s new + (1 - s) old


def train_step(state: State, model: n2m.Model, seed: int, batch, accumulate: int = 1, mesh=None):
    """One step on a batch in `accumulate` equal parts. Returns state, losses (B,), t (B,), norm.

    Where a mesh is set, it is given too, and the batch is the `process_rows` of this process."""
    key, logged, mean = jax.random.fold_in(jax.random.key(seed), state.step), [], None
    for k in range(accumulate):  # on a CPU, gradients are 50 times slower inside lax.scan
        part = jax.tree.map(lambda a: np.split(a, accumulate)[k], batch)
        if mesh:
            rows = NamedSharding(mesh, PartitionSpec("data"))
            part = jax.tree.map(partial(jax.make_array_from_process_local_data, rows), part)
        grads, aux = gradients(state.params, model, jax.random.fold_in(key, k), part)
        mean = average(grads, mean, 1 / (k + 1)) if k else grads
        logged.append(aux)
    state, norm = update(state, model, mean)
    return state, *map(jnp.concatenate, zip(*logged)), norm


# ---- Devices and processes (Sec. 4.1 trains with batches of 2048 and 4096) ----

def join_processes(args):
    """Makes this process one of --processes, each with its own devices, that train together."""
    if args.processes > 1:
        address = f"--coordinator {args.coordinator or ''}".strip()
        check(re.search(r".:\d+$", args.coordinator or "h:1"), f"{address}: is not HOST:PORT")
        number = "this process" if args.process is None else f"process {args.process}"
        print(f"{number} waits for the others", flush=True)
        silence = lambda: (warn(f"{address}: not all processes are there in a minute"), os._exit(2))
        (timer := threading.Timer(60, silence)).start()  # JAX's own end is a stack trace
        try:
            jax.distributed.initialize(args.coordinator, args.processes, args.process,
                                       heartbeat_timeout_seconds=30, initialization_timeout=90)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{address}: {str(error).splitlines()[0]}") from None
        finally:
            timer.cancel()
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))  # which JAX has just taken
        any_process(True)  # all are here now: on CPUs the first collective waits for just 30 s
    if jax.process_index():  # one process speaks; warnings come from each
        sys.stdout = open(os.devnull, "w", errors="replace")


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process. All ask, and wait here for each other."""
    return multihost_utils.process_allgather(np.array(flag)).any()


def process_rows(batch_size: int, accumulate: int) -> list[int]:
    """The rows of a batch that this process reads, its share of each part: together, the batch."""
    rows = np.arange(batch_size).reshape(accumulate, jax.process_count(), -1)
    return rows[:, jax.process_index()].ravel().tolist()


def default_parts(batch_size: int, mesh) -> int:
    """The fewest parts of a batch that leave a device at most 8 clips. choice: 8, as TPUs want."""
    each = max(1, batch_size // mesh.shape["data"])
    return next(n for n in range(1, each + 1) if each % n == 0 and each // n <= 8)


def mesh_and_parts(args, batch_size: int, before: int | None = None):
    """All devices as a mesh, and the number of parts of a batch. Each part has noise of its own: a
    resumed run has as many as `before`, on any number of devices."""
    mesh, local = n2m.make_mesh(args.model_parallel), jax.local_device_count()
    check(local % args.model_parallel == 0,
          f"--model-parallel {args.model_parallel} does not divide a process's {local} devices")
    across = mesh.shape["data"]
    parts = args.accumulate or before or default_parts(batch_size, mesh)
    check(batch_size % (parts * across) == 0, f"a batch of {batch_size} does not divide into "
          f"{parts} parts for {across} groups of devices; choose --batch-size or --accumulate")
    return mesh, parts


def state_layout(model: n2m.Model, mesh) -> State:
    """How a State lies on a mesh: parameters by SHARDING's first column, the rest by its second."""
    now, rest = n2m.shardings(model.unet, mesh, 0), n2m.shardings(model.unet, mesh, 1)
    whole = NamedSharding(mesh, PartitionSpec())
    adam, *others = jax.eval_shape(partial(init_state, model, 0)).opt
    adam = adam._replace(count=whole, mu=rest, nu=rest)
    return State(now, rest, (adam, *jax.tree.map(lambda _: whole, others)), whole)


def on_mesh(tree, layout: Callable):
    """Inside jit: `tree`, laid out as layout(mesh) says where a mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, layout(mesh))


def place(tree, layout):
    """The arrays of a tree, the same in every process, on the devices of all of them."""
    put = lambda a, s: jax.make_array_from_callback(a.shape, s, np.asarray(a).__getitem__)
    return jax.tree.map(put, tree, layout)


# The arrays of a tree, of which all processes hold parts, whole and on the host. All ask.
gather = partial(multihost_utils.process_allgather, tiled=True)


# ---- Checkpoints: one safetensors file each ----

def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"checkpoint-{'[0-9]' * 8}.safetensors"))


def flatten(tree) -> dict:
    """{name: leaf} in the order of a tree: "params/down/0/resample/w", ..."""
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def write_checkpoint(path: Path, tensors: dict, model: n2m.Model, metadata: dict):
    texts = {key: json.dumps(value) for key, value in ({"model": asdict(model)} | metadata).items()}
    t5_encoder.write_safetensors(path, tensors, texts)


def save_checkpoint(folder: Path, state: State, model: n2m.Model, metadata: dict) -> Path:
    """Writes all that a run is, in the first process, and keeps the last two checkpoints."""
    path, state = folder / f"checkpoint-{int(state.step):08d}.safetensors", gather(state)
    if jax.process_index() == 0:
        write_checkpoint(path, flatten(state), model, metadata)
        for old in checkpoints(folder)[:-2]:
            old.unlink()
    return path


def model_from_json(text: str) -> n2m.Model:
    d = parse_json(text)
    tuples = lambda d: {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
    parts = dict(unet=n2m.UNetConfig, training=n2m.TrainingConfig, inference=n2m.InferenceConfig)
    return n2m.Model(**d | {key: part(**tuples(d[key])) for key, part in parts.items()})


def check_entries(model: n2m.Model, where):
    """ValueError unless the tables have all that a model names, as those of a fork may not."""
    for table, entries, entry in [
            ("SCHEDULES", n2m.SCHEDULES, model.training.noise_schedule),
            ("LOSS_WEIGHTS", n2m.LOSS_WEIGHTS, model.training.loss_weight),
            ("SAMPLERS", n2m.SAMPLERS, model.inference.sampler),
            ("STEP_SCHEDULES", n2m.step_schedules(model), model.inference.step_schedule)]:
        check(entry in entries, f"{where}: needs {table}[{entry!r}], which is not here; add it")


def load_checkpoint(path: Path, name: str, keep=lambda tensor: True):
    """(model, {name: array}, metadata) of a checkpoint, which must be of the model `name`."""
    tensors, metadata = t5_encoder.read_safetensors(path, keep)
    try:
        model = model_from_json(metadata.pop("model"))
        metadata = {key: parse_json(value) for key, value in metadata.items()}
        check(metadata.keys() >= {"seed", "index", "t5", "t5_fingerprint"}, "incomplete")
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: not a checkpoint of this project; move it away") from None
    check(model.name == name,
          f"{path}: a checkpoint of {model.name}, not of {name}; move it to its own folder")
    check_entries(model, path)
    return model, tensors, metadata


def restore(tree, tensors: dict, prefix: str, path: Path):
    """The tensors named `prefix`... in the structure, and the types, of `tree` (of shapes)."""
    arrays = []
    for name, leaf in flatten(tree).items():
        array = tensors.get(prefix + name)
        check(array is not None and array.shape == leaf.shape, f"{path}: lacks {prefix + name} of "
              f"shape {leaf.shape}; it is of another version or model")
        arrays.append(array.astype(leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


def load_params(path: Path, name: str, raw: bool = False):
    """(model, EMA, metadata) to sample from (Sec. 4.1), or with `raw` the parameters themselves."""
    prefix = "params/" if raw else "ema/"
    model, tensors, metadata = load_checkpoint(path, name, lambda tensor: tensor.startswith(prefix))
    check(tensors or not raw, f"{path}: holds averages alone; leave --raw out")
    shapes = jax.eval_shape(lambda: n2m.init_params(jax.random.key(0), model.unet))
    return model, restore(shapes, tensors, prefix, path), metadata


def load_model(folder: Path, name: str, raw: bool = False):
    """`load_params` of a model's last checkpoint in a folder of runs."""
    found = checkpoints(folder / name)
    check(found, f"{folder / name}: no trained {name} here; train one:  "
                 f"python train.py {name} --data DIR --out {folder}")
    return load_params(found[-1], name, raw)


# ---- The run ----

class Run(NamedTuple):
    """What training goes on from. A checkpoint is a Run, but for the encoder, which it names."""
    model: n2m.Model
    state: State
    metadata: dict  # seed; index of the next example; folder and fingerprint of the encoder
    encoder: t5_encoder.TextEncoder | None  # None where the model reads no text


def new_run(args, folder: Path, captions: list[str]) -> Run:
    """Step 0 of the paper's model, of a tiny one, or of --init's, with its averages and its T5."""
    check(not checkpoints(folder),
          f"{folder}: holds checkpoints; --resume goes on from them, another --out starts anew")
    model, params, metadata = n2m.MODELS[args.model], None, {"t5": None, "t5_fingerprint": None}
    check(model.name == args.model, f"MODELS[{args.model!r}] has the name {model.name!r}")
    model = n2m.tiny(model) if args.tiny else model
    check_entries(model, f"MODELS[{args.model!r}]")
    if args.init:
        check(args.init.is_file(), f"{args.init}: --init takes a file, checkpoint-*.safetensors")
        model, params, metadata = load_params(args.init, args.model)
        metadata["t5"] = metadata["t5"] or str(args.init.resolve().parent.parent / "t5")
    metadata |= {"seed": args.seed or 0, "index": 0, "parts": None}
    model = overridden(model, args)
    mesh_and_parts(args, model.training.batch_size)  # or it is refused, before a T5 is made
    encoder, metadata = text_encoder(args, model, metadata, captions)
    if encoder:
        model = replace(model, unet=replace(model.unet, text_width=encoder.width))
    return Run(model, init_state(model, metadata["seed"], params), metadata, encoder)


def resumed_run(args, folder: Path, captions: list[str]) -> Run:
    """The run that its last checkpoint holds, with the command line's changes."""
    check(checkpoints(folder),
          f"{folder}: no checkpoint to resume from; leave --resume out to start")
    path = checkpoints(folder)[-1]
    model, tensors, metadata = load_checkpoint(path, args.model)
    check(args.seed in (None, metadata["seed"]),
          f"{path}: of seed {metadata['seed']}; leave --seed out")
    model = overridden(model, args)
    check("step" in tensors, f"{path}: holds averages alone, to sample from; --init begins a new "
          "run with them, in another --out")
    encoder, metadata = text_encoder(args, model, metadata, captions)
    state = restore(jax.eval_shape(partial(init_state, model, 0)), tensors, "", path)
    check(state.step < model.training.steps, f"{path}: at its last step already; give more --steps")
    return Run(model, state, metadata, encoder)


def overridden(model: n2m.Model, args) -> n2m.Model:
    """The model with the command line's changes."""
    given = lambda names: {k: v for k in names if (v := getattr(args, k)) is not None}
    c = replace(model.training, **given(OVERRIDES))
    check(c.warmup_steps < c.decay_steps, "--warmup-steps must be below --decay-steps")
    if c.steps > c.decay_steps:
        warn(f"from step {c.decay_steps} on the learning rate is 0; give more --decay-steps")
    return replace(model, training=c, unet=replace(model.unet, **given(["dtype", "remat"])))


def text_encoder(args, model: n2m.Model, metadata: dict, captions: list[str]):
    """Sec. 3.4: the text encoder, and metadata that names it: --t5, or what the run began with, or
    OUT/t5, which becomes a random T5 if it is not there."""
    if not n2m.uses_text(model):
        return None, metadata
    given, own = args.t5 or metadata["t5"], args.out / "t5"
    new = not given and not own.exists() and metadata["t5_fingerprint"] is None
    if new and jax.process_index() == 0:
        t5_encoder.remove_parts(args.out)
        part = own_part(own)
        try:
            t5_encoder.save_t5(part, t5_encoder.random_t5(captions, metadata["seed"]))
            part.rename(own)
            warn(f"no --t5: made a random T5 in {own}; it tells prompts apart, but knows no "
                 "English")
        except OSError:
            shutil.rmtree(part, ignore_errors=True)
            if not own.exists():  # else another model's training has just made one, for both
                raise
    any_process(True)  # the others wait for the first
    encoder = t5_encoder.load_text_encoder(given or own)
    check(metadata["t5_fingerprint"] in (None, encoder.fingerprint),
          f"{given or own}: not the text encoder that {args.model} was trained with so far; name "
          "that one with --t5")
    length, counts = model.training.token_length, [*map(encoder.count_tokens, captions)]
    if cut := sum(count >= length for count in counts):
        warn(f"{cut} of {len(captions)} captions are cut to {length - 1} tokens")
    if unknown := counts.count(0):
        warn(f"the text encoder knows no word of {unknown} of {len(captions)} captions")
    words = sorted({word for text in captions for word in words_of(text)})
    metadata = metadata | {
        "t5": given and str(Path(given).resolve()), "t5_fingerprint": encoder.fingerprint,
        "words": words if len(words) <= 5000 else None}  # sample.py remarks on others
    one = lru_cache(4096)(lambda text, length: encoder.encode([text], length))
    encode = lambda texts, length: map(np.concatenate, zip(*[one(text, length) for text in texts]))
    return encoder._replace(encode=encode), metadata


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def lock(path: Path):
    """The file, locked until it is closed or this process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+")
    try:
        with naming(path):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ValueError(f"{path.parent}: {file.read()} writes into it; stop it, or name another "
                         "folder") from None
    file.truncate(0)
    print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
    return file


def train(args, run: Run, folder: Path, clips: list[Clip], mesh, parts: int):
    """The loop: step, log, save, sample; until the last step, a signal, or a loss not finite."""
    (model, state, metadata, encoder), stop = run, []
    # The first signal saves and stops, a second just stops.
    on_signals(lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    c, step, seed, index = model.training, int(state.step), metadata["seed"], metadata["index"]
    weights = [weight for _, weight in args.data or [] if weight]
    example = example_maker(clips, model, seed, encoder and encoder.count_tokens, weights)
    batch_of = lambda examples: make_batch(examples, model, encoder and encoder.encode)
    log, first = folder / "log.jsonl", batch_of([example(0)])
    if jax.process_index() == 0:  # a killed run may have left lines of later steps
        read_log(log, lambda entry: entry["step"] <= step)
    pending, begin = [], time.monotonic()
    save = lambda: save_checkpoint(folder, state, model, metadata | {"index": index})
    try:
        print(f"training to step {c.steps}; the first step compiles", flush=True)
        for examples in batches(example, process_rows(c.batch_size, parts), c.batch_size, index):
            batch = batch_of(examples)  # outside the mesh: each process encodes its own texts
            with jax.set_mesh(mesh):
                state, *logged = train_step(state, model, seed, batch, parts, mesh)
            step, index = step + 1, index + c.batch_size
            pending.append((step, *logged))

            every = lambda n: step % n == 0
            asked = (every(args.log_every) or jax.process_count() == 1) and any_process(bool(stop))
            last = step == c.steps or asked
            saving = last or every(args.save_every)
            sampling = every(args.sample_every) or args.overfit and step == c.steps
            if saving or sampling or every(args.log_every):
                jax.block_until_ready(pending)  # steps run behind their calls
                report(pending, time.monotonic() - begin, c.steps, log)
                pending = []
            if saving:
                path = save()
            if sampling:
                preview(folder, state, model, first)
            if not pending:
                begin = time.monotonic()
            if last:
                break
    except OSError as error:  # a full disk, a file that is gone, nobody who reads stdout
        if jax.process_count() == 1:
            stop_unless_finite(pending, folder)
            with contextlib.suppress(OSError):
                save()
        raise OSError(error.errno, f"{error.strerror or error}; stopped at step {step}. "
                      f"{last_good(folder)}", error.filename) from None
    if step < c.steps:
        status = 128 + (stop or [signal.SIGTERM])[0]  # another process may have got the signal
        fail(f"stopped at step {step}, saved as {path}; --resume goes on from there", status)
    print(f"done: {path}")


def read_log(path: Path, wanted: Callable = lambda entry: True) -> list[dict]:
    """The entries of a file of JSON lines that a script of this project appends to. A last line
    that a kill has torn, and entries that are not wanted, are removed from the file."""
    lines = [line for line in read_lines(path) if line] if path.exists() else []
    if lines and lines[-1].startswith("{") and not path.read_bytes().endswith(b"\n"):
        try:
            parse_json(lines[-1])
        except ValueError:
            lines.pop()
    with t5_encoder.reading(path):
        kept = [(line, entry) for line in lines if wanted(entry := parse_json(line))]
    text = "".join(f"{line}\n" for line, _ in kept).encode()
    if path.exists() and text != path.read_bytes():
        with whole_file(path) as file:
            file.write(text)
    return [entry for _, entry in kept]


def append_log(path: Path, entry: dict):
    with naming(path), path.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def last_good(folder: Path) -> str:
    kept = [f"{path.name}; --resume goes on from it" for path in checkpoints(folder)[-1:]]
    return f"Last good checkpoint in {folder}: {(kept or ['none'])[0]}"


def stop_unless_finite(pending: list, folder: Path):
    """Stops the run where a loss or a norm is not: the checkpoints are from before that step."""
    for step, losses, _, norm in pending:
        if not (np.isfinite(losses).all() and np.isfinite(norm)):
            fail(f"step {step}: the loss or its gradient is not finite; stopped. "
                 f"{last_good(folder)}; lower the --learning-rate", 1)


def report(pending: list, seconds: float, steps: int, log: Path):
    """Prints and logs what `pending` holds, (step, losses, t, gradient norm) a step."""
    stop_unless_finite(pending, log.parent)
    numbers, losses, t, norms = map(np.stack, zip(*pending))
    # By quarter of t: one number hides that the ends differ a hundredfold.
    quarters = [losses[(t >= q / 4) & (t < (q + 1) / 4)] for q in range(4)]
    quarters = [float(q.mean()) if q.size else None for q in quarters]
    step, loss, norm, rate = int(numbers[-1]), losses.mean(), norms.mean(), losses.size / seconds
    if jax.process_index() == 0:
        append_log(log, dict(step=step, loss=float(loss), loss_by_quarter_of_t=quarters,
                             grad_norm=float(norm), clips_per_second=rate))
    quarters = " ".join("-" if q is None else f"{q:.4f}" for q in quarters)
    eta = timedelta(seconds=round((steps - step) * seconds / len(pending)))
    print(f"step {step}/{steps}  loss {loss:.4f} by t [{quarters}]  grad {norm:.3f}  "
          f"{rate:.1f} clips/s  ETA {eta}", flush=True)


def preview(folder: Path, state: State, model: n2m.Model, batch: n2m.Batch):
    """Samples the one clip of a batch in 64 steps, conditioned on itself, into a wav; prints its
    correlation with the clip."""
    params, step, audio = gather(state.ema), int(state.step), jnp.asarray(batch.audio)
    if jax.process_index():
        return
    mel, seconds = n2m.writes_log_mel(model), model.training.seconds
    truth = n2m.log_mel(audio) if mel else audio[:, :, None]  # (1, T, C)
    previous = n2m.log_mel(audio)  # (1, F, 80)
    if model.low_rate:
        previous = n2m.fft_resample(audio, round(seconds * model.low_rate))  # (1, samples)
    condition = n2m.sampling_condition(model, batch.condition, previous, seconds)
    model = replace(model, inference=replace(model.inference, steps=64))
    length, keys = n2m.padded_length(model.unet, truth.shape[1]), jax.random.key(step)[None]
    x = n2m.sample(params, model, condition, keys, length)[:, : truth.shape[1]]  # (1, T, C)
    sound, path = n2m.griffin_lim(x) if mel else x[:, :, 0], folder / f"sample-{step:08d}.wav"
    write_wav(path, np.asarray(sound[0]), model.audio_rate)
    correlation = jnp.corrcoef(x.ravel(), truth.ravel())[0, 1]
    print(f"{path}: correlation with the clip {correlation:.3f}", flush=True)


def write_wav(path: Path, audio: np.ndarray, rate: int):
    """A 16-bit wav, whole or not at all. audio (T,), clipped to [-1, 1]."""
    samples = np.rint(np.clip(audio, -1, 1) * np.float32(32767)).astype("<i2")
    with whole_file(path) as file, wave.open(file) as wav:
        wav.setparams((1, 2, rate, len(samples), "NONE", None))
        wav.writeframes(samples.tobytes())


# ---- The command line ----

def warn(message: str):
    with contextlib.suppress(OSError):  # nobody reads
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)


def fail(message: str, status: int = 2):
    warn(message)
    raise SystemExit(status)


def reason(error: Exception, path=None) -> str:
    """What an exception says, in one line and without the path again."""
    if isinstance(error, OSError) and error.strerror:
        error = f"{error.filename or 'stdout'}: {error.strerror}"
    text = str(error).replace(f"{path}: ", "") if path else str(error)
    return " ".join(text.split()).rstrip(".")


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see {prog} --help")
    return parser


def number(kind: type, low, high=math.inf) -> Callable:
    """An argparse type: a finite number from low to high."""

    def parse(text):
        value = kind(text)
        check(low <= value <= high and value < math.inf, "out of range")
        return value

    parse.__name__ = f"{kind.__name__} from {low} to {high}"  # argparse says it
    return parse


count, share = number(int, 1, 10**8 - 1), number(float, 0, 1)  # names of checkpoints: 8 digits
OVERRIDES = {  # fields of TrainingConfig that have an option each
    "steps": dict(type=count, help="training steps"),
    "batch_size": dict(type=count, help="clips a step"),
    "seconds": dict(type=number(float, 0.1, CLIP_SECONDS), help="what a step sees of a clip"),
    "learning_rate": dict(type=number(float, 1e-30), help="peak of Adam's learning rate"),
    "warmup_steps": dict(type=number(int, 0), help="linear warm-up"),
    "decay_steps": dict(type=count, help="end of the cosine"),
    "ema": dict(type=share, help="decay of the averaged parameters"),
    "occlusion": dict(type=share, help="share of prompts hidden, for guidance"),
    "clip_norm": dict(type=number(float, 1e-30), help="largest norm of a step's gradients"),
    "t_max": dict(type=share, help="noise augmentation up to this time"),
    "noise_schedule": dict(choices=n2m.SCHEDULES, help="one of " + ", ".join(n2m.SCHEDULES)),
    "loss_weight": dict(choices=n2m.LOSS_WEIGHTS, help="one of " + ", ".join(n2m.LOSS_WEIGHTS)),
}


def folder_and_weight(text: str):
    """An argparse type: (folder, weight or None) of DIR[:WEIGHT]."""
    path, _, weight = text.rpartition(":")
    if not path or os.path.isdir(text):
        return Path(text), None
    return Path(path), number(float, 1e-9, 1e9)(weight)


folder_and_weight.__name__ = "DIR:WEIGHT (a number above 0)"  # argparse says it


def parse_args(argv=None):
    parser = new_parser("train.py", __doc__)
    group = lambda title: parser.add_argument_group(title).add_argument
    one_of = lambda **need: parser.add_mutually_exclusive_group(**need).add_argument
    add, data, size = parser.add_argument, one_of(required=True), one_of()
    add("model", choices=tuple(n2m.MODELS), metavar="MODEL", help="one of " + ", ".join(n2m.MODELS))
    data("--data", type=folder_and_weight, nargs="+", metavar="DIR[:WEIGHT]", help="folders of "
         "audio and captions, mixed: each clip as often, or by weight: music:97 library:3")
    data("--overfit", type=Path, metavar="FILE", help="memorise one clip: the first thing to try")
    add("--out", type=Path, required=True, metavar="RUNS", help="this run goes into RUNS/MODEL")
    size("--tiny", action="store_true", help="a small variant of the model, for a CPU")
    size("--init", type=Path, metavar="FILE", help="begin with the averaged parameters, "
         "configuration and T5 of a checkpoint")
    add("--t5", metavar="DIR", help="T5 in Hugging Face's layout (default: RUNS/t5, random if new)")
    add("--seed", type=number(int, 0, MAX_SEED), help="of parameters, noise, data (default: 0)")
    add("--resume", action="store_true", help="go on from the last checkpoint, bit for bit")
    add("--bf16", dest="dtype", action="store_const", const="bfloat16", help="compute in bfloat16")
    add("--remat", action="store_const", const=True, help="save memory: compute blocks twice")
    add("--accumulate", type=count, metavar="N", help="save memory: batches in N parts (default: "
        "as few as leave a device at most 8 clips at once; with --resume, as before)")
    add("--log-every", type=count, default=20, metavar="N", help="steps to a progress line (20)")
    add("--save-every", type=count, default=500, metavar="N", help="steps to a checkpoint (500)")
    add("--sample-every", type=count, default=math.inf, metavar="N", help="steps to a wav (none)")
    many = group("many devices: one process uses all it sees; several differ in --process")
    many("--model-parallel", type=count, default=1, metavar="N",
         help="devices that share a matrix (default: 1); the rest share the batch")
    many("--processes", type=count, default=1, metavar="N", help="how many, on a shared --out")
    many("--process", type=number(int, 0), metavar="I", help="which of them this one is, from 0")
    many("--coordinator", metavar="HOST:PORT", help="where process 0 listens; a TPU pod needs none "
         "of the last three but --processes")
    override = group("overrides of Table 2 and Sec. 4.1 (or of --tiny's)")
    for field in fields(n2m.TrainingConfig):
        if option := OVERRIDES.get(field.name):
            paper = "by model" if field.default in (MISSING, 0.0) else field.default or "none"
            override("--" + field.name.replace("_", "-"), metavar="X",
                     **option | {"help": f"{option['help']} (paper: {paper})"})
    args = parser.parse_args(argv)
    if args.data and len({weight is None for _, weight in args.data}) > 1:
        parser.error("--data: give each folder a weight, or none")
    if args.init and args.resume:
        parser.error("--init begins a run; leave it out to go on with --resume")
    if args.tiny and args.model not in n2m.TINY:
        parser.error(f"--tiny: there is no small variant of {args.model} (TINY)")
    if args.processes == 1 and args.coordinator:
        parser.error("--coordinator is of several --processes; say how many")
    if (args.process or 0) >= args.processes:
        parser.error(f"--process must be below --processes {args.processes}, not {args.process}")
    return args


def run(args):
    join_processes(args)
    if args.overfit:
        check(args.overfit.is_file(), f"{args.overfit}: no such file; --overfit memorises one")
        tracks = [Track(args.overfit, (args.overfit.stem,))]
        clips = track_clips(tracks[0])
    else:
        needs_text = n2m.uses_text(n2m.MODELS[args.model])
        folders = [read_tracks(path, needs_text) for path, _ in args.data]
        for path, _ in args.data:  # samples in it would be taken for data, at a resume
            inside = args.out.resolve().is_relative_to(path.resolve())
            check(not inside or needs_text or (path / "captions.jsonl").exists(),
                  f"{args.out}: lies in {path}, all of whose audio is data; name another --out")
        tracks = [track for folder in folders for track in folder]
        clips = mixed_clips(args.data, folders)
    captions = sorted({text for track in tracks for text in track.long + track.short})
    folder = args.out / args.model
    begun = (resumed_run if args.resume else new_run)(args, folder, captions)
    model, n = begun.model, n2m.param_count(begun.model)
    if args.overfit:  # the beginning of the clip in the middle
        clip = clips[len(clips) // 2]
        clips = [clip._replace(seconds=min(clip.seconds, model.training.seconds))]
    mesh, parts = mesh_and_parts(args, model.training.batch_size, begun.metadata.get("parts"))
    print(f"{len(tracks)} tracks, {len(clips)} clips of up to {CLIP_SECONDS} s\n"
          f"{model.name}: {n / 1e6:.1f} M parameters, {n * 16 / 2**30:.2f} GiB with their average "
          f"and Adam's moments, on {mesh.size} x {jax.devices()[0].device_kind}", flush=True)
    with lock(folder / f"lock-{jax.process_index()}"):
        step = [int(begun.state.step)] if args.resume else []
        check([int(path.stem[-8:]) for path in checkpoints(folder)[-1:]] == step,
              f"{folder}: another process has just trained here")
        # The one reference to the state that each process has whole is given up here.
        begun = begun._replace(state=place(begun.state, state_layout(model, mesh)),
                               metadata=begun.metadata | {"parts": parts})
        train(args, begun, folder, clips, mesh, parts)


def on_signals(handler: Callable):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
            signal.signal(number, handler)


def keep_programs():
    """Keeps compiled programs, so that a second process compiles nothing; or says why it cannot."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    show, said = warnings.showwarning, []

    def remark(message, *args, **kwargs):  # once, of a full disk or damage, which is removed
        found = re.match(r"Error \w+ persistent .* entry for '(.*?)'", str(message))
        if not found:
            return show(message, *args, **kwargs)
        for entry in folder.glob(f"{found[1]}-*" if "reading" in found[0] else "no such"):
            entry.unlink(missing_ok=True)
        said or said.append(warn(f"{folder}: {reason(message)}"))

    try:
        home = jax.config.jax_compilation_cache_dir or Path.home() / ".cache" / "noise2music"
        if "://" in str(home):  # a bucket, into which JAX writes itself
            return
        (folder := Path(home)).mkdir(parents=True, exist_ok=True)
        (probe := own_part(folder / "probe")).touch()
        probe.unlink()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        warnings.showwarning = remark
    except (OSError, RuntimeError) as error:  # no home, or nothing can be written there
        warn(f"compiled programs are not kept: {reason(error)}")
        jax.config.update("jax_compilation_cache_dir", None)


def end(message: str, status: int = 2):
    """`fail`, for what may have happened in this process alone: of several, it ends at once, and
    not through JAX's shutdown, which would wait for the others."""
    if not jax.distributed.is_initialized():
        fail(message, status)
    warn(message)
    os._exit(status)


def run_command(run: Callable, args):
    """Runs a script's command: what its user can mend becomes one line and exit status 2."""
    on_signals(lambda n, _: end(f"stopped by {signal.Signals(n).name}", 128 + n))
    for name in ("stdout", "stderr"):  # None where it is closed
        stream = getattr(sys, name) or open(os.devnull, "w")
        stream.reconfigure(errors="backslashreplace")  # a name that it cannot show is no error
        setattr(sys, name, stream)
    jax.config.update("jax_enable_x64", False)  # whatever the environment says
    keep_programs()
    try:
        run(args)
        print(end="", flush=True)
    except (RuntimeError, MemoryError, ValueError, OSError) as error:
        # XLA's begin with a status; from a program's second call on they are ValueErrors.
        first = f"{error}\n".splitlines()[0]
        if "initialize backend" in first:
            fail(f"JAX_PLATFORMS: {first}")
        if isinstance(error, MemoryError) or first.startswith("RESOURCE_EXHAUSTED"):
            end("out of memory; less is needed in bfloat16 (--bf16), of fewer or shorter clips at "
                "once (--num, --seconds), and in training with --accumulate and --remat")
        if re.match("[A-Z_]+: ", first) and jax.distributed.is_initialized():
            end(f"process {jax.process_index()}: another process of this run has ended, so this "
                f"one ends too; start all again with --resume ({first[:80]})", 1)
        if isinstance(error, RuntimeError) or sys.flags.dev_mode:  # python -X dev shows where
            raise
        if gone := isinstance(error, BrokenPipeError):  # Python is not to try again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        end(reason(error), 128 + signal.SIGPIPE if gone else 2)


def keep_memory():
    """Freed memory stays with the process, where its C library is glibc. XLA takes one buffer for a
    step; to get it anew at every step, page by page, is a quarter of a small model's step.
    Compilation is slower by it, so sampling, which is one call, and the tests go without."""
    M_MMAP_MAX, M_TRIM_THRESHOLD, M_ARENA_MAX = -4, -1, -8  # malloc.h
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        for option, value in (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1):
            mallopt(option, value)


def main(argv=None):
    run_command(run, parse_args(argv))


if __name__ == "__main__":
    keep_memory()
    main()
