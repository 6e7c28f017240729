"""What a TPU that is not here would need, by its own compiler (Secs. 4.1 and 4.2.2).

    pip install "jax[tpu]"                                    # brings the compiler
    python tools/plan.py v4:2x2x1                             # Table 4: a step of each model
    python tools/plan.py v4:2x2x1 --only spectrogram_vocoder
    python tools/plan.py v4:4x4x4 --train waveform_generator --batch-size 2048

Compiles the programs that sample.py and train.py run. Their time is an estimate from the compiler's
own counts: the larger of arithmetic and memory traffic at the chip's peak rates, then collectives.
"""

import functools
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import noise2music as n2m
from sample import serving_mesh
from t5_encoder import check
from train import (default_parts, gradients, init_state, new_parser, number, run_command,
                   state_layout, update)


class Chip(NamedTuple):
    flops: float  # a second, of bfloat16
    hbm: float  # bytes a second
    links: float  # bytes a second, to the other chips
    memory: float  # GiB


CHIPS = {"v4": Chip(275e12, 1.2e12, 0.3e12, 32)}  # Jouppi et al. (2023); for another kind, a row
HEADER = (f"{'model':25s} {'params':>8s} {'arithmetic':>11s} {'HBM traffic':>12s} "
          f"{'collectives':>12s} {'step':>10s} {'HBM a chip':>11s} {'compiled in':>12s}")


def tpu(topology: str):
    """(devices, Chip) of a TPU such as v4:2x2x1, for compilation only. Needs libtpu, and no TPU."""
    kind = topology.partition(":")[0]
    check(kind in CHIPS, f"{topology!r} is not KIND:AxBxC with a kind of {', '.join(CHIPS)} (CHIPS "
          "in plan.py)")
    # What libtpu otherwise asks of the machine that it takes for a TPU's host.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": f"{kind}-8",
                   "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    # What is compiled for another machine can be kept on the disk, but not read back.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    try:
        from jax.experimental import topologies

        found = topologies.get_topology_desc(topology, "tpu", chip_config_name="megacore")
    except Exception as error:
        raise ValueError(f"{topology}: {str(error).splitlines()[0][:200]}; it needs libtpu (pip "
                         "install 'jax[tpu]'), and a shape such as v4:2x2x1") from None
    return found.devices, CHIPS[kind]


def array(*shape, dtype=jnp.float32):
    """An array that is not there: what a program is compiled for."""
    return jax.ShapeDtypeStruct(shape, dtype)


def laid_out(tree, layout):
    """Such arrays, each with its place on a mesh."""
    place = lambda a, at: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=at)
    return jax.tree.map(place, tree, layout)


def across(mesh, tree):
    """The same for a batch, whose rows SHARDING lays along "data"."""
    rows = lambda a: NamedSharding(mesh, n2m.partition(mesh, a.shape, ("batch",)))
    return laid_out(tree, jax.tree.map(rows, tree))


def text_condition(model: n2m.Model, rows: int) -> n2m.Condition:
    """Of the prompts of `rows` clips, where the model reads text (Sec. 3.4)."""
    if not n2m.uses_text(model):
        return n2m.Condition()
    L, E = model.training.token_length, model.unet.text_width
    return n2m.Condition(text=array(rows, L, E), text_mask=array(rows, L, dtype=bool))


def collectives(hlo: str) -> tuple[dict, int]:
    """{kind: number} of a compiled program's collectives, and the bytes on a chip's links."""
    size = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
    counts, total = {}, 0
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", hlo):
        sent = sum(size.get(t, 4) * math.prod(int(d) for d in dims.split(",") if d)
                   for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", result))
        counts[kind] = counts.get(kind, 0) + 1
        total += sent * (2 if kind == "all-reduce" else 1)  # a ring reduces, then gathers
    return counts, total


def plan(name: str, lowered, params: float, chip: Chip, repeat: int = 1, beside: str = ""):
    """Compiles a program and prints its row. Returns the ms that `repeat` runs of it take."""
    begin = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - begin
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    counts, sent = collectives(compiled.as_text())
    arithmetic, traffic, links = (1e3 * repeat * a for a in (
        cost["flops"] / chip.flops, cost["bytes accessed"] / chip.hbm, sent / chip.links))
    step = max(arithmetic, traffic) + links
    kinds = " + ".join(f"{n} {kind}" for kind, n in counts.items()) or "no collectives"
    used = (memory.argument_size_in_bytes + memory.output_size_in_bytes
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes) / 2**30
    print(f"{name:25s} {params / 1e6:6.1f} M {arithmetic:8.1f} ms {traffic:9.1f} ms "
          f"{links:9.2f} ms {step:7.1f} ms {used:7.2f} GiB {seconds:10.0f} s   {kinds}{beside}",
          flush=True)
    check(used <= chip.memory, f"{name}: {used:.1f} GiB do not fit a chip of {chip.memory} GiB; a "
          "larger --accumulate or topology does")
    return step


# ---- Sampling (Sec. 4.2.2) ----

def lower_step(model: n2m.Model, mesh, num: int, seconds: float):
    """One denoising step of `num` clips, with guidance, clipping and noise: a chunk of `sample`."""
    cfg = model.unet
    previous = array(num, round(seconds * (model.low_rate or n2m.MEL_RATE)))
    if cfg.aligned_channels:
        previous = jax.eval_shape(n2m.log_mel, previous)
    condition = jax.eval_shape(lambda given, previous: n2m.sampling_condition(
        model, given, previous, seconds), text_condition(model, num), previous)
    x_t = array(num, n2m.padded_length(cfg, round(seconds * model.rate)), cfg.out_channels)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), num))
    x_t, condition, keys = across(mesh, (x_t, condition, keys))
    params = jax.eval_shape(lambda: n2m.init_params(jax.random.key(0), cfg))
    params = jax.tree.map(lambda p: array(*p.shape, dtype=jnp.bfloat16), params)  # as with --bf16
    updates = n2m.Update(*[array(1)] * len(n2m.Update._fields))
    with jax.set_mesh(mesh):
        return n2m._sample_chunk.lower(laid_out(params, n2m.shardings(cfg, mesh)), model, x_t,
                                       condition, keys, 1, updates)


