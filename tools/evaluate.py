"""The paper's evaluation: scores of generated clips (Sec. 4.4) and ablations (Secs. 4.5, 4.6).

    python sample.py --prompts music/captions.jsonl --no-superres -o generated
    python tools/evaluate.py scores generated music \\
        --audio-embedder noise2music:log_mel_statistics
    python tools/evaluate.py scores generated.npy music.npy        # embeddings that you made
    python tools/evaluate.py sweep music --models runs \\
        --audio-embedder noise2music:log_mel_statistics -o sweep.jsonl
    python tools/evaluate.py prompts musiccaps musiccaps-public.csv --clips music

`scores` prints FAD (Table 5) and similarity (Table 6) as JSON. GENERATED and REFERENCE are folders
of audio, of which the middle --excerpt seconds at 16 kHz are embedded, or arrays of embeddings,
(N, E), or of frames (N, F, E), in a .npy or .npz. An audio embedder is a package.module:function
from audio (16, samples), float32, to (16, E) or (16, F, E); a text embedder, of the same space,
from a list of texts to (N, E), or an array. FAD counts frames one by one. Similarity averages them,
and compares the n-th clip with the n-th clip and, given a text embedder, with its caption. VGGish,
Trill and MuLan, the paper's embedders, are not here, and FAD by another compares with no published
number. `noise2music:log_mel_statistics` is an example: it knows loudness and spectrum, not music.

`prompts` makes the sets of Sec. 4.3.3 from their makers' files (see corpora.py): DIR/captions.jsonl
of the clips in --clips DIR, which `sample.py --prompts` and `scores` read; or the prompts alone.
The prompt of a clip is all its tags or labels as one string, or the rater's caption.
    MagnaTagATune        prompts mtat annotations_final.csv        --seconds 29   --excerpt 29
    AudioSet-Music-Eval  prompts audioset eval_segments.csv        --seconds 30   --excerpt 10
    MusicCaps            prompts musiccaps musiccaps-public.csv    --seconds 30   --excerpt 10

`sweep` writes a JSON line for each point of Figs. 2 and 3: of each model but super-resolution, the
guidance scales 1, 2, 5, 10 and 15, the step schedules of Table 8, and a quarter to twice the steps;
all else stays at Table 3. The prompts are the captions of REFERENCE. Clips go into a folder of the
name of the result; seconds_per_clip is the median time to sample one.
"""

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import corpora
import noise2music as n2m
from label import WINDOWS, embed_audio, embed_texts, load_embedder, load_embeddings, progress
from sample import (LENGTH, MAX_SEED, OVERRIDES, SECONDS, Job, add_model_options, caption_of,
                    check_writable, clean_prompt, finished, load_weights, read_prompts, run_job,
                    serving_mesh, stages_of)
from t5_encoder import check
from train import (Clip, fail, load_audio, new_parser, number, read_tracks, reason, run_command,
                   track_clips, warn)


# ---- What is compared (Sec. 4.3.3) ----

class EvaluationSet(NamedTuple):
    embeddings: np.ndarray  # (N, E), or of frames (N, F, E)
    texts: list[str] | None  # a prompt or caption for each clip, where all have one


def text_of(track) -> str:
    """What a clip was sampled from, by the .json beside it; or its caption."""
    try:
        return json.loads(track.path.with_suffix(".json").read_text())["prompt"]
    except (OSError, ValueError, KeyError, TypeError):
        return caption_of(track)


def excerpt(track, seconds: float) -> np.ndarray:
    """Sec. 4.3.3: "the middle 10-second portion", at the 16 kHz of Sec. 4.3.1. (samples,)

    Filled up with silence where the clip is shorter.
    """
    try:
        clip = Clip(track, 0.0, soundfile.info(track.path).duration)
        clip = clip if track.start is None else track_clips(track)[0]
        start = clip.start + max(0.0, (clip.seconds - seconds) / 2)
        return load_audio(track.path, start, seconds, n2m.MEL_RATE)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{track.path}: {reason(error, track.path)}; remove it, and what it is "
                         "paired with") from None


