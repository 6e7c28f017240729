"""Table 4: on the devices that are here, or on a TPU that is not, by its compiler (Sec. 4.2.2).

    python tools/plan.py --here                               # measured; eight minutes on a GPU
    pip install "jax[tpu]"                                    # brings the compiler for the rest
    python tools/plan.py v4:2x2x1                             # Table 4: a step of each model
    python tools/plan.py v4:2x2x1 --only spectrogram_vocoder
    JAX_OPTIMIZATION_LEVEL=O1 python tools/plan.py v4:2x2x1   # compiled in a third of the time
    python tools/plan.py v4:4x4x4 --train waveform_generator --batch-size 2048

Compiles the programs that sample.py and train.py run. For a TPU, their time is an estimate from the
compiler's own counts: the larger of arithmetic and memory traffic at the chip's peak rates, plus
collectives. With --here it is the median of 20 runs, beside what a large matrix product reaches.
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
import numpy as np
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


def array(*shape):
    """An array that is not there: what a program is compiled for."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


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
    return n2m.Condition(text=jnp.zeros((rows, L, E)), text_mask=jnp.ones((rows, L), bool))


def collectives(hlo: str) -> tuple[dict, int]:
    """{kind: number} of a compiled program's collectives, and about the bytes on a chip's links:
    those of the results. A TPU's compiler writes a reduce-scatter as an all-reduce, which counts
    twice."""
    size = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
    counts, total = {}, 0
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", hlo):
        sent = sum(size.get(t, 4) * math.prod(int(d) for d in dims.split(",") if d)
                   for t, dims in re.findall(r"(\w+)\[([\d,]*)\]", result))
        counts[kind] = counts.get(kind, 0) + 1
        total += sent * (2 if kind == "all-reduce" else 1)  # a ring reduces, then gathers
    return counts, total


def plan(name: str, lowered, params: float, chip: Chip, repeat: int = 1, beside: str = "", held=()):
    """Compiles a program and prints its row. Returns the ms that `repeat` runs of it take.

    `held` are arrays that lie on the chips meanwhile, though it does not take them.
    """
    begin = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - begin
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    counts, sent = collectives(compiled.as_text())
    arithmetic, traffic, links = (1e3 * repeat * a for a in (
        cost["flops"] / chip.flops, cost["bytes accessed"] / chip.hbm, sent / chip.links))
    step = max(arithmetic, traffic) + links
    kinds = " + ".join(f"{n} {kind}" for kind, n in counts.items()) or "no collectives"
    beside_it = sum(a.dtype.itemsize * math.prod(a.sharding.shard_shape(a.shape))
                    for a in jax.tree.leaves(held))
    used = (memory.argument_size_in_bytes + memory.output_size_in_bytes + beside_it
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes) / 2**30
    print(f"{name:25s} {params / 1e6:6.1f} M {arithmetic:8.1f} ms {traffic:9.1f} ms "
          f"{links:9.2f} ms {step:7.1f} ms {used:7.2f} GiB {seconds:10.0f} s   {kinds}{beside}",
          flush=True)
    check(used <= chip.memory, f"{name}: {used:.1f} GiB do not fit a chip of {chip.memory} GiB; a "
          "larger topology does, or in training --accumulate")
    return step


# ---- Sampling (Sec. 4.2.2) ----

def step_inputs(model: n2m.Model, num: int, seconds: float):
    """(params, x_t, condition, keys) of a denoising step of `num` clips."""
    cfg = model.unet
    previous = jnp.zeros((num, round(seconds * (model.low_rate or n2m.MEL_RATE))))
    previous = n2m.log_mel(previous) if cfg.aligned_channels else previous
    given = text_condition(model, num)
    condition = n2m.sampling_condition(model, given, previous, seconds)
    x_t = jnp.zeros((num, n2m.padded_length(cfg, round(seconds * model.rate)), cfg.out_channels))
    params = n2m.init_params(jax.random.key(0), cfg)
    params = jax.tree.map(lambda p: p.astype(cfg.dtype), params)  # as `sample.py` does
    return params, x_t, condition, jax.random.split(jax.random.key(0), num)


def lower_step(model: n2m.Model, mesh, num: int, seconds: float):
    """One denoising step, with guidance, clipping and noise: a chunk of `sample`. And its inputs,
    as arrays that are not there."""
    params, *rest = jax.eval_shape(functools.partial(step_inputs, model, num, seconds))
    inputs = laid_out(params, n2m.shardings(model.unet, mesh)), *across(mesh, tuple(rest))
    params, x_t, condition, keys = inputs
    updates = n2m.Update(*[array(1)] * len(n2m.Update._fields))
    with jax.set_mesh(mesh):
        lowered = n2m._sample_chunk.lower(params, model, x_t, condition, keys, 1, updates)
    return lowered, inputs


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
            lowered, _ = lower_step(model, mesh, args.num, seconds)
            plan(name, lowered, n2m.param_count(model), chip, beside=beside)


def median_seconds(*functions, times=20) -> list[float]:
    """Of each function, called in turn, after two rounds that warm up. A function returns what must
    be waited for."""
    took = []
    for _ in range(times + 2):
        row = []
        for function in functions:
            begin = time.perf_counter()
            jax.block_until_ready(function())
            row.append(time.perf_counter() - begin)
        took.append(row)
    return np.median(took[2:], axis=0).tolist()


def product_rate(device, n: int) -> float:
    """The operations a second of a bfloat16 matrix product (n, n) x (n, n) on one device."""
    a = jax.device_put(jnp.ones((n, n), jnp.bfloat16), device)
    product = jax.jit(lambda a: a @ a)
    return 2 * n**3 / median_seconds(lambda: product(a))[0]


