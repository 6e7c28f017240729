"""Prompts in, 24 kHz wav out, by both routes of the paper (Secs. 3.3 and 4.2.1).

    python sample.py "a fast Irish reel on the violin"              # by the small models in demo/
    python sample.py "a slow piano ballad" -o ballad.wav --route spectrogram --seconds 30
    python sample.py "upbeat jazz" --num 4 --seed 7 --models runs   # by your own
    python sample.py --prompts prompts.txt -o folder --models runs

The route `waveform` makes 3.2 kHz audio, then 16 kHz of it; `spectrogram` makes a log-mel, then
16 kHz; super-resolution makes 24 kHz of either. Defaults are what the checkpoints hold,
Table 3's or those of `tiny`. Beside each wav goes a .json with every setting. Clip i of a seed is
the same for any --num.

A line of --prompts is a prompt, a JSON object {"prompt": ..., "seed": ..., "seconds": ...}, or one
of train.py's captions.jsonl. Prompt n, from 0 and without empty lines, has the seed --seed + n
where it names none. A second run goes on where the first was interrupted. Several devices share the
clips of --num, and with --model-parallel the matrices of the network.
"""

import io
import json
import math
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import noise2music as n2m
import t5_encoder
from t5_encoder import check, crc32, own_part, parse_json, read_lines, whole_file
from train import (MAX_SEED, load_model, new_parser, number, parse_caption, run_command, warn,
                   words_of, write_wav)

DEMO = Path(__file__).parent / "demo"
SECONDS, MAX_SECONDS = 10, 600
LENGTH = number(float, 0.1, MAX_SECONDS)
LENGTHS = 4  # the programs of so many are kept at once
OVERRIDES = {  # fields of InferenceConfig (Table 3) that have an option each
    "steps": ("--steps", number(int, 1, 100_000), "N", "denoising steps (Table 8 resampled)"),
    "step_schedule": ("--schedule", str, "NAME", "uniform, quadratic (t = n^2 / N^2) or, where a "
                      "model has it in Table 8, front_heavy, back_heavy, back_heavy_eval"),
    "cfg_scale": ("--cfg-scale", number(float, 0, 1000), "W", "guidance; 1 is none"),
    "gamma": ("--gamma", number(float, 0, 1), "G", "stochasticity of Eq. 4; selects sampler ddpm"),
}


# ---- Weights ----

def stages_of(route: str, superres: bool) -> list[str]:
    """The models of a route; without super-resolution it ends at 16 kHz (Sec. 4.3.1)."""
    names = n2m.ROUTES[route]
    return [name for name in names if superres or n2m.MODELS[name].rate <= n2m.MEL_RATE]


def override(model: n2m.Model, bf16: bool, changes: dict) -> n2m.Model:
    """The model with other inference parameters (Table 3), but for those it has no use for."""
    name, names = changes.get("step_schedule"), n2m.step_schedules(model)
    check(name is None or name in names,
          f"--schedule: {model.name} has {', '.join(names)}, not {name!r}")
    changes = {k: v for k, v in changes.items() if k != "cfg_scale" or n2m.uses_text(model)}
    if "gamma" in changes:
        changes = changes | {"sampler": "ddpm"}  # gamma is Eq. 4's
    unet = replace(model.unet, dtype="bfloat16" if bf16 else "float32", remat=False)
    return replace(model, unet=unet, inference=replace(model.inference, **changes))


def load_weights(args, stages: list[str], mesh):
    """({name: (Model, params)}, text encoder, words, identity) for the stages of a route.

    `words` are all that the captions of the first model's data had, or None where they were many.
    `identity` tells these parameters and this encoder from any others."""
    weights, reads_text, identity = {}, {}, {}
    given = {field: values for field in OVERRIDES if (values := getattr(args, field))}
    for field, values in given.items():
        check(len(values) in (1, len(stages)), f"{OVERRIDES[field][0]} takes one value, or "
              f"{len(stages)} between commas, not {len(values)}")
    for i, name in enumerate(stages):
        changes = {field: values[i % len(values)] for field, values in given.items()}
        model, params, metadata = load_model(args.models, name, args.raw)
        identity[name] = f"{crc32(*jax.tree.leaves(params)):08x}"
        model = override(model, args.bf16, changes)
        if args.bf16:  # once, not at every step
            params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        weights[name] = model, jax.device_put(params, n2m.shardings(model.unet, mesh))
        if n2m.uses_text(model):
            reads_text[name] = metadata
    check(reads_text, f"--route {args.route}: no model of it reads text")
    words = next(iter(reads_text.values())).get("words")
    _, text_encoder = t5_of(reads_text, args.models, args.t5)
    return weights, text_encoder, words, identity | {"t5": text_encoder.fingerprint}