def plan_sampling(args):
    """Table 4 by this code: each model, a step of it."""
    devices, chip = tpu(args.topology)
    mesh, seconds = serving_mesh(args.num, args.model_parallel, devices), args.seconds or 30.0
    print(f"a denoising step, as `sample.py --num {args.num} --seconds {seconds:g} --bf16 "
          f"--model-parallel {args.model_parallel}` runs it on {args.topology}\n{HEADER}")
    for name, model in n2m.MODELS.items():
        if args.only in (None, name):
            model = replace(model, unet=replace(model.unet, dtype="bfloat16"))
            beside = f"; Table 4: {n2m.TABLE_4[name]} ms" if name in n2m.TABLE_4 else ""
            plan(name, lower_step(model, mesh, args.num, seconds), n2m.param_count(model), chip,
                 beside=beside)


# ---- Training (Sec. 4.1) ----

def plan_training(args):
    """A step of training: the gradients of each part of the batch, and the update."""
    devices, chip = tpu(args.topology)
    mesh, model = n2m.make_mesh(args.model_parallel, devices), n2m.MODELS[args.train]
    changes = {k: v for k in ("batch_size", "seconds") if (v := getattr(args, k))}
    model = replace(model, training=replace(model.training, **changes),
                    unet=replace(model.unet, dtype="bfloat16", remat=True))
    c, n = model.training, n2m.param_count(model)
    parts = args.accumulate or default_parts(c.batch_size, mesh)
    check(c.batch_size % parts == 0,
          f"--accumulate {parts} does not divide the batch of {c.batch_size}")
    audio = array(c.batch_size // parts, round(c.seconds * model.audio_rate))
    batch = across(mesh, n2m.Batch(audio, text_condition(model, audio.shape[0])))
    state = laid_out(jax.eval_shape(functools.partial(init_state, model, 0)),
                     state_layout(model, mesh))
    print(f"a training step, as `train.py {args.train} --batch-size {c.batch_size} --seconds "
          f"{c.seconds:g} --accumulate {parts} --model-parallel {args.model_parallel} --bf16 "
          f"--remat` runs it on {args.topology}\n{HEADER}")
    with jax.set_mesh(mesh):
        key = jax.eval_shape(jax.random.key, 0)
        lowered = gradients.lower(state.params, model, key, batch)
        step = plan(f"gradients x {parts}", lowered, n, chip, parts)
        lowered = update.lower(state, model, state.ema)  # gradients lie as their averages do
        step += plan("update", lowered, n, chip)
    print(f"{args.train}: {step:.0f} ms a step, {step / 1e3 * c.steps / 86400:.1f} days for the "
          f"{c.steps} steps of Table 2")


# ---- Command line ----

def parse_args(argv=None):
    parser = new_parser("plan.py", __doc__)
    add, count = parser.add_argument, number(int, 1)
    add("topology", metavar="TPU", help="such as v4:2x2x1")
    add("--only", choices=tuple(n2m.MODELS), metavar="MODEL", help="one row of Table 4")
    add("--train", choices=tuple(n2m.MODELS), metavar="MODEL", help="a training step, not Table 4")
    add("--model-parallel", type=count, default=1, metavar="N",
        help="devices that share a matrix (default: 1)")
    add("--num", type=count, default=4, metavar="N", help="clips (default: 4, as in Table 4)")
    add("--seconds", type=number(float, 0.01), help="of a clip (default: 30, or with --train what "
        "the model is trained on)")
    add("--batch-size", type=count, metavar="N", help="of --train (default: the paper's)")
    add("--accumulate", type=count, metavar="N",
        help="parts of a batch (default: as few as leave a device 8 clips)")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    run_command(plan_training if args.train else plan_sampling, args)


if __name__ == "__main__":
    main()