def operations(model: n2m.Model, num: int, seconds: float) -> float:
    """Of a denoising step, before compilation. JAX counts them on a CPU, whatever else is here."""
    lowered, _ = lower_step(model, serving_mesh(num, 1, jax.devices("cpu")[:1]), num, seconds)
    return lowered.cost_analysis()["flops"]


def measure_here(args):
    """Table 4 on the devices that are here: each model, the median of 20 steps of it."""
    if jax.config.jax_platforms:  # JAX_PLATFORMS=cuda leaves no CPU to count `operations` on
        jax.config.update("jax_platforms", jax.config.jax_platforms + ",cpu")
    device, seconds = jax.devices()[0], args.seconds or 30.0
    check(device.platform != "cpu" or args.tiny, "--here: no accelerator is here, and the "
          "models of Table 4 take minutes a step without; --tiny measures the small ones")
    mesh = serving_mesh(args.num, args.model_parallel)
    rate = product_rate(device, 1024 if args.tiny else 8192) * mesh.size
    print(f"a denoising step of {args.num} clips of {seconds:g} s in bfloat16, on {mesh.size} x "
          f"{device.device_kind}, where a matrix product reaches {rate / 1e12:.1f} TFLOP/s\n"
          f"{'model':25s} {'step':>10s} {'of the product':>15s} {'memory':>10s} compiled in")
    for name, model in n2m.MODELS.items():
        if args.only not in (None, name) or args.tiny and name not in n2m.TINY:
            continue
        model = n2m.tiny(model) if args.tiny else model
        model = replace(model, unet=replace(model.unet, dtype="bfloat16"))
        lowered, inputs = lower_step(model, mesh, args.num, seconds)
        begin = time.monotonic()
        compiled, took = lowered.compile(), time.monotonic() - begin
        layout = jax.tree.map(lambda a: a.sharding, inputs)
        make = functools.partial(step_inputs, model, args.num, seconds)
        params, x_t, condition, keys = jax.jit(make, out_shardings=layout)()
        updates = n2m.Update(*jnp.full((len(n2m.Update._fields), 1), 0.5))

        def step():
            nonlocal x_t  # whose memory each step takes over
            x_t = compiled(params, x_t, condition, keys, 1, updates)
            return x_t

        ms = 1e3 * median_seconds(step)[0]
        share = operations(model, args.num, seconds) / (ms / 1e3) / rate
        used = compiled.memory_analysis().temp_size_in_bytes
        beside = f"   Table 4: {n2m.TABLE_4[name]} ms" if name in n2m.TABLE_4 else ""
        print(f"{name:25s} {ms:7.1f} ms {100 * share:13.0f} % {used / 2**30:6.2f} GiB "
              f"{took:10.0f} s{'' if args.tiny else beside}", flush=True)


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
    condition = jax.eval_shape(functools.partial(text_condition, model, audio.shape[0]))
    batch = across(mesh, n2m.Batch(audio, condition))
    state = laid_out(jax.eval_shape(functools.partial(init_state, model, 0)),
                     state_layout(model, mesh))
    print(f"a training step, as `train.py {args.train} --batch-size {c.batch_size} --seconds "
          f"{c.seconds:g} --accumulate {parts} --model-parallel {args.model_parallel} --bf16 "
          f"--remat` runs it on {args.topology}\n{HEADER}")
    with jax.set_mesh(mesh):
        key = jax.eval_shape(jax.random.key, 0)
        lowered = gradients.lower(state.params, model, key, batch)
        held = state.ema, state.opt, state.ema if parts > 1 else ()  # the last, of their mean
        step = plan(f"gradients x {parts}", lowered, n, chip, parts, held=held)
        lowered = update.lower(state, model, state.ema)  # gradients lie as their averages do
        step += plan("update", lowered, n, chip)
    print(f"{args.train}: {step:.0f} ms a step, {step / 1e3 * c.steps / 86400:.1f} days for the "
          f"{c.steps} steps of Table 2")


# ---- Command line ----

def parse_args(argv=None):
    parser = new_parser("plan.py", __doc__)
    add, count = parser.add_argument, number(int, 1)
    where = parser.add_mutually_exclusive_group(required=True).add_argument
    where("topology", nargs="?", metavar="TPU", help="such as v4:2x2x1")
    where("--here", action="store_true", help="measure on the devices of this machine instead")
    add("--tiny", action="store_true", help="with --here, the small models")
    add("--only", choices=tuple(n2m.MODELS), metavar="MODEL", help="one row of Table 4")
    add("--train", choices=tuple(n2m.MODELS), metavar="MODEL", help="a training step, not Table 4")
    add("--model-parallel", type=count, default=1, metavar="N",
        help="devices that share a matrix (default: 1)")
    add("--num", type=count, metavar="N", help="clips (default: 4, as in Table 4)")
    add("--seconds", type=number(float, 0.01), help="of a clip (default: 30, or with --train what "
        "the model is trained on)")
    add("--batch-size", type=count, metavar="N", help="of --train (default: the paper's)")
    add("--accumulate", type=count, metavar="N",
        help="parts of a batch (default: as few as leave a device at most 8 clips)")
    args = parser.parse_args(argv)
    if args.here and args.train or args.tiny and not args.here:
        parser.error("--here measures a step of sampling, with --tiny of the small models; --train "
                     "is planned for a TPU that is not here")
    if args.train and (args.only or args.num) or not args.train and (
            args.batch_size or args.accumulate):
        parser.error("--batch-size and --accumulate are --train's, --only and --num Table 4's")
    args.num = args.num or 4
    return args


def main(argv=None):
    args = parse_args(argv)
    command = plan_training if args.train else measure_here if args.here else plan_sampling
    run_command(command, args)


if __name__ == "__main__":
    main()
