"""The paper's evaluation (Secs. 4.3 to 4.6).

    python tools/evaluate.py scores --help      # FAD and similarity: Tables 5 and 6
    python tools/evaluate.py sweep --help       # the ablations of Figs. 2 and 3
"""

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import noise2music as n2m
from label import WINDOWS, embed, load_embedder, load_embeddings
from sample import (DEMO, MAX_SECONDS, SECONDS, caption_of, check_writable, clean_prompt, finished, load_weights, read_prompts, run_job,
                    serving_mesh, settings_of)
from t5_encoder import check
from train import Clip, fail, load_audio, new_parser, progress_line, read_tracks, reason, run_command, track_clips, warn

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
    """Sec. 4.3.3: "the middle 10-second portion", at the 16 kHz of Sec. 4.3.1. (samples,); silence where it is shorter."""
    try:
        clip = track_clips(track)[0] if track.start is not None else Clip(track, 0.0, soundfile.info(track.path).duration)
        start = clip.start + max(0.0, (clip.seconds - seconds) / 2)
        return load_audio(track.path, start, seconds, n2m.MEL_RATE)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{track.path}: {reason(error, track.path)}; remove it, and what it is paired with") from None


def evaluation_tracks(folder: Path) -> list:
    """The clips of a folder, in the order of its captions.jsonl or else by name; of a folder of samples, the samples."""
    tracks = read_tracks(folder, False)
    return [t for t in tracks if t.path.with_suffix(".json").exists()] or tracks


def evaluation_set(source: Path, spec: str, seconds: float) -> EvaluationSet:
    """The excerpts of a folder of audio, embedded; or an array that the user made."""
    if source.suffix in (".npy", ".npz"):
        return EvaluationSet(load_embeddings(source), None)
    check(spec, f"{source}: a folder of audio needs an --audio-embedder")
    function, tracks, parts = load_embedder(spec), evaluation_tracks(source), []
    check(callable(function), f"{spec}: is an array; give it in the place of the folder {source}")
    begin = time.monotonic()
    for i in range(0, len(tracks), WINDOWS):
        some = tracks[i : i + WINDOWS]
        parts.append(embed(function, spec, np.stack([excerpt(track, seconds) for track in some])))
        if i + WINDOWS >= len(tracks) or sys.stderr.isatty():
            progress_line(f"{source}: clips embedded", i + len(some), len(tracks), begin, 0)
    texts = [text_of(track) for track in tracks]
    return EvaluationSet(np.concatenate(parts), texts if all(texts) else None)


def scores(generated: EvaluationSet, truth: EvaluationSet, text_embedder: str | None, seed: int) -> dict:
    """FAD (Table 5) and average similarities (Table 6) of generated clips, with the numbers of embeddings they rest on."""
    by_frame = lambda x: np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    x, y = by_frame(generated.embeddings), by_frame(truth.embeddings)
    for name, a in (("generated", x), ("reference", y)):
        check(np.isfinite(a).all() and len(a) > 1, f"the {len(a)} {name} embeddings are too few, or not all of them numbers")
        if len(a) < a.shape[1]:
            warn(f"{len(a)} {name} embeddings are fewer than their width {a.shape[1]}: FAD is biased upwards; see fad_infinity")
    check(x.shape[1] == y.shape[1], f"the generated embeddings are {x.shape[1]} wide, the reference's {y.shape[1]}")
    reference = n2m.gaussian(y)
    result = {"fad": n2m.frechet_distance(n2m.gaussian(x), reference), "n": len(x), "n_reference": len(y), "width": x.shape[1]}
    if len(x) >= 8:
        result["fad_infinity"] = n2m.fad_infinity(x, reference, seed)
    if len(generated.embeddings) != len(truth.embeddings):
        warn(f"{len(generated.embeddings)} generated and {len(truth.embeddings)} reference clips are no pairs: no similarity")
        return result
    by_clip = lambda x: x if x.ndim == 2 else x.mean(axis=1)  # choice: of frames, the average
    text = None
    if text_embedder:
        function, texts = load_embedder(text_embedder), truth.texts or generated.texts
        check(isinstance(function, np.ndarray) or texts,
              "--text-embedder: no captions beside the reference, nor prompts beside the samples")
        text = function if isinstance(function, np.ndarray) else embed(function, text_embedder, texts)
        check(text.shape == (len(truth.embeddings), x.shape[1]),
              f"{text_embedder}: text embeddings {text.shape}; wanted {(len(truth.embeddings), x.shape[1])}, a row for each clip")
        check(np.isfinite(text).all(), f"{text_embedder}: text embeddings that are not numbers")
    result["similarity"] = n2m.table_6(by_clip(generated.embeddings), by_clip(truth.embeddings), text, seed)
    return result