def t5_of(reads_text: dict, models: Path, given=None):
    """(folder, encoder) of the T5 that models were trained with, by {name: metadata}: the given
    one, or what one of them names, or what lies beside them."""
    named = (metadata["t5"] for metadata in reads_text.values() if metadata["t5"])
    folder = Path(given or next(named, models / "t5"))
    text_encoder = t5_encoder.load_text_encoder(folder)
    for name, metadata in reads_text.items():
        check(metadata["t5_fingerprint"] == text_encoder.fingerprint,
              f"{folder}: not the T5 encoder that {name} was trained with; name that one with --t5")
    return folder, text_encoder


# ---- Prompts ----

def encode(text_encoder: t5_encoder.TextEncoder, prompts, model: n2m.Model) -> n2m.Condition:
    """Sec. 3.4: what a model is told of the prompts. What it hears, `sampling_condition` adds."""
    if not n2m.uses_text(model):
        return n2m.Condition()
    text, text_mask = text_encoder.encode(prompts, model.training.token_length)
    return n2m.Condition(text=jnp.asarray(text), text_mask=jnp.asarray(text_mask))


def clean_prompt(prompt, text_encoder, token_length: int, words=None) -> str:
    """The prompt; ValueError if the encoder can read nothing in it, a remark if little is known."""
    check(isinstance(prompt, str) and prompt.strip(),
          "the prompt is empty; say what the music should be like")
    prompt, count = prompt.strip(), text_encoder.count_tokens(prompt.strip())
    check(count, f"the text encoder knows no word of {prompt[:40]!r}; write it in English")
    if count >= token_length:  # </s> takes one
        warn(f"the prompt has {count} tokens; the model reads the first {token_length - 1}")
    unknown = [word for word in words_of(prompt) if words and word not in words and len(word) > 3]
    if len(unknown) > len(words_of(prompt)) / 3:
        warn(f"no caption that the generator learned from had the words {', '.join(unknown)}; it "
             "may make little of them")
    return prompt


def caption_of(track) -> str:
    """Sec. 4.3.3: a caption that a rater wrote, or else all tags in "a single string"."""
    return track.long[0] if track.long else ", ".join(track.short)


def read_prompts(path: Path) -> list[dict]:
    """{"prompt": ...} and, where it is named, "seed" and "seconds" of each line of --prompts."""
    jobs = []
    for n, line in enumerate(read_lines(path), 1):
        try:
            job = parse_json(line) if line.lstrip().startswith("{") else {"prompt": line.strip()}
            if "audio" in job:
                job = {"prompt": caption_of(parse_caption(path.parent, line, needs_text=True))}
            check(isinstance(job.get("prompt"), str)
                  and job.keys() <= {"prompt", "seed", "seconds"},
                  'takes "prompt" and, if wanted, "seed" and "seconds"')
            seed, seconds = job.get("seed", 0), job.get("seconds", SECONDS)
            check(type(seed) is int and abs(seed) <= MAX_SEED and type(seconds) in (int, float)
                  and 0.1 <= seconds <= MAX_SECONDS, '"seed" is no whole number of 31 bits, or '
                  f'"seconds" no number from 0.1 to {MAX_SECONDS}')
        except (ValueError, OSError) as error:
            raise ValueError(f"{path}:{n}: {error!s:.300}; a line is a prompt or a JSON "
                             "object") from None
        if line.strip():
            jobs.append(job)
    check(jobs, f"{path}: no prompt in it; write one a line")
    return jobs


def clip_name(i: int, n: int) -> str:
    """The name for prompt i of n, filled up with zeros: names sort in the order of prompts."""
    return f"{i:0{max(4, len(str(n - 1)))}d}.wav"


# ---- Sampling ----

class Job(NamedTuple):
    prompt: str
    seed: int
    seconds: float
    out: Path


def serving_mesh(num: int, model_parallel: int, devices=None):
    """The devices for `num` clips, as many along "data" as divide the clips. departs: Sec. 4.2.2
    partitions the model; here a device holds all of it, unless --model-parallel says otherwise."""
    devices = jax.devices() if devices is None else devices
    across = len(devices) // model_parallel
    check(across, f"--model-parallel {model_parallel} is more than the {len(devices)} devices here")
    return n2m.make_mesh(model_parallel, devices[: math.gcd(num, across) * model_parallel])


