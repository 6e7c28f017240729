"""Captions for a folder of music: pseudo-labels (Sec. 3.5), and its own titles and tags (Sec. 3.6).

    # the vocabularies of Sec. 3.5, and AudioSet's music for MuLaMCap; both have a --help of their
    # own, and folders of these names are ./vocabulary and ./audioset
    python tools/label.py vocabulary raters musiccaps-public.csv
    python tools/label.py vocabulary answers answers.jsonl
    python tools/label.py audioset clips eval_segments.csv
    # the training set of Sec. 3.6: pseudo-labels
    python tools/label.py music --vocabulary long vocabularies/lamda_lf.txt \\
        --vocabulary short vocabularies/rater_sf.txt \\
        --audio-embedder my_mulan:audio --text-embedder my_mulan:text
    # and its high-quality part: metadata alone, all clips of a track
    python tools/label.py library --high-quality

Each 30 s clip gets K' of the K captions of each vocabulary that are nearest to it by the cosine of
their embeddings. They are drawn with probabilities inverse to how often each was near to a clip.
MuLan, which embeds audio and text in one space, is not public: bring your own. An audio embedder
takes audio (16, samples), float32 at 16 kHz, and returns (16, E) or, of frames, (16, F, E); a text
embedder takes a list of texts and returns (N, E). An array (clips, E) in a .npy or .npz can take
the place of the first: tracks in the order of metadata.jsonl or of their names, clips in time.

DIR/metadata.jsonl, if there, says of each track {"audio": "one.flac", "title": "...", "tags":
["jazz", "piano"]}; otherwise all audio in DIR is taken, with the captions of a .txt beside it, if
any. Of a track with neither title nor tags, the title, artist, album and genre that its file holds
are taken. The result is the captions.jsonl that training reads. A second run goes on where the
first was stopped (delete the folder OUT.work after a change inside an embedder).
"""

import importlib
import json
import os
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import corpora
import noise2music as n2m
from t5_encoder import check, naming, read_lines, regular, whole_file
from train import (CLIP_SECONDS, CLIPS_PER_TRACK, Clip, Track, find_clips, load_clips, lock,
                   new_parser, number, open_audio, patiently, read_tracks, reason, run_command,
                   warn)


# ---- Embedders, in the place of MuLan, VGGish and Trill, which are not here (Sec. 4.3.2) ----

WINDOWS = 16  # pieces of audio that an embedder gets, always as many: it compiles once
ROWS = 4096  # clips or captions between two writes to the disk: what a restart repeats at most


def load_embedder(spec: str):
    """An --audio-embedder or --text-embedder: a function, or the array in a .npy or .npz."""
    if spec.endswith((".npy", ".npz")):
        return load_embeddings(Path(spec))
    sys.path.append(os.getcwd())  # where the user's own module may be
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{spec}: {error}; an embedder is a .npy or .npz file, or "
                         "package.module:function") from None
    check(callable(function), f"{spec}: not a function")
    return function


def load_embeddings(path: Path) -> np.ndarray:
    """(N, E) or, of frames, (N, F, E): a .npy, left on the disk, or what is alone in a .npz."""
    try:
        array = np.load(regular(path), mmap_mode="r")
        if not isinstance(array, np.ndarray):
            check(len(array.files) == 1, f"holds {len(array.files)} arrays, not one")
            array = np.asarray(array[array.files[0]])
        check(array.dtype.kind == "f" and array.ndim in (2, 3) and array.size,
              f"holds {array.dtype} {array.shape}")
    except Exception as error:  # of ten kinds, for a damaged file
        why = isinstance(error, OSError) and error.strerror or reason(error, path)
        raise ValueError(f"{path}: {why:.300}; embeddings are one array of floats, (N, E) or "
                         "(N, frames, E)") from None
    return array


def embed_texts(function: Callable, spec: str, texts: list[str]) -> np.ndarray:
    """function(texts), checked: (N, E)."""
    out = np.asarray(function(texts), np.float32)
    check(out.ndim == 2 and len(out) == len(texts) and out.size,
          f"{spec}: made {out.shape} of {len(texts)} texts; wanted ({len(texts)}, E)")
    return out