def evaluation_set(source: Path, spec: str, seconds: float) -> EvaluationSet:
    """The excerpts of a folder of audio, embedded; or an array that the user made.

    In the order of the folder's captions.jsonl, or by name; of a folder of samples, the samples.
    """
    if source.suffix in (".npy", ".npz"):
        return EvaluationSet(load_embeddings(source), None)
    check(spec, f"{source}: a folder of audio needs an --audio-embedder")
    function, tracks, parts = load_embedder(spec), read_tracks(source, False), []
    check(callable(function), f"{spec}: is an array; give it in the place of the folder {source}")
    tracks = [t for t in tracks if t.path.with_suffix(".json").exists()] or tracks
    show = progress(f"{source}: clips embedded", len(tracks))
    for i in range(0, len(tracks), WINDOWS):
        some = [excerpt(track, seconds) for track in tracks[i : i + WINDOWS]]
        parts.append(embed_audio(function, spec, np.stack(some)))
        show(i + len(some))
    texts = [text_of(track) for track in tracks]
    return EvaluationSet(np.concatenate(parts), texts if all(texts) else None)


# ---- Scores (Secs. 4.3.2 and 4.4) ----

def scores(generated: EvaluationSet, truth: EvaluationSet, text_embedder, seed: int) -> dict:
    """FAD (Table 5), similarities (Table 6), and the numbers of embeddings they rest on."""
    by_frame = lambda x: np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    x, y = by_frame(generated.embeddings), by_frame(truth.embeddings)
    for name, a in (("generated", x), ("reference", y)):
        check(np.isfinite(a).all() and len(a) > 1,
              f"the {len(a)} {name} embeddings are too few, or not all of them numbers")
        if len(a) < a.shape[1]:
            warn(f"{len(a)} {name} embeddings are fewer than their width {a.shape[1]}: "
                 "FAD is biased upwards; see fad_infinity")
    check(x.shape[1] == y.shape[1],
          f"the generated embeddings are {x.shape[1]} wide, the reference's {y.shape[1]}")
    reference = n2m.gaussian(y)
    result = {"fad": n2m.frechet_distance(n2m.gaussian(x), reference), "n": len(x),
              "n_reference": len(y), "width": x.shape[1]}
    if len(x) >= 8:
        result["fad_infinity"] = n2m.fad_infinity(x, reference, seed)
    if len(generated.embeddings) != len(truth.embeddings):
        warn(f"{len(generated.embeddings)} generated and {len(truth.embeddings)} reference clips "
             "are no pairs: no similarity")
        return result
    by_clip = lambda x: x if x.ndim == 2 else x.mean(axis=1)  # choice: of frames, the average
    text = text_embedder and text_embeddings(text_embedder, truth.texts or generated.texts,
                                             (len(truth.embeddings), x.shape[1]))
    result["similarity"] = n2m.table_6(by_clip(generated.embeddings), by_clip(truth.embeddings),
                                       text, seed)
    return result


def text_embeddings(spec: str, texts, shape) -> np.ndarray:
    """What --text-embedder makes of the captions, or is: (N, E), checked."""
    text = load_embedder(spec)
    if callable(text):
        check(texts, "--text-embedder: no captions beside the reference, nor prompts beside the "
              "samples")
        text = embed_texts(text, spec, texts)
    check(text.shape == shape,
          f"{spec}: text embeddings {text.shape}; wanted {shape}, a row for each clip")
    check(np.isfinite(text).all(), f"{spec}: text embeddings that are not numbers")
    return text


def evaluate(args):
    """Prints the scores of a set of clips as JSON."""
    generated, truth = (evaluation_set(source, args.audio_embedder, args.excerpt)
                        for source in (args.generated, args.reference))
    settings = {"generated": str(args.generated), "reference": str(args.reference),
                "embedder": args.audio_embedder, "excerpt": args.excerpt}
    result = scores(generated, truth, args.text_embedder, args.seed)
    print(json.dumps(settings | result, indent=1))


# ---- Ablations (Secs. 4.5 and 4.6) ----