def progress_printer():
    """progress(name, done, N) for `generate`: one line a stage, rewritten on a terminal."""
    begin = time.monotonic()  # of a stage: where the one before has ended

    def progress(name, done, N):
        nonlocal begin
        end, now = "\n" if done == N else "\r", time.monotonic()
        if sys.stderr.isatty() or done == N:
            print(f"  {name}: step {done}/{N}  {now - begin:.0f} s", end=end, file=sys.stderr,
                  flush=True)
        begin = now if done == N else begin

    return progress


def clip_paths(out: Path, num: int) -> list[Path]:
    """out.wav, or out-0.wav ... where there are several."""
    return [out if num == 1 else out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(num)]


def check_writable(out: Path):
    """A ValueError before the sampling, and not after it, where `out` cannot be written."""
    check(not out.is_dir(), f"{out}: is a folder; -o takes the name of a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        (probe := own_part(out)).touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{out}: cannot be written ({error.strerror}); try another -o") from None


def write_stages(outputs, weights, i: int, path: Path):
    """--keep-stages: what each stage made; a log-mel as .npy, and to be heard by Griffin-Lim."""
    for name, x in outputs.items():
        model, stage, audio = weights[name][0], path.with_name(f"{path.stem}.{name}.wav"), x[i]
        if n2m.writes_log_mel(model):
            np.save(array := io.BytesIO(), np.asarray(x[i]))
            with whole_file(stage.with_suffix(".npy")) as file:
                file.write(array.getbuffer())
            audio = n2m.griffin_lim(x[i : i + 1])[0]
        write_wav(stage, np.asarray(audio), model.audio_rate)


def settings_of(args, weights, identity: dict, job: Job, clip: int) -> dict:
    """All that a clip depends on."""
    stages = {name: asdict(model.inference) for name, (model, _) in weights.items()}
    return {"prompt": job.prompt, "seed": job.seed, "clip": clip, "seconds": job.seconds,
            "route": args.route, "models": str(args.models), "t5": args.t5, "raw": args.raw,
            "bf16": args.bf16, "stages": stages, "crc32": identity,
            **({"keep_stages": True} if args.keep_stages else {})}


def finished(args, weights, identity: dict, job: Job) -> bool:
    """Whether these very clips are there already."""
    try:
        found = [(parse_json(path.with_suffix(".json").read_bytes()), path.read_bytes())
                 for path in clip_paths(job.out, args.num)]
        return all(settings.items() >= settings_of(args, weights, identity, job, clip).items()
                   and settings["wav_crc32"] == crc32(wav)
                   for clip, (settings, wav) in enumerate(found))
    except (OSError, ValueError, LookupError, AttributeError):
        return False


def run_job(args, weights, text_encoder, identity: dict, mesh, job: Job):
    """`args.num` clips of a prompt: wav and json, the json last, to stand for a finished clip."""
    begin = time.monotonic()
    with jax.set_mesh(mesh):
        outputs = n2m.generate([job.prompt] * args.num, weights, partial(encode, text_encoder),
                               job.seconds, job.seed, progress=progress_printer())
    for name, x in outputs.items():
        check(np.isfinite(x).all(), f"{name}: sampled values that are not finite; try --raw, "
              "another --cfg-scale, or train longer")
    rate, audio = weights[name][0].rate, np.asarray(x)
    took = {"rate": rate, "sampled_in": round(time.monotonic() - begin, 3)}
    for i, path in enumerate(clip_paths(job.out, args.num)):
        (settings_path := path.with_suffix(".json")).unlink(missing_ok=True)  # of another wav
        if args.keep_stages:
            write_stages(outputs, weights, i, path)
        write_wav(path, audio[i], rate)
        settings = settings_of(args, weights, identity, job, i) | took
        settings |= {"wav_crc32": crc32(path.read_bytes())}
        with whole_file(settings_path) as file:
            file.write(json.dumps(settings, indent=1).encode() + b"\n")
        level = 10 * math.log10(max(float(np.mean(audio[i] ** 2)), 1e-18))
        print(f"{path}  {job.seconds:g} s at {rate} Hz, {level:.0f} dBFS, seed {job.seed} clip {i}",
              flush=True)


# ---- Command line ----

def several(convert):
    """An argparse type: one value for all stages, or one a stage between commas."""
    parse = lambda text: [convert(part) for part in text.split(",")]
    parse.__name__ = f"{convert.__name__}, or one a stage"  # argparse says it
    return parse