def evaluate(args):
    """Secs. 4.3.2 and 4.4: prints the scores of a set of clips as JSON."""
    generated, truth = (evaluation_set(s, args.audio_embedder, args.excerpt) for s in (args.generated, args.reference))
    settings = {"generated": str(args.generated), "reference": str(args.reference), "embedder": args.audio_embedder,
                "excerpt": args.excerpt}
    print(json.dumps(settings | scores(generated, truth, args.text_embedder, args.seed), indent=1))


def sweep_points(weights) -> list:
    """(model, changes of its InferenceConfig) of Sec. 4.5: "Only one parameter is varied at a time". First the base, Table 3."""
    points = [(None, {})]
    for name, (model, _) in weights.items():
        schedules, inference = n2m.TABLE_8[name], model.inference
        N = inference.steps or len(schedules[inference.step_schedule])
        if n2m.uses_text(model):
            points += [(name, {"cfg_scale": w}) for w in (1.0, 2.0, 5.0, 10.0, 15.0)]  # Fig. 2
        points += [(name, {"step_schedule": s, "steps": N}) for s in schedules]  # Fig. 2; Table 8's lists are not all as long
        points += [(name, {"steps": max(1, N * n // 4)}) for n in (1, 2, 4, 8)]  # Fig. 3. choice: a quarter to twice
    return points


def sweep(args):
    """Secs. 4.5 and 4.6: a JSON line for each point of Figs. 2 and 3. A second run goes on where the first was stopped."""
    check_writable(args.out)
    check(args.out.suffix == ".jsonl", f"{args.out}: -o takes the name of a .jsonl")
    truth = evaluation_set(args.reference, args.audio_embedder, args.excerpt)
    prompts = [job["prompt"] for job in read_prompts(args.prompts)] if args.prompts else truth.texts
    check(prompts, f"{args.reference}: not every clip has a caption; give the prompts with --prompts")
    truth = EvaluationSet(*(a if a is None else a[: args.limit] for a in truth))
    mesh = serving_mesh(1, 1)
    weights, t5, _ = load_weights(args, n2m.ROUTES[args.route][:2], mesh)
    model = next(iter(weights.values()))[0]
    seconds = args.seconds or max(SECONDS, model.training.seconds)
    prompts = [clean_prompt(prompt, t5, model.training.token_length) for prompt in prompts[: args.limit]]
    points = sweep_points(weights)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if v not in (None, False) and k != "out"}
    done = args.out.read_text().splitlines() if args.out.exists() else []
    check(all(json.loads(line)["settings"] == settings for line in done), f"{args.out}: points of other settings; name another -o")
    for number, (name, changes) in list(enumerate(points, 1))[len(done) :]:
        changed = dict(weights)
        if name:
            model, params = weights[name]
            changed[name] = replace(model, inference=replace(model.inference, **changes)), params
        folder = args.out.with_suffix("") / "-".join(str(part) for part in [name or "base", *changes.values()])
        print(f"[{number}/{len(points)}] {folder.name}", file=sys.stderr)
        for i, prompt in enumerate(prompts):
            path = folder / f"{i:04d}.wav"
            if not finished(path, settings_of(args, changed, prompt, args.seed + i, 0, seconds)):
                check_writable(path)
                run_job(args, changed, t5, mesh, prompt, args.seed + i, seconds, path)
        took = [json.loads(path.read_text())["sampled_in"] for path in sorted(folder.glob("*.json"))[1:]]  # the first compiles
        point = {"model": name, **changes, "seconds_per_clip": round(float(np.median(took)), 3),
                 **scores(evaluation_set(folder, args.audio_embedder, args.excerpt), truth, args.text_embedder, args.seed),
                 "settings": settings}
        with args.out.open("a") as file:
            file.write(json.dumps(point) + "\n")
        print(json.dumps(point), flush=True)


# ---- The command line ----

EVALUATE_HELP = """FAD (Table 5) and similarity (Table 6) of generated clips against real ones, as JSON.

    python sample.py --prompts music/captions.jsonl --no-superres -o generated      # a clip for each line
    python tools/evaluate.py scores generated music --audio-embedder noise2music:log_mel_statistics
    python tools/evaluate.py scores generated.npy music.npy                               # embeddings that you made

GENERATED and REFERENCE are folders of audio, of which the middle --excerpt seconds at 16 kHz are embedded, or arrays of
embeddings, (N, E), or of frames (N, F, E), in a .npy or .npz. An audio embedder is a package.module:function from audio
(16, samples), float32, to (16, E) or (16, F, E); a text embedder, of the same space, from a list of texts to (N, E), or an
array. Frames are counted one by one in FAD, and averaged for similarity, which compares the n-th clip with the n-th clip
and, given a text embedder, with its caption; where the folders hold as many clips. VGGish, Trill and MuLan, the paper's three
embedders, are not here; FAD by another one compares with no published number.
`noise2music:log_mel_statistics` is an example: it knows loudness and spectrum, and nothing of music."""


SWEEP_HELP = """The ablations of Figs. 2 and 3: varies one inference parameter at a time, and writes a JSON line for each point.

    python tools/evaluate.py sweep music --models runs --audio-embedder noise2music:log_mel_statistics -o sweep.jsonl

For the first two models of the route: guidance scales 1, 2, 5, 10 and 15, the step schedules of Table 8, and a quarter to twice the
steps; all else stays at Table 3. The prompts are the captions of the REFERENCE. Clips go into a folder of the name of the
result; seconds_per_clip is the median time to sample one, and fad and similarity are those of `evaluate.py scores`."""


def add_evaluation_options(parser):
    parser.add_argument("reference", type=Path, metavar="REFERENCE",
                        help="real clips, with captions as train.py reads them, or an array")
    parser.add_argument("--audio-embedder", metavar="E", help="package.module:function")
    parser.add_argument("--text-embedder", metavar="E", help="package.module:function, or an array")
    parser.add_argument("--excerpt", type=float, default=10, metavar="S",
                        help="seconds from the middle of a clip (default: 10; 29 for MagnaTagATune, Sec. 4.3.3)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")


def parse_evaluate_args(argv):
    parser = new_parser("evaluate.py scores", EVALUATE_HELP)
    parser.add_argument("generated", type=Path, metavar="GENERATED",
                        help="what sample.py --prompts wrote, or any clips, or an array")
    add_evaluation_options(parser)
    args = parser.parse_args(argv)
    check_evaluation_options(parser, args)
    return args


def parse_sweep_args(argv):
    parser = new_parser("evaluate.py sweep", SWEEP_HELP)
    add_evaluation_options(parser)
    parser.add_argument("-o", "--out", type=Path, default=Path("sweep.jsonl"), metavar="FILE", help="default: sweep.jsonl")
    parser.add_argument("--models", type=Path, default=DEMO, metavar="DIR", help="train.py's --out (default: demo)")
    parser.add_argument("--route", choices=tuple(n2m.ROUTES), default="waveform", help="default: waveform")
    parser.add_argument("--t5", metavar="DIR", help="T5 encoder (default: the one the models were trained with)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="other prompts, one a line")
    parser.add_argument("--limit", type=int, default=64, metavar="N", help="clips a point: the first N (default: 64)")
    parser.add_argument("--seconds", type=float, help="length (default: what the generator was trained on; but 10 at least)")
    parser.add_argument("--raw", action="store_true", help="use the parameters themselves, not their moving average")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    # Sec. 4.3.1: "the super-resolution cascader is not utilized"
    parser.set_defaults(num=1, no_superres=True, keep_stages=False, steps=None, schedule=None, cfg_scale=None, gamma=None)
    args = parser.parse_args(argv)
    check_evaluation_options(parser, args)
    if args.limit < 2:
        parser.error(f"--limit must be at least 2, not {args.limit}")
    if args.seconds is not None and not 0.1 <= args.seconds <= MAX_SECONDS:
        parser.error(f"--seconds must be from 0.1 to {MAX_SECONDS}, not {args.seconds}")
    return args


def check_evaluation_options(parser, args):
    if not 0.1 <= args.excerpt <= MAX_SECONDS:
        parser.error(f"--excerpt must be from 0.1 to {MAX_SECONDS}, not {args.excerpt}")
    if not 0 <= args.seed < 2**62:
        parser.error(f"--seed must be from 0 to 2^62, not {args.seed}")


COMMANDS = {"scores": (evaluate, parse_evaluate_args), "sweep": (sweep, parse_sweep_args)}


def main(argv=None):
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", status=130))
    argv = sys.argv[1:] if argv is None else list(map(str, argv))
    if not argv or argv[0] not in COMMANDS:
        new_parser("evaluate.py", __doc__).parse_args(argv[:1] if argv[:1] in (["-h"], ["--help"]) else ["--help"])
    command, parse = COMMANDS[argv[0]]
    run_command(command, parse(argv[1:]))


if __name__ == "__main__":
    main()