def embed_audio(function: Callable, spec: str, audio: np.ndarray) -> np.ndarray:
    """function(audio), checked, WINDOWS rows at a time: (N, E) or, of frames, (N, F, E)."""
    padded = np.pad(audio, [(0, -len(audio) % WINDOWS), (0, 0)])
    parts = np.split(padded, len(padded) // WINDOWS)
    out = [np.asarray(function(part), np.float32) for part in parts]
    check(all(o.ndim in (2, 3) and len(o) == WINDOWS and o.size for o in out),
          f"{spec}: made {out[0].shape} of audio {parts[0].shape}; wanted (N, E) or (N, frames, E)")
    return np.concatenate(out)[: len(audio)]


def embed_clips(function: Callable, spec: str, clips: list[Clip]) -> np.ndarray:
    """(N, E): of each clip the average over its 10-second windows (Sec. 3.5); NaN where it cannot
    be decoded."""
    nothing = np.full(1, np.nan, np.float32)
    pieces = [n2m.windows(nothing if audio is None else audio)
              for audio in load_clips(clips, n2m.MEL_RATE)]
    out = embed_audio(function, spec, np.nan_to_num(np.concatenate(pieces)))
    out = out.mean(axis=1) if out.ndim == 3 else out  # choice: of frames, the average too
    of_clips = np.split(out, np.cumsum([len(piece) for piece in pieces])[:-1])
    good = [np.isfinite(piece).all() for piece in pieces]
    return np.where(np.array(good)[:, None], [rows.mean(axis=0) for rows in of_clips], np.nan)


def progress(what: str, n: int, first: int = 0) -> Callable:
    """show(done): how far, and how long yet. Rewritten on a terminal, else once in 30 s."""
    begin = shown = time.monotonic()

    def show(done: int):
        nonlocal shown
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if done == n or now - shown > (0.2 if terminal else 30):
            shown, eta = now, (now - begin) / max(done - first, 1) * (n - done)
            print(f"{what}: {done}/{n}  ETA {timedelta(seconds=round(eta))}",
                  end="\r" if terminal and done < n else "\n", file=sys.stderr, flush=True)

    return show


def blockwise(path: Path, shape, dtype, make: Callable, what: str, block: int = ROWS) -> np.ndarray:
    """A matrix on the disk, made a block of rows at a time by make(start, end).

    A restart goes on after the last whole block, and tries again what failed in those before.
    """
    (n, width), part, first = shape, path.with_name(path.name + ".part"), shape[0]
    if not path.exists():
        with part.open("ab") as file:
            row = width * np.dtype(dtype).itemsize
            first = file.tell() // (row * block) * block
            file.truncate(first * row)
            show = progress(what, n, first)
            for start in range(first, n, block):
                rows = np.ascontiguousarray(make(start, end := min(start + block, n)), dtype)
                check(rows.shape == (end - start, width),
                      f"{what}: rows {rows.shape} where the first had a width of {width}")
                with naming(part):
                    file.write(rows)
                    file.flush()
                show(end)
            with naming(part):
                os.fsync(file.fileno())
        os.replace(part, path)
    whole = n * width * np.dtype(dtype).itemsize
    check(path.stat().st_size == whole, f"{path}: is cut off; delete it")
    rows = np.memmap(path, dtype, "r+", shape=shape)
    for i in np.flatnonzero(~finite(rows[:first])):
        rows[i] = make(i, i + 1)
    return rows


def finite(rows) -> np.ndarray:
    return np.isfinite(rows.sum(axis=1, dtype=np.float64))


def crc(*parts) -> str:
    """Tells one input from another, in the names of what was made of them."""
    return f"{zlib.crc32(chr(0).join(map(str, parts)).encode('utf-8', 'surrogateescape')):08x}"


def embeddings(spec: str, embed: Callable, inputs, of: str, name: str, work: Path, block=ROWS):
    """(N, E) of N inputs, and what tells it from others: an array, or made and kept in `work`."""
    embedder = load_embedder(spec)
    if isinstance(embedder, np.ndarray):
        check(embedder.ndim == 2 and len(embedder) == len(inputs),
              f"{spec}: embeddings {embedder.shape} for the {len(inputs)} of {name}; wanted a row "
              "for each, in order (see label.py --help)")
        return embedder, crc(of, spec, os.stat(spec).st_mtime_ns)
    make = lambda start, end: embed(embedder, spec, inputs[start:end])
    shape = len(inputs), make(0, 1).shape[1]
    of = crc(of, spec, shape)
    path = work / f"{name}-{of}.f32"
    return blockwise(path, shape, np.float32, make, f"{name} embedded", block), of


# ---- Pseudo-labels (Sec. 3.5) and the mining of data (Sec. 3.6) ----

K = 10  # Sec. 3.5: "We use K = 10 and K' = 3"
K_PRIME = {"long": 3, "short": 6}  # Sec. 3.6: three from LaMDA-LF, and six from Rater-SF


class Vocabulary(NamedTuple):
    kind: str  # "long" or "short"
    path: Path
    captions: list[str]
    k_prime: int
    k: int


def read_vocabulary(kind, path, k_prime=None, k=K) -> Vocabulary:
    """--vocabulary KIND FILE [K' [K]]: a caption a line."""
    check(kind in K_PRIME, f"--vocabulary: the captions of {path} are long or short, not {kind!r}")
    try:
        k_prime, k = int(K_PRIME[kind] if k_prime is None else k_prime), int(k)
    except ValueError:
        raise ValueError(f"--vocabulary {kind} {path}: {k_prime} and {k} should be K' and K, whole "
                         "numbers") from None
    captions = [line.strip() for line in read_lines(path)]
    for n, caption in enumerate(captions, 1):
        check(caption, f"{path}:{n}: an empty line; every line is a caption")
    repeated = len(captions) - len({*captions})
    check(not repeated, f"{path}: {repeated} lines repeat another; each caption once")
    check(0 < k_prime <= k <= len(captions), f"{path}: {len(captions)} captions for K' = {k_prime} "
          f"of K = {k}; wanted K' <= K <= captions")
    return Vocabulary(kind, Path(path), captions, k_prime, k)


def caption_embeddings(spec: str | None, v: Vocabulary, work: Path):
    """(M, E) of a vocabulary: the array beside it, lamda.npy beside lamda.txt, or by `spec`."""
    beside = v.path.with_suffix(".npy")
    check(spec or beside.exists(), f"{v.path}: no embeddings; put them in {beside}, a row for each "
          "line, or give --text-embedder")
    spec = str(beside) if beside.exists() else spec
    check(spec == str(beside) or not spec.endswith((".npy", ".npz")),
          f"--text-embedder is a function; the array of {v.path} belongs in {beside}")
    return embeddings(spec, embed_texts, v.captions, crc(*v.captions), v.path.name, work)


def pseudo_labels(args, clips: list[Clip], work: Path):
    """Sec. 3.5: the clips that have an embedding, and for each {"long": [...], "short": [...]}."""
    vocabularies = [read_vocabulary(*v) for v in args.vocabulary]
    load_embedder(args.audio_embedder)  # what is wrong with it, before the captions are embedded
    texts = [caption_embeddings(args.text_embedder, v, work) for v in vocabularies]
    of = crc(*((clip.track.path.resolve(), clip.track.path.stat().st_mtime_ns, clip.start,
                clip.seconds) for clip in clips))
    x, of = embeddings(args.audio_embedder, embed_clips, clips, of, "clips", work, 2 * WINDOWS)
    for v, (y, _) in zip(vocabularies, texts):
        check(y.shape[1] == x.shape[1], f"{v.path}: embeddings {y.shape[1]} wide, of the clips "
              f"{x.shape[1]}; they must be of one space")
        bad = np.flatnonzero(~finite(y)) + 1
        check(not len(bad), f"{v.path}: embeddings that are not numbers, of lines {bad[:5]} ...")
    good = np.flatnonzero(finite(x))
    check(len(good), f"{args.audio_embedder}: none of {len(clips)} embeddings is of numbers")
    if bad := len(clips) - len(good):
        warn(f"{bad} of {len(clips)} clips have no embedding of numbers; left out")
    labels = [{"long": [], "short": []} for _ in good]
    for n, (v, (y, text_of)) in enumerate(zip(vocabularies, texts)):
        nearest = lambda start, end, y=y, k=v.k: n2m.top_captions(y, x[good[start:end]], k)
        kept = work / f"{v.path.stem}-top-{crc(of, text_of, v.k, good.tobytes())}.i32"
        top = blockwise(kept, (len(good), v.k), np.int32, nearest, f"nearest of {v.path.name}")
        for entry, row in zip(labels, n2m.draw_captions(top, v.k_prime, [args.seed, n]).tolist()):
            entry[v.kind] += [v.captions[i] for i in row]
    return [clips[i] for i in good], labels


def header_tags(track: Track) -> Track:
    """A track with what its file says of it, where metadata.jsonl says nothing."""
    with open_audio(track.path) as file:
        found = file.copy_metadata()
    tags = (found.get(key, "").strip() for key in ("title", "artist", "album", "genre"))
    return track._replace(short=track.short or tuple(tag for tag in tags if tag))


def label(args):
    """Sec. 3.6: writes captions.jsonl: of each clip the title, the tags and the pseudo-labels."""
    out = args.out or args.folder / "captions.jsonl"
    check(not out.exists(), f"{out}: there already; move it away, or name another with --out")
    work = out.with_name(out.name + ".work")
    tracks = read_tracks(args.folder, False, "metadata.jsonl")
    tracks = [track if isinstance(tagged, Exception) else tagged  # `find_clips` has its say
              for track, tagged in zip(tracks, patiently(header_tags, tracks))]
    # Sec. 3.6: high-quality tracks "are segmented to non-overlapping 30-second clips", all of them
    clips = find_clips(tracks, 10**6 if args.high_quality else CLIPS_PER_TRACK)
    print(f"{len(tracks)} tracks, {len(clips)} clips of up to {CLIP_SECONDS} s", flush=True)
    labels, kept, bare = [{"long": [], "short": []}] * len(clips), "", 0
    if args.vocabulary:
        with lock(work / "lock"):
            clips, labels = pseudo_labels(args, clips, work)
        kept = f"; {work} keeps the embeddings for another run, and can be deleted"
    with whole_file(out) as file:
        for clip, pseudo in zip(clips, labels):
            long, short = list(clip.track.long), list(clip.track.short)
            if args.high_quality and short:  # Sec. 3.6: "concatenated to form the text prompt"
                long, short = [*long, ", ".join(short)], []
            path = clip.track.path.parent.resolve() / clip.track.path.name
            path, start = os.path.relpath(path, out.parent.resolve()), round(clip.start, 3)
            entry = {"audio": path, "start": start, "long": long + pseudo["long"],
                     "short": short + pseudo["short"]}
            file.write(json.dumps(entry).encode() + b"\n")
            bare += not (entry["long"] or entry["short"])
    if bare:
        warn(f"{bare} of {len(clips)} clips have no title, tags or caption: the models that read "
             "text will leave them out")
    print(f"{out}: {len(clips)} clips with their captions{kept}")


# ---- Command line ----

def parse_args(argv):
    """(function, arguments) of a command."""
    if argv and argv[0] in corpora.COMMANDS:
        return corpora.COMMANDS[argv[0]], corpora.parse_args(argv[0], argv[1:])
    parser = new_parser("label.py", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="the music")
    add("--vocabulary", nargs="+", action="append", default=[], metavar="X",
        help="KIND FILE [K' [K]]: long or short, a file of a caption a line, how many to give each "
        "clip (3 long, 6 short), out of how many (10); may be repeated")
    add("--audio-embedder", metavar="E", help="package.module:function, or an array")
    add("--text-embedder", metavar="E",
        help="package.module:function; or put lamda.npy beside lamda.txt")
    add("--high-quality", action="store_true",
        help="titles and tags concatenated to one prompt, and all clips of a track")
    add("--out", type=Path, metavar="FILE", help="default: DIR/captions.jsonl")
    add("--seed", type=number(int, 0), default=0, metavar="N", help="of the draws (default: 0)")
    args = parser.parse_args(argv)
    if any(not 2 <= len(v) <= 4 for v in args.vocabulary):
        parser.error("--vocabulary takes KIND FILE [K' [K]]")
    if args.vocabulary and not args.audio_embedder:
        parser.error("--vocabulary needs an --audio-embedder to compare the captions with")
    if not args.vocabulary and (args.audio_embedder or args.text_embedder):
        parser.error("the embedders compare clips with a --vocabulary; give one")
    if not (args.vocabulary or args.high_quality):
        parser.error("give a --vocabulary, or --high-quality for the metadata alone")
    return label, args


def main(argv=None):
    run_command(*parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