def add_model_options(parser):
    """What evaluate.py's sweep takes too."""
    add = parser.add_argument
    add("--models", type=Path, default=DEMO, metavar="DIR", help="train.py's --out (default: demo)")
    add("--route", choices=tuple(n2m.ROUTES), default="waveform", help="default: waveform")
    add("--t5", metavar="DIR", help="T5 encoder (default: the one the models were trained with)")
    add("--seconds", type=LENGTH, metavar="S", help="length (default: what the generator was "
        "trained on, 30 in the paper; but 10 at least)")
    add("--raw", action="store_true", help="the parameters themselves, not their moving average")
    add("--bf16", action="store_true", help="compute in bfloat16")


def parse_args(argv=None):
    parser = new_parser("sample.py", __doc__)
    add = parser.add_argument
    add("prompt", nargs="?", metavar="PROMPT", help="what the music should be like")
    add("--prompts", type=Path, metavar="FILE", help="many prompts, one a line")
    add("-o", "--out", type=Path,
        help="the wav (default: out.wav), or with --prompts a folder (default: out)")
    add_model_options(parser)
    add("--num", type=number(int, 1), default=1, metavar="N",
        help="clips at once (default: 1; Sec. 4.2.2 serves 4)")
    add("--seed", type=number(int, -MAX_SEED, MAX_SEED), default=0, metavar="N", help="default: 0")
    add("--model-parallel", type=number(int, 1), default=1, metavar="N",
        help="devices that share a matrix (default: 1)")
    add("--no-superres", action="store_true",
        help="stop at 16 kHz, as the paper's evaluation does (Sec. 4.3.1)")
    add("--keep-stages", action="store_true", help="write what every stage made too")
    add = parser.add_argument_group("inference parameters (Table 3): one value for all stages, or "
                                    "one a stage, as in 64,32,16").add_argument
    for field, (option, kind, metavar, text) in OVERRIDES.items():
        add(option, dest=field, type=several(kind), metavar=metavar, help=text)
    args = parser.parse_args(argv)
    if [args.prompt, args.prompts].count(None) != 1:
        parser.error("give a prompt, or a file of them with --prompts")
    args.out = args.out or Path("out" if args.prompts else "out.wav")
    if args.prompt is not None and args.out.suffix.lower() != ".wav":
        parser.error(f"{args.out}: -o takes the name of a .wav")
    return args


def run(args):
    entries = read_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt}]
    mesh = serving_mesh(args.num, args.model_parallel)
    stages = stages_of(args.route, not args.no_superres)
    weights, text_encoder, words, identity = load_weights(args, stages, mesh)
    models, jobs = [model for model, _ in weights.values()], []
    token_length = next(m.training.token_length for m in models if n2m.uses_text(m))
    for i, entry in enumerate(entries):
        try:
            prompt = clean_prompt(entry["prompt"], text_encoder, token_length, words)
        except ValueError as error:
            raise ValueError(f"prompt {i + 1}: {error}") from None
        seed = entry.get("seed", args.seed + i)  # clips of one noise would be too much alike
        seconds = entry.get("seconds") or args.seconds or max(SECONDS, models[0].training.seconds)
        out = args.out / clip_name(i, len(entries)) if args.prompts else args.out
        jobs.append(Job(prompt, seed, seconds, out))
    for path in clip_paths(jobs[0].out, args.num):
        check_writable(path)
    own = {path.with_suffix(".json") for job in jobs for path in clip_paths(job.out, args.num)}
    if args.prompts and (others := {*args.out.glob("[0-9]*.json")} - own):
        warn(f"{args.out}: holds {len(others)} clips of other prompts; evaluate.py counts them too")
    print(f"{args.route} route on {mesh.size} x {jax.devices()[0].device_kind}: " + ", ".join(
        f"{name} {n2m.param_count(model) / 1e6:.1f} M" for name, (model, _) in weights.items()),
        file=sys.stderr)
    compiled = set()
    for i, job in enumerate(jobs, 1):
        if args.prompts and finished(args, weights, identity, job):
            print(f"{', '.join(map(str, clip_paths(job.out, args.num)))}: there already")
            continue
        print(f"[{i}/{len(jobs)}] {job.prompt}", file=sys.stderr)
        if len(compiled := compiled | {job.seconds}) > LENGTHS:  # other programs fill the memory
            jax.clear_caches()
            compiled = {job.seconds}
        run_job(args, weights, text_encoder, identity, mesh, job)


def main(argv=None):
    run_command(run, parse_args(argv))


if __name__ == "__main__":
    main()
