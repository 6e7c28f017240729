"""Music from a prompt, by the models that train.py made (Secs. 3.3 and 4.2.1).

    python sample.py "a fast Irish reel on the violin"                                # by the small models in demo/
    python sample.py "a slow piano ballad" -o ballad.wav --route spectrogram --seconds 30
    python sample.py "upbeat jazz" --num 4 --seed 7 --models runs                     # by your own
    python sample.py --prompts prompts.txt -o folder --models runs

Two routes: `waveform` (3.2 kHz audio, then 16 kHz) and `spectrogram` (log-mel, then 16 kHz); super-resolution makes 24 kHz
of either. Defaults are Table 3's, as the checkpoints hold them. Beside each wav goes a .json with every setting and the
seed; the same seed and clip number give the same clip, whatever --num is. With --prompts, a prompt or a JSON object a
line, {"prompt": ..., "seed": ..., "seconds": ...}, or train.py's captions.jsonl, the clips go into a folder, and a second
run continues where the first was interrupted; line n, from 0, has the seed --seed + n where it names none. Several devices
share the clips of --num, and with --model-parallel the matrices of the network.
"""

import dataclasses
import json
import math
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import noise2music as n2m
import t5_encoder
from t5_encoder import check
from train import (fail, load_model, new_parser,
                   parse_caption, run_command, t5_fingerprint,
                   warn, words_of, write_wav)

DEMO = Path(__file__).parent / "demo"
SECONDS, MAX_SECONDS = 10, 600


# ---- Models and prompts ----


