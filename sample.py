"""Music from a prompt, by the models that train.py made (Secs. 3.3 and 4.2.1).

    python sample.py "a slow piano ballad with strings" -o ballad.wav --models runs
    python sample.py "upbeat jazz" --route spectrogram --num 4 --seed 7 --models runs
    python sample.py --prompts prompts.txt -o folder --models runs
    python sample.py --plan v4:2x2x1            # the paper's models, compiled for a TPU that need not be there

Two routes: `waveform` (3.2 kHz audio, then 16 kHz) and `spectrogram` (log-mel, then 16 kHz); super-resolution makes 24 kHz
of either. Defaults are Table 3's, as the checkpoints hold them. Beside each wav goes a .json with every setting and the
seed; the same seed and clip number give the same clip, whatever --num is. With --prompts, a prompt or a JSON object a
line, {"prompt": ..., "seed": ..., "seconds": ...}, the clips go into a folder, and a second run continues where the first
was interrupted. Several devices share the clips of --num, and with --model-parallel the matrices of the network.
"""

import argparse
import dataclasses
import json
import math
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import noise2music as n2m
import t5_encoder
from t5_encoder import check
from train import PLAN_HEADER, fail, load_model, plan, plan_mesh, run_command, shaped, t5_fingerprint, warn, write_wav

MAX_SECONDS = 600


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
    return dataclasses.replace(model, inference=dataclasses.replace(model.inference, **changes))


def load_weights(args, stages, mesh):
    """({name: (model, params)}, text encoder): the models of a route, overridden by the command line, and their T5."""
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
    return weights, t5


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


def read_prompts(path: Path) -> list[dict]:
    """The jobs of a --prompts file: {"prompt": ..., and optionally "seed" and "seconds"} a line."""
    jobs = []
    for n, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        job = {"prompt": line.strip()}
        if line.lstrip().startswith("{"):
            try:
                job = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}:{n}: not JSON ({error}); a line is a prompt, or a JSON object") from None
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


