"""The paper's evaluation: scores of generated clips (Sec. 4.4) and ablations (Secs. 4.5, 4.6).

    python sample.py --prompts music/captions.jsonl --no-superres -o generated
    python tools/evaluate.py scores generated music \\
        --audio-embedder noise2music:log_mel_statistics
    python tools/evaluate.py scores generated.npy music.npy        # embeddings that you made
    python tools/evaluate.py sweep music --models runs \\
        --audio-embedder noise2music:log_mel_statistics -o sweep.jsonl
    python tools/evaluate.py plot sweep.jsonl                      # Figs. 2 and 3
    python tools/evaluate.py prompts musiccaps musiccaps-public.csv --clips music
    python tools/evaluate.py tables musiccaps generated riffusion music \\
        --embedder VGG=my:vggish --embedder MuLan=my:mulan --text-embedder my:mulan_text
    python tools/evaluate.py listen music generated riffusion      # Table 7, as listen.py

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
    prompts ...                         for sample.py:    for scores:
    mtat annotations_final.csv          --seconds 29      --excerpt 29      MagnaTagATune
    audioset eval_segments.csv          --seconds 30      --excerpt 10      AudioSet-Music-Eval
    musiccaps musiccaps-public.csv      --seconds 30      --excerpt 10      MusicCaps

`tables` prints Tables 5 and 6 for a set: a row for each folder GENERATED, a column an embedder, and
the paper's numbers in brackets where set and embedder have the names of the paper's.

`sweep` writes a JSON line for each point of Figs. 2 and 3: of each model but super-resolution, the
guidance scales 1, 2, 5, 10 and 15, the step schedules of Table 8, and a quarter to twice the steps;
all else stays as the models have it. The prompts are the captions of REFERENCE. Clips go into a
folder of the name of the result; seconds_per_clip is the median time to sample one.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import corpora
import noise2music as n2m
from label import WINDOWS, crc, embed_audio, embed_texts, load_embedder, load_embeddings, progress
from sample import (LENGTH, MAX_SEED, OVERRIDES, SECONDS, Job, add_model_options, caption_of,
                    check_writable, clean_prompt, clip_name, finished, load_weights, read_prompts,
                    run_job, serving_mesh, stages_of)
from t5_encoder import check, parse_json
from train import (Clip, append_log, duration_of, load_audio, lock, new_parser, number, patiently,
                   read_log, read_tracks, reason, run_command, track_clips, warn)


# ---- What is compared (Sec. 4.3.3) ----

class EvaluationSet(NamedTuple):
    embeddings: np.ndarray  # (N, E), or of frames (N, F, E)
    texts: list[str] | None  # a prompt or caption for each clip, where all have one


def clips_of(folder: Path) -> list:
    """In the order of the folder's captions.jsonl, or by name; of a folder of samples, the samples.
    """
    tracks, listed = read_tracks(folder, False), (folder / "captions.jsonl").exists()
    samples = [t for t in tracks if not listed and t.path.with_suffix(".json").exists()]
    check(all(t.path.parent == folder for t in samples),
          f"{folder}: holds samples in a folder below it; move them away")
    stems = {t.path.stem for t in samples}  # 0000 of 0000.waveform_generator, by --keep-stages
    if others := [t.path for t in tracks if samples and t.path.stem.split(".")[0] not in stems]:
        warn(f"{folder}: {len(others)} of {len(tracks)} files, such as {others[0].name}, have no "
             ".json as samples have, and are left out")
    return samples or tracks


def text_of(track) -> str:
    """What a clip was sampled from, by the .json beside it; or its caption."""
    try:
        prompt = parse_json(track.path.with_suffix(".json").read_bytes())["prompt"]
        check(isinstance(prompt, str), "of another program")
        return prompt
    except (OSError, ValueError, KeyError, TypeError):
        return caption_of(track)


def excerpt(track, seconds: float) -> tuple[np.ndarray, bool]:
    """Sec. 4.3.3: "the middle 10-second portion", at the 16 kHz of Sec. 4.3.1. (samples,)

    And whether the clip is shorter, and silence fills it up.
    """
    try:
        clip = Clip(track, 0.0, duration_of(track.path))
        clip = clip if track.start is None else track_clips(track)[0]
        start = clip.start + max(0.0, (clip.seconds - seconds) / 2)
        audio = load_audio(track.path, start, min(seconds, clip.seconds), n2m.MEL_RATE)
        rest = round(seconds * n2m.MEL_RATE) - len(audio)
        return np.pad(audio, (0, rest)), clip.seconds < seconds
    except ValueError as error:
        raise ValueError(f"{track.path}: {reason(error, track.path)}; remove it, and what it is "
                         "paired with") from None


def evaluation_set(source: Path, spec: str, seconds: float, limit=None) -> EvaluationSet:
    """The excerpts of a folder of audio, embedded; or an array that the user made. Or the first
    `limit` of them."""
    if source.suffix in (".npy", ".npz"):
        return EvaluationSet(load_embeddings(source)[:limit], None)
    check(spec, f"{source}: a folder of audio needs an --audio-embedder")
    function, tracks, parts, short = load_embedder(spec), clips_of(source)[:limit], [], 0
    check(callable(function), f"{spec}: is an array; give it in the place of the folder {source}")
    show = progress(f"{source}: clips embedded", len(tracks))
    for i in range(0, len(tracks), WINDOWS):
        some = patiently(lambda track: excerpt(track, seconds), tracks[i : i + WINDOWS])
        for error in (each for each in some if isinstance(each, Exception)):
            raise error
        parts.append(embed_audio(function, spec, np.stack([audio for audio, _ in some])))
        short += sum(is_short for _, is_short in some)
        show(i + len(some))
    if short:
        warn(f"{source}: {short} of {len(tracks)} clips are shorter than {seconds:g} s, and filled "
             "up with silence")
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
    if not 1 < len(generated.embeddings) == len(truth.embeddings):
        warn(f"{len(generated.embeddings)} generated and {len(truth.embeddings)} reference clips "
             "are no pairs, or but one: no similarity")
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
              "samples; with arrays of audio, give an array of texts too")
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


# ---- Tables 5 and 6 (Sec. 4.4) ----

EMBEDDERS = "VGG", "Trill", "MuLan"
TABLE_5 = {  # FAD by each of them
    "musiccaps": {
        "Riffusion":               (13.371, 0.763, 0.487),
        "Mubert":                  (9.620,  0.449, 0.366),
        "MusicLM":                 (4.0,    0.44,  None),
        "Noise2Music Waveform":    (2.134,  0.405, 0.110),
        "Noise2Music Spectrogram": (3.840,  0.474, 0.180)},
    "audioset": {
        "Noise2Music Waveform":    (2.240,  0.252, 0.193),
        "Noise2Music Spectrogram": (3.498,  0.323, 0.276)},
    "mtat": {
        "Noise2Music Waveform":    (3.554,  0.352, 0.235),
        "Noise2Music Spectrogram": (5.553,  0.419, 0.346)},
}  # fmt: skip
TABLE_6 = {  # similarity by MuLan: audio to gt-text, audio to gt-audio
    "musiccaps": {
        "Ground Truth Audio":      (0.452, 1.0),
        "Randomly Shuffled Audio": (0.248, 0.278),
        "Riffusion":               (0.342, 0.312),
        "Mubert":                  (0.323, 0.280),
        "MusicLM":                 (0.51,  None),
        "Noise2Music Waveform":    (0.478, 0.489),
        "Noise2Music Spectrogram": (0.434, 0.464)},
    "audioset": {
        "Ground Truth Audio":      (0.470, 1.0),
        "Randomly Shuffled Audio": (0.274, 0.265),
        "Noise2Music Waveform":    (0.563, 0.429),
        "Noise2Music Spectrogram": (0.490, 0.389)},
    "mtat": {
        "Ground Truth Audio":      (0.498, 1.0),
        "Randomly Shuffled Audio": (0.277, 0.315),
        "Noise2Music Waveform":    (0.518, 0.479),
        "Noise2Music Spectrogram": (0.459, 0.444)},
}  # fmt: skip


def print_table(title: str, columns, ours: dict, paper: dict):
    """The rows of the paper, its numbers in brackets, and of ours; what both have is one row."""
    cell = lambda x, form: "" if x is None else form.format(x)
    none = [None] * len(columns)
    print(f"{title:44}" + "".join(f"{column:>20}" for column in columns))
    for row in dict.fromkeys([*paper, *ours]):
        print(f"  {row:42}" + "".join(
            f"{cell(a, '{:.3f}'):>11}{cell(b, '({:.3f})'):>9}"
            for a, b in zip(ours.get(row, none), paper.get(row, none))))


def tables(args):
    """Tables 5 and 6 with a row for each folder of clips, all of the prompts of one set."""
    fad, similar, which = {}, {}, corpora.SETS[args.set]
    for name, spec in args.embedder:
        read = lambda folder, name=name, spec=spec: evaluation_set(
            folder if spec else folder / f"{name}.npy", spec, which.excerpt)
        truth = read(args.reference)
        last = (name, spec) == args.embedder[-1]  # Table 6 is its
        text = args.text_embedder if last else None
        for folder in args.generated:
            result = scores(read(folder), truth, text, args.seed)
            fad.setdefault(str(folder), []).append(result["fad"])
            for row, columns in result.get("similarity", {}).items() if last else []:
                row = str(folder) if row == "generated audio" else row.title()
                similar[row] = columns.get("gt-text"), columns["gt-audio"]
    names = [name for name, _ in args.embedder]
    paper = {row: [dict(zip(EMBEDDERS, numbers)).get(name) for name in names]
             for row, numbers in TABLE_5[args.set].items()}
    print_table(f"Table 5, FAD: {which.name}", names, fad, paper if {*names} & {*EMBEDDERS} else {})
    print_table(f"Table 6, similarity by {names[-1]}: {which.name}", ["gt-text", "gt-audio"],
                similar, TABLE_6[args.set] if names[-1] == "MuLan" else {})
    warn("in brackets are the paper's numbers, by its VGG, Trill and MuLan; FAD and similarity by "
         "other embedders, or by other weights of these, compare with no published number")


# ---- Ablations (Secs. 4.5 and 4.6) ----

def sweep_points(weights) -> list:
    """(model, changes of its InferenceConfig): "Only one parameter is varied at a time" (Sec. 4.5).

    The first is the base. choice: all schedules in as many steps; a quarter to twice them.
    """
    points = [(None, {})]
    for name, (model, _) in weights.items():
        inference, schedules = model.inference, n2m.TABLE_8.get(name, n2m.STEP_SCHEDULES)
        N = inference.steps or len(n2m.step_schedules(model)[inference.step_schedule])
        if n2m.uses_text(model):
            points += [(name, {"cfg_scale": w}) for w in (1.0, 2.0, 5.0, 10.0, 15.0)]  # Fig. 2
        points += [(name, {"step_schedule": key, "steps": N}) for key in schedules]  # Fig. 2
        points += [(name, {"steps": max(1, N * n // 4)}) for n in (1, 2, 4, 8)]  # Fig. 3
    return points


def sweep(args):
    """A JSON line for each point of Figs. 2 and 3. A second run goes on where the first stopped.

    choice: FAD to the clips of the same prompts, not to those of the whole set.
    """
    check_writable(args.out)
    check(args.audio_embedder, "sweep needs an --audio-embedder, for the clips that it samples")
    clips = args.out.with_suffix("")
    check(not clips.resolve().is_relative_to(args.reference.resolve()),
          f"{args.out}: its clips would lie in the folder {args.reference}; try another -o")
    truth = evaluation_set(args.reference, args.audio_embedder, args.excerpt, args.limit)
    if args.prompts:
        given = [entry["prompt"] for entry in read_prompts(args.prompts)[: args.limit]]
        truth = truth._replace(texts=given)
    prompts, shape = truth.texts, (len(truth.embeddings), truth.embeddings.shape[-1])
    check(prompts,
          f"{args.reference}: not every clip has a caption; give the prompts with --prompts")
    check(len(prompts) > 1, "a sweep compares clips; give two prompts or more")
    check(len(prompts) == shape[0], f"{args.prompts}: {len(prompts)} prompts of the {shape[0]} "
          f"clips of {args.reference}; give one of each")
    if args.text_embedder:  # an error comes now
        text_embeddings(args.text_embedder, prompts, shape)
    mesh = serving_mesh(1, 1)
    weights, encoder, _, identity = load_weights(args, stages_of(args.route, False), mesh)
    c = next(iter(weights.values()))[0].training
    seconds = args.seconds or max(SECONDS, c.seconds)
    prompts = [clean_prompt(prompt, encoder, c.token_length) for prompt in prompts]
    names = [clip_name(i, len(prompts)) for i in range(len(prompts))]
    points = sweep_points(weights)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()
                if v not in (None, False) and k != "out"}
    settings |= {"crc32": identity, "prompts_crc32": crc(*prompts)}
    with lock(clips / "lock"):
        done = read_log(args.out)
        check(all(isinstance(e, dict) and e.get("settings") == settings for e in done),
              f"{args.out}: points of other settings; name another -o")
        for n, (name, changes) in list(enumerate(points, 1))[len(done) :]:
            changed = dict(weights)
            if name:
                model, params = weights[name]
                inference = replace(model.inference, **changes)
                changed[name] = replace(model, inference=inference), params
            point = "-".join(str(part) for part in [name or "base", *changes.values()])
            folder = clips / point
            print(f"[{n}/{len(points)}] {point}", file=sys.stderr)
            check({path.name for path in folder.glob("*.wav")} <= {*names},
                  f"{folder}: holds clips of another sweep; move it away")
            jobs = [Job(prompt, args.seed + i, seconds, folder / names[i])
                    for i, prompt in enumerate(prompts)]
            left = [job for job in jobs if not finished(args, changed, identity, job)]
            for job in dict.fromkeys(left and [jobs[0], *left]):  # the first compiles, always
                check_writable(job.out)
                run_job(args, changed, encoder, identity, mesh, job)
            files = sorted(folder.glob("*.json"))[1:]
            took = [parse_json(path.read_bytes())["sampled_in"] for path in files]
            generated = evaluation_set(folder, args.audio_embedder, args.excerpt)
            line = {"model": name, **changes, "seconds_per_clip": round(float(np.median(took)), 3),
                    **scores(generated, truth, args.text_embedder, args.seed), "settings": settings}
            append_log(args.out, line)
            print(json.dumps(line), flush=True)


def plot(args):
    """Figs. 2 and 3 of a sweep: FAD against similarity, and both against the time to sample."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('plot draws with matplotlib: pip install -e ".[plot]"') from None
    lines = corpora.read_json_lines(args.sweep)
    needed = {"model", "fad", "similarity", "seconds_per_clip"}
    check(lines[1:] and all(needed <= line.keys() and isinstance(line["similarity"], dict)
                            for line in lines),
          f"{args.sweep}: holds no points of a sweep, or some without a similarity")
    kept = lines[0]["similarity"]["generated audio"]
    column = "gt-text" if "gt-text" in kept else "gt-audio"
    axes = {"FAD": lambda line: line["fad"],
            f"similarity to {column}": lambda line: line["similarity"]["generated audio"][column],
            "inference time of a clip (s)": lambda line: line["seconds_per_clip"]}
    FAD, SIMILARITY, TIME = axes

    def draw(ax, x, y, what, varied, mark):
        """A curve for each model, through the points where just `varied` differ from the base."""
        for model in dict.fromkeys(line["model"] for line in lines[1:]):
            points = [line for line in lines if line["model"] == model
                      and {"cfg_scale", "step_schedule", "steps"} & line.keys() == varied]
            if points:
                places = [(axes[x](line), axes[y](line)) for line in points]
                ax.plot(*zip(*places), "o-", label=f"{model.replace('_', ' ')}: {what}")
                for line, place in zip(points, places):
                    ax.annotate(mark(line), place, (4, 4), textcoords="offset points")
        ax.set(xlabel=x, ylabel=y)

    figures = {n: Figure((4.5 * n - 2, 5), layout="constrained") for n in (2, 3)}
    ax = figures[2].subplots()
    draw(ax, FAD, SIMILARITY, "CFG scale", {"cfg_scale"}, lambda line: f"{line['cfg_scale']:g}")
    draw(ax, FAD, SIMILARITY, "step schedule", {"step_schedule", "steps"},
         lambda line: line["step_schedule"].replace("_heavy", "").replace("_", " "))
    for ax, y in zip(figures[3].subplots(1, 2), (FAD, SIMILARITY)):
        draw(ax, TIME, y, "steps", {"steps"}, lambda line: line["steps"])
    for n, figure in figures.items():
        figure.axes[0].legend()
        path = args.sweep.with_name(f"{args.sweep.stem}-figure-{n}.png")
        figure.savefig(path)
        print(path)