def sweep_points(weights) -> list:
    """(model, changes of its InferenceConfig): "Only one parameter is varied at a time" (Sec. 4.5).

    The first is the base, Table 3. choice: all schedules in as many steps; a quarter to twice them.
    """
    points = [(None, {})]
    for name, (model, _) in weights.items():
        schedules, inference = n2m.step_schedules(model), model.inference
        N = inference.steps or len(schedules[inference.step_schedule])
        if n2m.uses_text(model):
            points += [(name, {"cfg_scale": w}) for w in (1.0, 2.0, 5.0, 10.0, 15.0)]  # Fig. 2
        points += [(name, {"step_schedule": key, "steps": N}) for key in schedules]  # Fig. 2
        points += [(name, {"steps": max(1, N * n // 4)}) for n in (1, 2, 4, 8)]  # Fig. 3
    return points


def sweep(args):
    """A JSON line for each point of Figs. 2 and 3. A second run goes on where the first stopped."""
    check_writable(args.out)
    truth = evaluation_set(args.reference, args.audio_embedder, args.excerpt)
    prompts = [e["prompt"] for e in read_prompts(args.prompts)] if args.prompts else truth.texts
    check(prompts,
          f"{args.reference}: not every clip has a caption; give the prompts with --prompts")
    truth = EvaluationSet(*(a if a is None else a[: args.limit] for a in truth))
    mesh = serving_mesh(1, 1)
    weights, encoder, _ = load_weights(args, stages_of(args.route, superres=False), mesh)
    c = next(iter(weights.values()))[0].training
    seconds = args.seconds or max(SECONDS, c.seconds)
    prompts = [clean_prompt(prompt, encoder, c.token_length) for prompt in prompts[: args.limit]]
    points = sweep_points(weights)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                if v not in (None, False) and k != "out"}
    done = args.out.read_text().splitlines() if args.out.exists() else []
    check(all(json.loads(line)["settings"] == settings for line in done),
          f"{args.out}: points of other settings; name another -o")
    for n, (name, changes) in list(enumerate(points, 1))[len(done) :]:
        changed = dict(weights)
        if name:
            model, params = weights[name]
            changed[name] = replace(model, inference=replace(model.inference, **changes)), params
        point = "-".join(str(part) for part in [name or "base", *changes.values()])
        folder = args.out.with_suffix("") / point
        print(f"[{n}/{len(points)}] {point}", file=sys.stderr)
        for i, prompt in enumerate(prompts):
            job = Job(prompt, args.seed + i, seconds, folder / f"{i:04d}.wav")
            if not finished(args, changed, job):
                check_writable(job.out)
                run_job(args, changed, encoder, mesh, job)
        files = sorted(folder.glob("*.json"))[1:]  # the first clip's time is with compilation
        took = [json.loads(path.read_text())["sampled_in"] for path in files]
        generated = evaluation_set(folder, args.audio_embedder, args.excerpt)
        line = {"model": name, **changes, "seconds_per_clip": round(float(np.median(took)), 3),
                **scores(generated, truth, args.text_embedder, args.seed), "settings": settings}
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


# ---- Command line ----

def parse_args(argv):
    parser = new_parser("evaluate.py", __doc__)
    parser.add_argument("command", choices=("scores", "sweep", "prompts"), help="each has a --help")
    command = parser.parse_args(argv[:1]).command
    parser = new_parser(f"evaluate.py {command}", __doc__)
    add = parser.add_argument
    if command == "prompts":
        add("set", choices=corpora.SETS, help="of Sec. 4.3.3")
        add("file", type=Path, metavar="FILE", help="as its makers publish it")
        add("--clips", type=Path, metavar="DIR", help="the set's audio, as far as you have it")
        return corpora.prompts, parser.parse_args(argv[1:])
    if command == "scores":
        add("generated", type=Path, metavar="GENERATED",
            help="what sample.py --prompts wrote, or any clips, or an array")
    add("reference", type=Path, metavar="REFERENCE",
        help="real clips, with captions as train.py reads them, or an array")
    add("--audio-embedder", metavar="E", help="package.module:function")
    add("--text-embedder", metavar="E", help="package.module:function, or an array")
    add("--excerpt", type=LENGTH, default=10, metavar="S",
        help="seconds from the middle of a clip (default: 10; 29 for MagnaTagATune)")
    add("--seed", type=number(int, 0, MAX_SEED), default=0, metavar="N", help="default: 0")
    if command == "sweep":
        add_model_options(parser)
        add("-o", "--out", type=Path, default=Path("sweep.jsonl"), metavar="FILE",
            help="default: sweep.jsonl")
        add("--prompts", type=Path, metavar="FILE", help="other prompts, one a line")
        add("--limit", type=number(int, 2), default=64, metavar="N",
            help="clips a point: the first N (default: 64)")
        parser.set_defaults(num=1, no_superres=True, keep_stages=False, **dict.fromkeys(OVERRIDES))
    args = parser.parse_args(argv[1:])
    if command == "sweep" and args.out.suffix != ".jsonl":
        parser.error(f"{args.out}: -o takes the name of a .jsonl")
    return evaluate if command == "scores" else sweep, args


def main(argv=None):
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", status=130))
    run_command(*parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