def per_stage(text, stages, convert, name):
    """The values of --steps, --schedule, --cfg-scale or --gamma: one for all stages, or one a stage between commas."""
    if text is None:
        return [None] * len(stages)
    try:
        values = [convert(v) for v in text.split(",")]
    except ValueError:
        values = []
    check(len(values) in (1, len(stages)), f"--{name} takes one value, or {len(stages)} between commas, not {text!r}")
    return values * (len(stages) // len(values))


def number(convert, low, high):
    def parse(text):
        value = convert(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def override(model: n2m.Model, steps, schedule, cfg_scale, gamma) -> n2m.Model:
    """The model with other inference parameters (Table 3); those it has no use for stay as they are."""
    check(schedule is None or schedule in n2m.TABLE_8[model.name],
          f"--schedule: {model.name} has {', '.join(n2m.TABLE_8[model.name])} (Table 8), not {schedule!r}")
    changes = {"steps": steps, "step_schedule": schedule, "gamma": gamma}
    if n2m.uses_text(model):
        changes["cfg_scale"] = cfg_scale
    changes = {k: v for k, v in changes.items() if v is not None}
    return replace(model, inference=replace(model.inference, **changes))


def load_weights(args, stages, mesh):
    """({name: (model, params)}, text encoder, words): the models of a route, overridden by the command line, their T5, and the
    words of the captions that the generator was trained on, where they are few."""
    missing = [name for name in stages if not (args.models / name).is_dir()]
    data = "--tiny --data DIR"
    check(not missing, f"{args.models}: no trained {', '.join(missing)} here. Train each of them first:  "
                       f"python train.py {missing[0] if missing else ''} {data} --out {args.models}  (see train.py --help)")
    values = [per_stage(args.steps, stages, number(int, 1, 100_000), "steps"),
              per_stage(args.schedule, stages, str, "schedule"),
              per_stage(args.cfg_scale, stages, number(float, 0, 1000), "cfg-scale"),
              per_stage(args.gamma, stages, number(float, 0, 1), "gamma")]
    weights, readers = {}, []
    for name, *changes in zip(stages, *values):
        model, params, metadata = load_model(args.models, name, args.raw)
        params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params) if args.bf16 else params  # once, not at every step
        weights[name] = override(model, *changes), jax.device_put(params, n2m.shardings(model.unet, mesh))
        if n2m.uses_text(model):
            readers.append((name, metadata))
    folder = Path(args.t5 or readers[0][1]["t5"] or args.models / "t5")
    t5 = t5_encoder.load_t5(folder)
    for name, metadata in readers:
        check(metadata["t5_fingerprint"] == t5_fingerprint(t5),
              f"{folder}: not the T5 encoder that {name} was trained with; name that one with --t5")
    return weights, t5, readers[0][1].get("words")


def clean_prompt(text, t5, token_length: int) -> str:
    """The prompt, if there is anything in it that the text encoder can read. ValueError otherwise."""
    check(isinstance(text, str) and text.strip(), "the prompt is empty; say what the music should be like")
    ids, mask = t5_encoder.tokenize(t5, [text.strip()], token_length)
    unknown = t5.tokenizer.unk_id()
    known = [i for i in ids[0][mask[0]][:-1] if i != unknown and t5.tokenizer.id_to_piece(int(i)) != "\u2581"]
    check(known, f"the T5 encoder knows no word of the prompt {text.strip()[:40]!r}; write it in English")
    count = t5_encoder.count_tokens(t5, text.strip())
    if count >= token_length:
        warn(f"the prompt has {count} tokens; the model reads the first {token_length - 1}")
    return text.strip()


def remark_on(prompt: str, words):
    """What a small model has no idea of: `words` are all of its captions, where they were few."""
    unknown = [word for word in words_of(prompt) if words and word not in words and len(word) > 3]
    if len(unknown) > len(words_of(prompt)) / 3:
        warn(f"no caption that the generator learned from had the words {', '.join(unknown)}; it may make little of them")


def check_seconds(seconds: float, where: str = ""):
    check(0.1 <= seconds <= MAX_SECONDS, f"{where}seconds must be from 0.1 to {MAX_SECONDS}, not {seconds}")


def caption_of(track) -> str:
    """The prompt of an evaluation (Sec. 4.3.3): the first long caption, or all tags as "a single string"."""
    return track.long[0] if track.long else ", ".join(track.short)


def read_prompts(path: Path) -> list[dict]:
    """The jobs of a --prompts file: {"prompt": ..., and optionally "seed" and "seconds"} a line, or train.py's captions.jsonl."""
    jobs = []
    for n, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        job = {"prompt": line.strip()}
        if line.lstrip().startswith("{"):
            try:
                job = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{n}: not JSON ({error}); a line is a prompt, or a JSON object") from None
            if isinstance(job, dict) and "audio" in job:
                job = {"prompt": caption_of(parse_caption(path.parent, line, needs_text=True))}
            check("prompt" in job and job.keys() <= {"prompt", "seed", "seconds"},
                  f'{path}:{n}: takes "prompt" and, if wanted, "seed" and "seconds"')
            check(type(job.get("seed", 0)) is int and type(job.get("seconds", 1)) in (int, float),
                  f'{path}:{n}: "seed" is a whole number and "seconds" a number')
        if job["prompt"]:
            jobs.append(job)
    check(jobs, f"{path}: no prompt in it; write one a line")
    return jobs


# ---- Many devices (Sec. 4.2.2) ----


def serving_mesh(num: int, model_parallel: int):
    """The devices for `num` clips: as many along "data" as divide the clips."""
    across = len(jax.devices()) // model_parallel
    check(across, f"--model-parallel {model_parallel} is more than the {len(jax.devices())} devices here")
    return n2m.make_mesh(model_parallel, jax.devices()[: math.gcd(num, across) * model_parallel])


def for_tpu(model: n2m.Model, num: int, seconds: float, mesh) -> n2m.Model:
    rows = num // mesh.shape["data"] * (2 if n2m.uses_text(model) else 1)  # guidance doubles them
    return n2m.in_pieces(model, rows, round(seconds * model.rate))


# ---- Sampling ----


def progress_printer():
    """progress(name, done, N) for `generate`: one line a stage on stderr, rewritten on a terminal."""
    started = {}

    def progress(name, done, N):
        begin = started.setdefault(name, time.monotonic())
        if sys.stderr.isatty() or done == N:
            end = "\n" if done == N else "\r"
            print(f"  {name}: step {done}/{N}  {time.monotonic() - begin:.0f} s", end=end, file=sys.stderr, flush=True)

    return progress


def clip_paths(out: Path, num: int) -> list[Path]:
    """out.wav, or out-0.wav ... where there are several."""
    return [out if num == 1 else out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(num)]


def check_writable(out: Path):
    """Finds out before the sampling, not after it."""
    check(not out.is_dir(), f"{out}: is a folder; -o takes the name of a wav")
    probe = out.with_name(out.name + ".part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); choose another -o") from None


def write_stages(outputs, weights, i: int, path: Path):
    """--keep-stages: every stage's audio beside the result; a log-mel as .npy and, by Griffin-Lim, to be heard."""
    for name, x in outputs.items():
        model, stage = weights[name][0], path.with_name(f"{path.stem}.{name}.wav")
        if n2m.writes_log_mel(model):
            np.save(stage.with_suffix(".npy"), np.asarray(x[i]))
            write_wav(stage, np.asarray(n2m.griffin_lim(x[i : i + 1])[0]), n2m.MEL_RATE)
        else:
            write_wav(stage, np.asarray(x[i]), model.rate)


def settings_of(args, weights, prompt: str, seed: int, clip: int, seconds: float) -> dict:
    """What a clip depends on."""
    return {"prompt": prompt, "seed": seed, "clip": clip, "seconds": seconds, "route": args.route, "models": str(args.models),
            "t5": args.t5, "raw": args.raw, "bf16": args.bf16,
            "stages": {name: dataclasses.asdict(model.inference) for name, (model, _) in weights.items()}}


def run_job(args, weights, t5, mesh, prompt: str, seed: int, seconds: float, out: Path):
    """`args.num` clips of one prompt: wav and json, the json last, so that it stands for a finished clip."""
    encode = lambda texts, token_length: t5_encoder.encode(t5, texts, token_length)
    dtype = jnp.bfloat16 if args.bf16 else jnp.float32
    if jax.default_backend() == "tpu":
        weights = {name: (for_tpu(model, args.num, seconds, mesh), params) for name, (model, params) in weights.items()}
    begin = time.monotonic()
    with jax.set_mesh(mesh):
        outputs = n2m.generate([prompt] * args.num, weights, encode, args.route, seconds, seed,
                               superres=not args.no_superres, dtype=dtype, progress=progress_printer())
    name, audio = list(outputs.items())[-1]
    rate, audio = weights[name][0].rate, np.asarray(audio)
    took = {"rate": rate, "sampled_in": round(time.monotonic() - begin, 3)}
    check(np.isfinite(audio).all(), f"{name}: sampled values that are not finite; try --raw, another --cfg-scale, or train longer")
    for i, path in enumerate(clip_paths(out, args.num)):
        settings = settings_of(args, weights, prompt, seed, i, seconds) | took
        if args.keep_stages:
            write_stages(outputs, weights, i, path)
        write_wav(path, audio[i], rate)
        path.with_suffix(".json").write_text(json.dumps(settings, indent=1) + "\n")
        level = 20 * math.log10(max(float(np.sqrt(np.mean(audio[i] ** 2))), 1e-9))
        print(f"{path}  {seconds:g} s at {rate} Hz, {level:.0f} dBFS, seed {seed} clip {i}", flush=True)


def finished(path: Path, settings: dict) -> bool:
    """Whether this very clip is there already."""
    try:
        return path.is_file() and json.loads(path.with_suffix(".json").read_text()).items() >= settings.items()
    except (OSError, ValueError, AttributeError):
        return False


# ---- The command line ----


def parse_args(argv=None):
    parser = new_parser("sample.py", __doc__)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the music should be like")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="many prompts, one a line")
    parser.add_argument("-o", "--out", type=Path, help="the wav (default: out.wav), or with --prompts a folder (default: out)")
    parser.add_argument("--models", type=Path, default=DEMO, metavar="DIR", help="train.py's --out (default: demo)")
    parser.add_argument("--route", choices=tuple(n2m.ROUTES), default="waveform", help="default: waveform")
    parser.add_argument("--t5", metavar="DIR", help="T5 encoder (default: the one the models were trained with)")
    parser.add_argument("--num", type=int, metavar="N", help="clips at once (default: 1; Sec. 4.2.2 serves 4)")
    parser.add_argument("--seconds", type=float,
                        help="length (default: what the generator was trained on, 30 in the paper; but 10 at least)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    stage = parser.add_argument_group("inference parameters (Table 3): one for all stages, or one a stage, as in 64,32,16")
    stage.add_argument("--steps", metavar="N", help="denoising steps (Table 8 resampled)")
    stage.add_argument("--schedule", metavar="NAME", help="front_heavy, back_heavy or uniform (Table 8)")
    stage.add_argument("--cfg-scale", metavar="W", help="guidance; 1 is none")
    stage.add_argument("--gamma", metavar="G", help="stochasticity of Eq. 4, 0 to 1")
    parser.add_argument("--raw", action="store_true", help="use the parameters themselves, not their moving average")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N", help="devices that share a matrix (default: 1)")
    parser.add_argument("--no-superres", action="store_true", help="stop at 16 kHz, as the paper's evaluation does (Sec. 4.3.1)")
    parser.add_argument("--keep-stages", action="store_true", help="write every stage's output too")
    args = parser.parse_args(argv)
    if [args.prompt, args.prompts].count(None) != 1:
        parser.error("give a prompt, or a file of them with --prompts")
    for name in ("num", "model_parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not -(2**63) <= args.seed < 2**63:
        parser.error("--seed must fit 64 bits")
    return args


def run(args):
    args.num = args.num or 1
    stages = n2m.ROUTES[args.route][: 2 if args.no_superres else 3]
    jobs = read_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt}]
    mesh = serving_mesh(args.num, args.model_parallel)
    weights, t5, words = load_weights(args, stages, mesh)
    generator = weights[stages[0]][0]
    print(f"{args.route} route on {mesh.size} x {jax.devices()[0].device_kind}: " + ", ".join(
        f"{name} {n2m.param_count(m) / 1e6:.1f} M" for name, (m, _) in weights.items()), file=sys.stderr)
    for i, job in enumerate(jobs):
        where = f"{args.prompts}: prompt {i + 1}: " if args.prompts else ""
        try:
            job["prompt"] = clean_prompt(job["prompt"], t5, generator.training.token_length)
            remark_on(job["prompt"], words)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        job.setdefault("seed", args.seed + i)  # as many clips of one noise would be too much alike to evaluate
        job.setdefault("seconds", max(SECONDS, generator.training.seconds) if args.seconds is None else args.seconds)
        check_seconds(job["seconds"], where)
        job["out"] = (args.out or Path("out")) / f"{i:04d}.wav" if args.prompts else args.out or Path("out.wav")
        check(job["out"].suffix.lower() == ".wav", f"{job['out']}: -o takes the name of a .wav")
    for i, job in enumerate(jobs):
        prompt, seed, seconds, out = (job[k] for k in ("prompt", "seed", "seconds", "out"))
        if args.prompts and all(finished(path, settings_of(args, weights, prompt, seed, clip, seconds))
                                for clip, path in enumerate(clip_paths(out, args.num))):
            print(f"{out}: there already")
            continue
        check_writable(out)
        print(f"[{i + 1}/{len(jobs)}] {prompt}", file=sys.stderr)
        run_job(args, weights, t5, mesh, prompt, seed, seconds, out)


def main(argv=None):
    signal.signal(signal.SIGINT, lambda *_: fail("interrupted", status=130))
    run_command(run, parse_args(argv))


if __name__ == "__main__":
    main()