# ---- Command line ----

def parse_args(argv):
    parser = new_parser("evaluate.py", __doc__)
    parser.add_argument("command", help="each has a --help", choices=(
        "prompts", "scores", "tables", "sweep", "plot", "listen"))
    command = parser.parse_args(argv[:1]).command
    parser = new_parser(f"evaluate.py {command}", __doc__)
    add = parser.add_argument
    if command == "prompts":
        add("set", choices=corpora.SETS, help="of Sec. 4.3.3")
        add("file", type=Path, metavar="FILE", help="as its makers publish it")
        add("--clips", type=Path, metavar="DIR", help="the set's audio, as far as you have it")
        return corpora.prompts, parser.parse_args(argv[1:])
    if command == "listen":
        from listen import parse_args as parse_sources  # which imports this module
        return parse_sources(argv[1:])
    if command == "plot":
        add("sweep", type=Path, metavar="SWEEP", help="the .jsonl that `sweep` wrote")
        return plot, parser.parse_args(argv[1:])
    seed = dict(type=number(int, 0, MAX_SEED), default=0, metavar="N", help="default: 0")
    if command == "tables":
        add("set", choices=corpora.SETS, help="of Sec. 4.3.3")
        add("generated", type=Path, nargs="+", metavar="GENERATED", help="folders, a row each")
        add("reference", type=Path, metavar="REFERENCE", help="the folder of the real clips")
        add("--embedder", action="append", required=True, metavar="NAME[=E]",
            type=lambda text: text.partition("=")[::2], help="a column: VGG, Trill, MuLan or any; "
            "by package.module:function, or by an array NAME.npy in each folder; the last is "
            "Table 6's too")
        add("--text-embedder", metavar="E", help="of the last: as for `scores`")
        add("--seed", **seed)
        args = parser.parse_args(argv[1:])
        if len({*args.generated}) < len(args.generated):
            parser.error("give each folder once")
        return tables, args
    if command == "scores":
        add("generated", type=Path, metavar="GENERATED",
            help="what sample.py --prompts wrote, or any clips, or an array")
    add("reference", type=Path, metavar="REFERENCE",
        help="real clips, with captions as train.py reads them, or an array")
    add("--audio-embedder", metavar="E", help="package.module:function")
    add("--text-embedder", metavar="E",
        help="package.module:function, or an array with a row for each clip compared")
    add("--excerpt", type=LENGTH, default=10, metavar="S",
        help="seconds from the middle of a clip (default: 10; 29 for MagnaTagATune)")
    add("--seed", **seed)
    if command == "sweep":
        add_model_options(parser)
        add("-o", "--out", type=Path, default=Path("sweep.jsonl"), metavar="FILE",
            help="default: sweep.jsonl")
        add("--prompts", type=Path, metavar="FILE", help="the prompts of REFERENCE's clips, in "
            "their order, one a line (default: their captions; seeds and seconds are not read)")
        add("--limit", type=number(int, 2), default=64, metavar="N",
            help="prompts a point, and clips of REFERENCE: the first N (default: 64)")
        parser.set_defaults(num=1, no_superres=True, keep_stages=False, **dict.fromkeys(OVERRIDES))
    args = parser.parse_args(argv[1:])
    if command == "sweep" and args.out.suffix != ".jsonl":
        parser.error(f"{args.out}: -o takes the name of a .jsonl")
    return evaluate if command == "scores" else sweep, args


def main(argv=None):
    run_command(*parse_args(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    main()