def lower_step(model: n2m.Model, mesh, num: int, seconds: float):
    """One denoising step of `num` clips, with its guidance, clipping and noise, in bfloat16, as `sample` would run it."""
    cfg, T, text = model.unet, n2m.padded_length(model.unet, round(seconds * model.rate)), None
    spec, places = n2m.unet_spec(cfg), n2m.shardings(cfg, mesh)
    params = jax.tree.map(lambda p, place: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=place), spec, places,
                          is_leaf=lambda p: isinstance(p, n2m.Param))
    array = lambda *shape, dtype=jnp.float32: shaped(mesh, (num, *shape), dtype, "batch")
    condition = n2m.Condition(array(T, 1) if model.low_rate else None,
                              array(T // n2m.HOP, cfg.aligned_channels) if cfg.aligned_channels else None)
    if n2m.uses_text(model):
        text = array(model.training.token_length, cfg.text_width), array(model.training.token_length, dtype=jnp.bool_)
        condition = condition._replace(text=text[0], text_mask=text[1])
    keys = array(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
    update = n2m.Update(*[shaped(mesh, (1,), jnp.float32)] * len(n2m.Update._fields))
    with jax.set_mesh(mesh):
        return n2m._sample_chunk.lower(params, model, array(T, cfg.out_channels), condition, keys, 1, update,
                                       model.inference.cfg_scale, jnp.bfloat16)


def print_plan(args):
    """Table 4 for this code on a TPU that need not be there: the five models of the paper, compiled ahead of time."""
    mesh, chip = plan_mesh(args.plan, args.model_parallel)
    num, seconds = args.num or 4, args.seconds or 30.0
    print(f"one denoising step of {num} clips of {seconds:g} s on {args.plan}, bfloat16, guidance included\n{PLAN_HEADER}")
    for name, model in n2m.MODELS.items():
        lowered = lower_step(for_tpu(model, num, seconds, mesh), mesh, num, seconds)
        plan(name, lowered, n2m.param_count(model), chip, beside=f"; Table 4: {n2m.TABLE_4[name]} ms")


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


def run_job(args, weights, t5, mesh, prompt: str, seed: int, seconds: float, out: Path):
    """`args.num` clips of one prompt: wav and json, the json last, so that it stands for a finished clip."""
    encode = lambda texts, token_length: t5_encoder.encode(t5, texts, token_length)
    dtype = jnp.bfloat16 if args.bf16 else jnp.float32
    if jax.default_backend() == "tpu":
        weights = {name: (for_tpu(model, args.num, seconds, mesh), params) for name, (model, params) in weights.items()}
    with jax.set_mesh(mesh):
        outputs = n2m.generate([prompt] * args.num, weights, encode, args.route, seconds, seed,
                               superres=not args.no_superres, dtype=dtype, progress=progress_printer())
    name, audio = list(outputs.items())[-1]
    rate, audio = weights[name][0].rate, np.asarray(audio)
    check(np.isfinite(audio).all(), f"{name}: sampled values that are not finite; try --raw, another --cfg-scale, or train longer")
    for i, path in enumerate(clip_paths(out, args.num)):
        settings = {"prompt": prompt, "seed": seed, "clip": i, "seconds": seconds, "rate": rate, "route": args.route,
                    "models": str(args.models), "t5": args.t5, "raw": args.raw, "bf16": args.bf16,
                    "stages": {name: dataclasses.asdict(weights[name][0].inference) for name in outputs}}
        if args.keep_stages:
            write_stages(outputs, weights, i, path)
        write_wav(path, audio[i], rate)
        path.with_suffix(".json").write_text(json.dumps(settings, indent=1) + "\n")
        level = 20 * math.log10(max(float(np.sqrt(np.mean(audio[i] ** 2))), 1e-9))
        print(f"{path}  {seconds:g} s at {rate} Hz, {level:.0f} dBFS, seed {seed} clip {i}", flush=True)


def finished(path: Path, prompt, seed, seconds, route) -> bool:
    """Whether this very clip is there already."""
    try:
        s = json.loads(path.with_suffix(".json").read_text())
        return path.is_file() and (s["prompt"], s["seed"], s["seconds"], s["route"]) == (prompt, seed, seconds, route)
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---- The command line ----


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see --help")
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="what the music should be like")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="many prompts, one a line")
    parser.add_argument("-o", "--out", type=Path, help="the wav (default: out.wav), or with --prompts a folder (default: out)")
    parser.add_argument("--models", type=Path, default=Path("runs"), metavar="DIR", help="train.py's --out (default: runs)")
    parser.add_argument("--route", choices=tuple(n2m.ROUTES), default="waveform", help="default: waveform")
    parser.add_argument("--t5", metavar="DIR", help="T5 encoder (default: the one the models were trained with)")
    parser.add_argument("--num", type=int, metavar="N", help="clips at once (default: 1; Sec. 4.2.2 serves 4)")
    parser.add_argument("--seconds", type=float, help="length (default: what the generator was trained on, 30 in the paper)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    stage = parser.add_argument_group("inference parameters (Table 3): one for all stages, or one a stage, as in 64,32,16")
    stage.add_argument("--steps", metavar="N", help="denoising steps (Table 8 resampled)")
    stage.add_argument("--schedule", metavar="NAME", help="front_heavy, back_heavy or uniform (Table 8)")
    stage.add_argument("--cfg-scale", metavar="W", help="guidance; 1 is none")
    stage.add_argument("--gamma", metavar="G", help="stochasticity, 0 to 1")
    parser.add_argument("--raw", action="store_true", help="use the parameters themselves, not their moving average")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N", help="devices that share a matrix (default: 1)")
    parser.add_argument("--plan", metavar="TPU", help="compile the paper's models for a TPU such as v4:2x2x1, print Table 4, and stop")
    parser.add_argument("--no-superres", action="store_true", help="stop at 16 kHz, as the paper's evaluation does (Sec. 4.3.1)")
    parser.add_argument("--keep-stages", action="store_true", help="write every stage's output too")
    args = parser.parse_args(argv)
    if [args.prompt, args.prompts, args.plan].count(None) != 2:
        parser.error("give a prompt, or a file of them with --prompts")
    for name in ("num", "model_parallel"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {value}")
    if not -(2**63) <= args.seed < 2**63:
        parser.error("--seed must fit 64 bits")
    return args


def run(args):
    if args.plan:
        return print_plan(args)
    args.num = args.num or 1
    stages = n2m.ROUTES[args.route][: 2 if args.no_superres else 3]
    jobs = read_prompts(args.prompts) if args.prompts else [{"prompt": args.prompt}]
    mesh = serving_mesh(args.num, args.model_parallel)
    weights, t5 = load_weights(args, stages, mesh)
    generator = weights[stages[0]][0]
    print(f"{args.route} route on {mesh.size} x {jax.devices()[0].device_kind}: " + ", ".join(
        f"{name} {n2m.param_count(m) / 1e6:.1f} M" for name, (m, _) in weights.items()), file=sys.stderr)
    for i, job in enumerate(jobs):
        where = f"{args.prompts}: prompt {i + 1}: " if args.prompts else ""
        try:
            job["prompt"] = clean_prompt(job["prompt"], t5, generator.training.token_length)
        except ValueError as error:
            raise ValueError(f"{where}{error}") from None
        job.setdefault("seed", args.seed)
        job.setdefault("seconds", generator.training.seconds if args.seconds is None else args.seconds)
        check(0.1 <= job["seconds"] <= MAX_SECONDS, f"{where}seconds must be from 0.1 to {MAX_SECONDS}, not {job['seconds']}")
        job["out"] = (args.out or Path("out")) / f"{i:04d}.wav" if args.prompts else args.out or Path("out.wav")
        check(job["out"].suffix.lower() == ".wav", f"{job['out']}: -o takes the name of a .wav")
    for i, job in enumerate(jobs):
        prompt, seed, seconds, out = (job[k] for k in ("prompt", "seed", "seconds", "out"))
        if args.prompts and all(finished(p, prompt, seed, seconds, args.route) for p in clip_paths(out, args.num)):
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
