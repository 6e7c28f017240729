"""What a sceptical reader checks: noise2music.py against the paper, T5 against its reference."""

import ast
import functools
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import warnings
import zlib
from collections import namedtuple
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from unittest.mock import Mock

# Compiling takes nine tenths of the time: each program once (see `compiled`), and not optimised.
os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
               "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | os.environ

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import soundfile

# XLA's older emitters compile in half the time; a flag that XLA does not know ends the process.
if jax.__version_info__ < (0, 12):
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false")

import noise2music as n2m
import sample
import t5_encoder
import train
from t5_encoder import (T5, T5Config, count_tokens, encode, load_t5, position_buckets, random_t5,
                        read_safetensors, save_t5, tokenize, write_safetensors)

train.WAITS = (0.05,)  # as short as tests may wait for what is not there
reference = pytest.mark.reference  # needs the extra "reference"; skipped, with a reason, without it


@pytest.fixture(scope="session", autouse=True)
def compiled(tmp_path_factory):
    """What is compiled is kept, for other workers and for the processes that tests start."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    jax.config.update("jax_compilation_cache_dir", folder)


# ---- noise2music.py: helpers ----

ROOT = Path(__file__).parent
close = np.testing.assert_allclose
rng = lambda seed=0: np.random.default_rng(seed)
normal = lambda *shape, seed=0: jnp.float32(rng(seed).normal(size=shape))


def alpha_sigma64(name, t):
    """alpha_t and sigma_t in float64, each schedule as one reads it (not by its log-SNR)."""
    t = np.asarray(t, np.float64)
    if name.startswith("cosine"):
        a, b = np.arctan(np.exp(10)) - np.arctan(np.exp(-10)), np.arctan(np.exp(-10))
        alpha, sigma = np.sin(a * (1 - t) + b), np.sin(a * t + b)  # cos(x) = sin(pi / 2 - x)
        sigma = sigma * 10 ** ({"cosine": 0, "cosine_quiet": -15}[name] / 20)  # beside alpha
        return alpha / np.hypot(alpha, sigma), sigma / np.hypot(alpha, sigma)
    if name == "linear":
        integral = 1e-4 + 0.1 * t + (20 - 0.1) * t**2 / 2  # of beta
        return np.exp(-integral / 2), np.sqrt(-np.expm1(-integral))
    return np.sqrt(1 - (0.0001 + 0.0199 * t)), np.sqrt(0.0001 + 0.0199 * t)


def small_unet(**changes):
    """Sizes that all differ, so that a swapped axis fails: widths 6, 12, 18; H 3, K 5; E 7."""
    cfg = n2m.UNetConfig(6, 5, 2, (3, 2), (2, 3), (1, 2), (False, True), (True, True), 3,
                         2, 1, 0, text_width=7, head_width=5, groups=3)
    return replace(cfg, **changes)


NO_TEXT = dict(self_attention=(False, False), cross_attention=(False, False), attention_heads=0)
T, L = 6 * 14, 11  # 14 frames at the bottom, 11 tokens


small_model = lambda **unet: replace(n2m.MODELS["waveform_cascader"], unet=small_unet(**unet))


def random_params(cfg, seed=0):
    """No zeros and no identities: every parameter matters."""
    g = rng(seed)

    def draw(p):
        noise, fan_in = g.normal(size=p.shape), math.prod(p.shape[:-1])
        return jnp.float32(0.5 + 0.5 * noise if len(p.shape) == 1 else 0.7 * noise / fan_in**0.5)

    return jax.tree.map(draw, n2m.unet_spec(cfg))


def random_condition(cfg, b=3, t=T, seed=1):
    low_fi, bottom = cfg.in_channels > cfg.out_channels, t // math.prod(cfg.strides)
    mask = jnp.arange(L) < jnp.array([L, 4, 1, 7, 2])[:b, None]
    text = (normal(b, L, cfg.text_width, seed=seed + 2), mask) if any(cfg.cross_attention) else ()
    return n2m.Condition(
        normal(b, t, 1, seed=seed) if low_fi else None,
        normal(b, bottom, cfg.aligned_channels, seed=seed + 1) if cfg.aligned_channels else None,
        *text)


jit_unet = jax.jit(n2m.unet, static_argnames="cfg")

# ---- noise2music.py: tables 2, 3, 4, 8, 9, typed a second time ----

TABLES_2_3_4 = """
waveform_generator 724M 1600k 64 simplified cosine front_heavy 0 10 1000 25
waveform_cascader 487M 460k 64 simplified linear front_heavy 1 5 800 75
spectrogram_generator 745M 1800k 96 sigma linear back_heavy_eval 0 5 1000 8.3
spectrogram_vocoder 25.7M 840k 0 simplified linear front_heavy 0 None 100 29.9
superresolution_cascader 81M 270k 0 simplified linear front_heavy 0 None 800 71.7
""".strip().splitlines()
NAMES = tuple(row.split()[0] for row in TABLES_2_3_4)
PAPER_ROUTES = {route: n2m.ROUTES[route] for route in ("waveform", "spectrogram")}
TABLE_9_AND_SECTIONS_3_3_AND_4_1 = """
256 7 6 444444 112344 333444 FFFTTT FFFTTT 8 3200 3200 None 2048 30
256 7 5 44444 11234 33466 FFFFF FFFTT 8 16000 16000 3200 2048 3.2
256 9 5 43222 12234 66666 FFFTT FFFTT 8 100 16000 None 2048 30
128 5 4 2445 1124 4444 FFFF FFFF 0 16000 16000 None 2048 3.2
256 7 4 4444 1122 4444 FFFF FFFF 0 24000 24000 16000 4096 3.2
""".strip().splitlines()
SECTION_4_1 = (1e-4, 10_000, 2_500_000, 0.9, 0.999, 0.9999, 0.1)  # for all five
CASCADER = [(0.05, 400), (0.15, 200), (0.3, 150), (0.5, 50)]
FRONT_HEAVY = dict(zip(NAMES, [  # Table 8: (total time, steps) of each segment
    [(0.01, 200), (0.04, 400), (0.15, 200), (0.3, 150), (0.5, 50)], CASCADER,
    [(0.01, 400), (0.04, 800), (0.15, 400), (0.3, 300), (0.5, 100)],
    [(0.05, 50), (0.15, 30), (0.3, 15), (0.5, 5)], CASCADER]))
UNIFORM = dict(zip(NAMES, (1000, 800, 1000, 100)))  # the fifth model has no such list
ALL_STEP_SCHEDULES = [(name, schedule) for name in NAMES for schedule in n2m.TABLE_8[name]]
each_model = pytest.mark.parametrize("name", NAMES)


def test_the_tables_field_by_field():
    assert tuple(n2m.MODELS)[:5] == NAMES
    for (name, m), row, more in zip(n2m.MODELS.items(), TABLES_2_3_4,
                                    TABLE_9_AND_SECTIONS_3_3_AND_4_1):
        u, c, i = m.unet, m.training, m.inference
        assert m.name == name and n2m.uses_text(m) == bool(c.token_length) == bool(i.cfg_scale)
        steps = len(n2m.denoising_times(n2m.step_schedules(m)[i.step_schedule], i.steps)) - 1
        assert row == (f"{name} {c.params / 1e6:g}M {c.steps / 1e3:g}k {c.token_length} "
                       f"{c.loss_weight} {c.noise_schedule} {i.step_schedule} {i.gamma:g} "
                       f"{i.cfg_scale and int(i.cfg_scale)} {steps} {n2m.TABLE_4[name]:g}")
        columns = u.strides, u.channels, u.blocks, u.self_attention, u.cross_attention
        digits = " ".join("".join(f"{v!s:.1}" for v in column) for column in columns)
        assert more == (f"{u.base_dimension} {u.kernel_size} {u.depth} {digits} "
                        f"{u.attention_heads} {m.rate} {m.audio_rate} {m.low_rate} "
                        f"{c.batch_size} {c.seconds:g}")
        assert (c.learning_rate, c.warmup_steps, c.decay_steps, c.beta1, c.beta2, c.ema,
                c.occlusion, c.clip_norm) == (*SECTION_4_1, None)
        assert (i.sampler, i.hum, i.keep_input) == ("ddpm", None, False)  # the rest is for `tiny`
        assert {len(column) for column in columns} == {u.depth}
    assert math.prod(n2m.MODELS["spectrogram_vocoder"].unet.strides) == n2m.HOP == 160
    for key, power in ("uniform", 1), ("quadratic", 2):
        curve = n2m.denoising_times(n2m.STEP_SCHEDULES[key], 12)
        close(curve, np.linspace(0, 1, 13) ** power, atol=1e-6)


@each_model
def test_table_8_and_the_times_that_it_gives(name):
    spread = lambda segments: [total / n for total, n in segments for _ in range(n)]
    expected = {"front_heavy": spread(FRONT_HEAVY[name])}
    if name in UNIFORM:
        expected["back_heavy"] = expected["front_heavy"][::-1]
        expected["uniform"] = [1 / UNIFORM[name]] * UNIFORM[name]
    if name == "spectrogram_generator":
        expected["back_heavy_eval"] = spread([(0.3, 50), (0.3, 150), (0.2, 300), (0.2, 500)])
    schedules = n2m.TABLE_8[name]
    assert schedules.keys() == expected.keys()
    assert n2m.step_schedules(n2m.MODELS[name]) == n2m.STEP_SCHEDULES | schedules
    for key, deltas in expected.items():
        close(schedules[key], deltas, rtol=1e-12)
        N, times = len(deltas), n2m.denoising_times(deltas)
        assert times.dtype == np.float64 and times[0] == 0 and times[-1] == 1
        close(times, [math.fsum(deltas[:n]) for n in range(N + 1)], rtol=1e-9)
        close(n2m.denoising_times(deltas, N), times, rtol=1e-12)
        assert (np.diff(np.float32(times)) > 0).all()  # also on the device
        for steps in (1, 2, 7, 64, 2 * N):
            curve = n2m.denoising_times(deltas, steps)
            assert len(curve) == steps + 1 and curve[0] == 0 and curve[-1] == 1
            assert (np.diff(curve) > 0).all()
            if steps > 7:  # half of the steps reach the same time
                close(curve[steps // 2], times[N // 2], rtol=1e-9)


# ---- noise2music.py: schedules, Eqs. 2 to 6 ----

@pytest.mark.parametrize("name, ends", [("cosine", (20, -20)), ("linear", (9.21, -10.05)),
                                        ("linear_eq5", (9.21, 3.89)), ("cosine_quiet", None)])
def test_schedules_against_their_formulas(name, ends):
    """alpha_t and sigma_t of Eqs. 3, 5, 6, by numpy and by jax. The printed Eq. 5 ends at 3.89."""
    schedule, t = n2m.SCHEDULES[name], np.float32(np.linspace(0, 1, 1001))
    alpha, sigma = alpha_sigma64(name, t)
    logsnr = schedule(np.float64(t), np)
    close(logsnr, 2 * np.log(alpha / sigma), rtol=1e-7, atol=1e-7)
    close(schedule(jnp.asarray(t)), logsnr, rtol=2e-6, atol=1e-6)
    assert (np.diff(logsnr) < 0).all()
    a, s = n2m.alpha_sigma(jnp.float32(logsnr))
    close(a, alpha, rtol=3e-6), close(s, sigma, rtol=3e-6), close(a**2 + s**2, 1, rtol=1e-6)
    if ends:
        close(logsnr[[0, -1]], ends, atol=5e-3)


def test_linear_is_the_schedule_of_ho_et_al():
    """Their step n of 1..1000 is our t = (n - 1) / 999: "begun at sigma_0^2 = 1e-4" is step 1."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    ho = np.log(alpha_bar / (1 - alpha_bar))
    close(n2m.linear(np.arange(1000) / 999, np), ho, rtol=0, atol=0.07)
    close(n2m.linear(0.0, np), ho[0], rtol=1e-5)


# ---- noise2music.py: the sampler, Eq. 4 ----

def steps_of(name, times):
    """alpha_t, sigma_t, alpha_s, sigma_s of every step, from t = 1 down."""
    alpha, sigma = alpha_sigma64(name, times)
    return alpha[:0:-1], sigma[:0:-1], alpha[-2::-1], sigma[-2::-1]


@pytest.mark.parametrize("name", n2m.SCHEDULES)
@pytest.mark.parametrize("step_schedule", n2m.TABLE_8["spectrogram_generator"])
def test_updates_are_the_ddpm_posterior_and_eq_4_as_printed(name, step_schedule):
    """q(x_s | x_t, x_0) by conditioning the joint Gaussian of Eq. 2 on x_t.

    gamma 0 has its variance, 1 that of q(x_t | x_s)."""
    times = n2m.denoising_times(n2m.TABLE_8["spectrogram_generator"][step_schedule], 97)
    at, st, as_, ss = steps_of(name, times)
    covariance = at / as_ * ss**2  # x_t = (alpha_t / alpha_s) x_s + noise
    keep = covariance / st**2
    variances = [ss**2 - covariance**2 / st**2, st**2 - (at / as_ * ss) ** 2]
    variances.append(np.sqrt(variances[0] * variances[1]))  # of gamma 1/2
    new = 0 * at, as_, ss**2, "renoise", 0  # Eq. 2 about x0_hat
    eq_4 = [(keep, as_ - keep * at, v, "ddpm", gamma) for v, gamma in zip(variances, (0, 1, 0.5))]
    for keep, toward, variance, sampler, gamma in [*eq_4, new]:
        u = n2m.SAMPLERS[sampler](n2m.SCHEDULES[name], times, gamma)
        assert all(a.dtype == np.float32 and a.shape == (97,) for a in u)
        close(u[:3], (times[:0:-1], at, st), rtol=1e-6)
        close(u.keep[:-1], keep[:-1], rtol=1e-6)
        close(u.toward[:-1], toward[:-1], rtol=1e-5, atol=1e-12)
        close(u.noise[:-1] ** 2, variance[:-1], rtol=1e-4, atol=1e-14)
        assert (u.keep[-1], u.toward[-1], u.noise[-1]) == (0, 1, 0)  # the last step is x0_hat
        if sampler == "ddpm":
            x_t, eps = rng().normal(size=(2, 97))
            ratio, e = as_ / at, (at / st) ** 2 / (as_ / ss) ** 2  # e^(lambda_t - lambda_s)
            printed = ratio * x_t - (1 - e) * ratio * st * eps
            ours = u.keep * x_t + u.toward * (x_t - st * eps) / at
            close((ours / ratio)[:-1], (printed / ratio)[:-1], rtol=1e-5, atol=1e-5)


@functools.cache
def exact_sampler(name):
    """ancestral_scan with the exact noise prediction for clips of elements N(mu, std^2)."""

    def run(updates, keys, mu, std):
        def eps_fn(x_t, t):
            a, s = n2m.alpha_sigma(n2m.SCHEDULES[name](t))
            x0 = mu + std**2 * a * (x_t - a * mu) / (a**2 * std**2 + s**2)
            return (x_t - a * x0) / s

        x_1 = n2m.clip_noise(keys, 0, (4_000, 1))
        return n2m.ancestral_scan(eps_fn, x_1, keys, 1, updates)

    optimised = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
    return jax.jit(run, compiler_options=optimised)  # this one takes longer to run


def gaussian_through_eq_4(name, times, sampler, gamma, mu, std):
    """Mean and variance after Eq. 4 as printed, exactly, of x_1 ~ N(0, 1): a linear recursion."""
    m, v = 0.0, 1.0
    for n, (at, st, as_, ss) in enumerate(zip(*steps_of(name, times)), 1):
        gain = std**2 * at / (at**2 * std**2 + st**2)  # d E[x_0 | x_t] / d x_t
        x0 = mu + gain * (m - at * mu)
        if n == len(times) - 1:
            return x0, gain**2 * v
        if sampler == "renoise":  # Eq. 2 about x0
            m, v = as_ * x0, (as_ * gain) ** 2 * v + ss**2
            continue
        c = 1 - (at / st) ** 2 / (as_ / ss) ** 2
        m = as_ / at * (m - c * (m - at * x0))
        v = (as_ / at * (1 - c * (1 - at * gain))) ** 2 * v
        v += (c * ss**2) ** (1 - gamma) * (c * st**2) ** gamma


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("sampler, gamma", [("ddpm", 0), ("ddpm", 1), ("renoise", 0)])
def test_a_gaussian_is_sampled_with_the_moments_of_eq_4(name, sampler, gamma):
    """Few steps are biased, as much as Eq. 4 is, on every list of Table 8. A point is exact."""
    keys, point = jax.random.split(jax.random.key(0), 4), rng(3).uniform(-0.9, 0.9, (4, 4_000, 1))
    times_of = lambda model, schedule, N: n2m.denoising_times(n2m.TABLE_8[model][schedule], N)
    for row in ALL_STEP_SCHEDULES:
        updates = n2m.SAMPLERS[sampler](n2m.SCHEDULES[name], times_of(*row, 37), gamma)
        run = lambda mu, std: exact_sampler(name)(updates, keys, jnp.float32(mu), jnp.float32(std))
        close(run(point, 0 * point), point, atol=2e-5)
        x = np.asarray(run(0.3 + 0 * point, 0.12 + 0 * point), np.float64)
        mean, variance = gaussian_through_eq_4(name, times_of(*row, 37), sampler, gamma, 0.3, 0.12)
        close(x.mean(), mean, atol=5 * math.sqrt(variance / x.size))
        close(x.var(), variance, rtol=5 * math.sqrt(2 / x.size))
    if sampler == "ddpm":  # and all steps have next to no bias
        times = times_of("waveform_generator", "front_heavy", None)
        mean, variance = gaussian_through_eq_4(name, times, sampler, gamma, -0.2, 0.2)
        close(mean, -0.2, atol=0.015), close(math.sqrt(variance), 0.2, rtol=0.06)


def test_percentile_and_dynamic_clip_against_numpy():
    """The smallest v with a share q at or below it: elements many of them equal, none, only one.

    A clip is clipped on its own, over time and channels, never below 1, and is then in [-1, 1]."""
    g, percentile = rng(), jax.jit(n2m.percentile, static_argnums=1)
    for a in (g.normal(size=(3, 1001)) ** 2, g.integers(0, 4, (3, 200)), np.zeros((2, 5)),
              g.uniform(size=(2, 1)), np.logspace(-4, 4, 2000)[None]):
        for q in (0.001, 0.375, 0.5, 0.995, 1):
            expected = np.quantile(np.float32(a), q, axis=1, method="inverted_cdf")
            close(percentile(jnp.float32(a), q), expected, rtol=1e-6, atol=a.max() * 2.0**-31)
    x = normal(9, 331, 3) * np.float32([0.06, 0.2, 0.8, 0.3, 1, 4, 2, 7, 28])[:, None, None]
    s = np.quantile(np.abs(x), 0.995, axis=(1, 2), keepdims=True, method="inverted_cdf")
    y, s = np.asarray(n2m.dynamic_clip(x)), np.maximum(s, 1)
    close(y, np.clip(x, -s, s) / s, rtol=1e-5, atol=1e-6)
    assert np.abs(y).max() <= 1 and (s == 1).sum() == 3


@pytest.mark.parametrize("sampler, gamma", [("ddpm", 1), ("renoise", 0)])
def test_sample_is_the_loop_of_eq_4(monkeypatch, sampler, gamma):
    """Step by step, each x_s from x_t and the clipped x0_hat, with its own noise for each clip.

    Sampler, gamma, steps and their schedule are the model's; the chunks change nothing."""
    inference = n2m.InferenceConfig("back_heavy", gamma, 3.0, steps=51 * 2, sampler=sampler)
    model, calls = replace(small_model(), inference=inference), []
    stub = lambda params, model, x_t, t, condition: jnp.sin(5 * x_t + t) * params
    monkeypatch.setattr(n2m, "guided_eps", stub)
    keys, report = jax.random.split(jax.random.key(1), 2), lambda *a: calls.append(a)
    x_0 = n2m.sample(jnp.float32(2), model, n2m.Condition(), keys, T, progress=report)
    assert calls == [(34, 102), (68, 102), (102, 102)] and x_0.dtype == jnp.float32

    noise = [n2m.clip_noise(keys, n, (T, 1)) for n in range(103)]  # [0] is x_1
    assert np.abs(np.corrcoef(np.reshape(noise, (206, T))) - np.eye(206)).max() < 0.75
    close([np.mean(noise), np.std(noise)], [0, 1], atol=0.03)
    times = n2m.denoising_times(n2m.TABLE_8["waveform_cascader"]["back_heavy"], 102)
    x, clipped = noise[0], 0
    for u, z in zip(zip(*n2m.SAMPLERS[sampler](n2m.linear, times, gamma)), noise[1:]):
        u = n2m.Update(*u)
        x0_hat = (x - u.sigma_t * stub(2, None, x, u.t, None)) / u.alpha_t
        clipped += np.abs(x0_hat).max() > 2
        x = u.keep * x + u.toward * n2m.dynamic_clip(x0_hat) + u.noise * z
    close(x_0, x, atol=1e-4)
    assert clipped > 10 and np.abs(x).max() <= 1


def test_hum_is_taken_out_and_nothing_else(monkeypatch):
    """Tones at hz, 2 hz, ... up to half the rate vanish, those beside them by their distance; 5 Hz
    away next to nothing changes, nor below the first."""
    t = np.arange(8000)[:, None] / 4000
    tones = lambda *hz: np.float32(0.1 * np.sin(2 * np.pi * t * hz + hz).sum(1))[None, :, None]
    music, hum = tones(0.5, 2, 195, 395, 605, 1994.5), tones(200, 399, 601.5, 1800, 2000)
    taken = lambda away, *hz: np.exp(-((away / 2) ** 2)) * tones(*hz)
    left = music - taken(5, 195, 395, 605) - taken(5.5, 1994.5)
    left += tones(399, 601.5) - taken(1, 399) - taken(1.5, 601.5)
    assert np.abs(hum).max() > 0.3
    loud = np.asarray(n2m.without_hum(np.sign(music), 4000, 200))
    assert np.abs(loud).max() == 1  # as its input was, though a part of it is gone
    model = replace(small_model(), rate=4000)
    monkeypatch.setattr(n2m, "_sample_chunk", lambda *_: music + hum)
    for hz, right in ((None, music + hum), (200, left)):
        model = replace(model, inference=replace(model.inference, hum=hz, steps=1))
        close(n2m.sample(None, model, None, jax.random.split(jax.random.key(0), 1), 8000), right,
              atol=2e-6)


def test_the_band_of_the_input_is_copied_and_no_other(monkeypatch):
    """Below the Nyquist frequency of its input, the output has the input's tones, above its own."""
    t = np.arange(6000)[:, None] / 2400
    tones = lambda *hz: np.float32(0.1 * np.sin(2 * np.pi * t * hz + hz).sum(1))[None, :, None]
    wrong, high, low = tones(0.4, 600, 796), tones(804, 1000), tones(0.8, 300, 799.6)
    model = replace(small_model(), rate=2400, low_rate=1600)
    monkeypatch.setattr(n2m, "_sample_chunk", lambda *_: wrong + high)
    for keep, hum, right in ((False, None, wrong + high), (True, 300.0, low + high)):
        inference = replace(model.inference, keep_input=keep, hum=hum, steps=1)
        model = replace(model, inference=inference)  # what the input has at 300 Hz is no hum
        close(n2m.sample(None, model, n2m.Condition(low_fi=low), jax.random.split(
            jax.random.key(0), 1), 6000), right, atol=2e-6)


@pytest.mark.parametrize("text, w", [(True, 0), (True, 1), (True, None), (True, 2.5), (False, 7.0)])
def test_guidance_is_that_of_two_calls(monkeypatch, text, w):
    """And of one for a model without text, which ignores it."""
    model, t = small_model(**({} if text else NO_TEXT)), 0.37
    model = replace(model, inference=replace(model.inference, cfg_scale=w))
    params, condition = random_params(model.unet), random_condition(model.unet)
    call = lambda on: jit_unet(params, model.unet, x_t, jnp.full(3, t), condition, jnp.full(3, on))
    x_t = normal(3, T, 1)
    eps_c, eps_u = call(1.0), call(0.0)
    monkeypatch.setattr(n2m, "unet", jit_unet)
    guided = n2m.guided_eps(params, model, x_t, t, condition)
    w = w if text and w is not None else 1
    close(guided, w * eps_c + (1 - w) * eps_u, atol=2e-4)
    assert not text or float(jnp.abs(eps_c - eps_u).max()) > 0.05


# ---- noise2music.py: the U-Net, against torch ----

def torch_unet(torch, p, cfg, x_t, t, c, text_on):
    """Figs. 1 and 5 in torch's own layers, channels first; parameters are ours, laid out for it."""
    nn = torch.nn.functional
    linear = lambda p, x: nn.linear(x.mT, p["w"].T, p["b"]).mT  # x (B, C, T)
    conv = lambda p, x: nn.conv1d(x, p["w"].permute(2, 1, 0), p["b"], padding="same")
    norm = lambda p, x: nn.group_norm(x, cfg.groups, p["scale"], p["bias"], eps=1e-5)

    def down(p, x, s):  # kernel 2 S, stride S; tap j of output i reads sample S i + j
        w = p["w"].reshape(2 * s, x.shape[1], -1)
        return nn.conv1d(nn.pad(x, (0, s)), w.permute(2, 1, 0), p["b"], stride=s)

    def up(p, x, s):  # input i writes samples S i .. S i + 2 S - 1; the bias has S phases
        w = p["w"].reshape(2, x.shape[1], s, -1)
        w = torch.cat([w[1], w[0]], dim=1).permute(0, 2, 1)  # (C_in, C_out, 2 S)
        y = nn.conv_transpose1d(x, w, stride=s)[..., : s * x.shape[2]]
        return y + p["b"].reshape(s, -1).T.repeat(1, x.shape[2])

    def attend(p, x, kv=None, mask=None):
        x = norm(p["norm"], x)
        kv = x if kv is None else kv
        heads = lambda y: y.reshape(y.shape[0], cfg.attention_heads, cfg.head_width, -1).mT
        q, k, v = (heads(linear(p[name], y)) for name, y in (("q", x), ("k", kv), ("v", kv)))
        y = nn.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, K)
        return linear(p["out"], y.mT.reshape(y.shape[0], -1, y.shape[2]))

    def feed_forward(p, x):
        return linear(p["out"], nn.silu(linear(p["hidden"], norm(p["norm"], x))))

    def block(x, p):
        scale, bias = linear(p["combine"], time).chunk(2, dim=1)
        x = x * (1 + scale) + bias
        h = conv(p["conv1"], nn.silu(norm(p["norm1"], x)))
        h = conv(p["conv2"], nn.silu(norm(p["norm2"], h)))
        x = linear(p["skip"], x) + h
        if "self_attention" in p:
            x = x + attend(p["self_attention"], x)
            x = x + feed_forward(p["self_attention"]["feed_forward"], x)
        if "cross_attention" in p:
            read = attend(p["cross_attention"], x, c.text.mT, c.text_mask[:, None, None])
            x = x + text_on[:, None, None] * read
            x = x + feed_forward(p["cross_attention"]["feed_forward"], x)
        return x

    exponents = torch.linspace(0, 1, cfg.base_dimension // 2, dtype=t.dtype, device=t.device)
    angles = 1000 * t[:, None] * 1e-4**exponents
    time = linear(p["time"], torch.cat([angles.sin(), angles.cos()], dim=1)[..., None])
    h = conv(p["entry"], (x_t if c.low_fi is None else torch.cat([x_t, c.low_fi], dim=2)).mT)
    skips = []
    for p_down, s in zip(p["down"], cfg.strides):
        skips.append(h)
        h = functools.reduce(block, p_down["blocks"], down(p_down["resample"], h, s))
    if c.aligned is not None:
        h = h + linear(p["aligned"], c.aligned.mT)
    for p_up, s, skip in list(zip(p["up"], cfg.strides, skips))[::-1]:
        h = functools.reduce(block, p_up["blocks"], up(p_up["resample"], h, s)) + skip
    return conv(p["exit"], h).mT


UNETS = {  # the last has strides of 1, and at the bottom fewer frames than taps
    "text and low_fi": small_unet(blocks=(2, 1)),
    "aligned": small_unet(in_channels=1, aligned_channels=5, strides=(2, 3), blocks=(1, 1),
                          kernel_size=4, **NO_TEXT),
    "low_fi": small_unet(strides=(1, 6), channels=(1, 3), blocks=(1, 1), kernel_size=15, **NO_TEXT),
}


def unet_case(cfg, t=T):
    """The arguments of `unet` but cfg."""
    times, text_on = jnp.array([0.013, 0.5, 0.98]), jnp.array([1.0, 0.0, 1.0])
    return (random_params(cfg), normal(3, t, cfg.out_channels), times,
            random_condition(cfg, t=t), text_on)


@functools.partial(jax.jit, static_argnames=("cfg", "pieces"))
def value_and_gradients(cfg, params, x_t, t, c, text_on, pieces=None):
    """Gradients of a fixed random projection of the output, by all inputs; clips cut in pieces."""
    cut = lambda a: a.reshape(len(a), pieces, -1, a.shape[2]) if pieces and a is not None else a

    def f(params, x_t, low_fi, aligned, text):
        condition = n2m.Condition(cut(low_fi), cut(aligned), text, c.text_mask)
        y = n2m.unet(params, cfg, cut(x_t), t, condition, text_on)
        assert y.shape == cut(x_t).shape
        y = y.reshape(x_t.shape)
        return jnp.sum(y * normal(*x_t.shape, seed=9)), y

    inputs = [params, x_t, *(a for a in c[:3])]
    argnums = [i for i, a in enumerate(inputs) if a is not None]
    (_, y), gradients = jax.value_and_grad(f, argnums, has_aux=True)(*inputs)
    return y, gradients


def all_close_relative(actual, expected, rtol=1e-4):
    largest = max(float(np.abs(e).max()) for e in jax.tree.leaves(expected))
    bound = lambda e: rtol * (np.abs(e).max() + 0.02 * largest)
    jax.tree.map(lambda a, e: close(a, e, rtol=0, atol=bound(e)), actual, expected)


@reference
@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_unet_against_torch(kind):
    """Values and gradients, with random parameters everywhere."""
    torch = pytest.importorskip("torch", reason="the U-Net is compared with torch's own layers")
    cfg, (params, x_t, t, c, text_on) = UNETS[kind], unet_case(UNETS[kind])
    y, gradients = value_and_gradients(cfg, params, x_t, t, c, text_on)
    tensor = lambda a: torch.tensor(np.asarray(a), dtype=torch.float64).requires_grad_()
    projection = normal(*x_t.shape, seed=9)
    p, x, floats, projection = jax.tree.map(tensor, (params, x_t, c[:3], projection))
    mask = None if c.text_mask is None else torch.tensor(np.asarray(c.text_mask))
    condition = n2m.Condition(*floats, mask)
    y_torch = torch_unet(torch, p, cfg, x, tensor(t), condition, tensor(text_on))
    (y_torch * projection).sum().backward()
    assert y.dtype == jnp.float32
    close(y, y_torch.detach().numpy(), atol=1e-4, rtol=1e-4)
    expected = p, x, *(a for a in floats if a is not None)
    all_close_relative(gradients, jax.tree.map(lambda a: a.grad.numpy(), expected))


@pytest.mark.parametrize("kind, pieces", [("text and low_fi", 7), ("aligned", 2), ("low_fi", 2)])
def test_remat_and_pieces_change_nothing(kind, pieces):
    """Values and gradients. Two of the three recompute their blocks."""
    cfg, case = UNETS[kind], unet_case(UNETS[kind])
    remat = replace(cfg, remat=pieces == 2)
    other = value_and_gradients(remat, *case, pieces=pieces)
    all_close_relative(other, value_and_gradients(cfg, *case))
    program = str(jax.make_jaxpr(n2m.unet, static_argnums=1)(case[0], remat, *case[1:]))
    assert program.count(" remat") == (2 * sum(cfg.blocks) if remat.remat else 0)


def test_a_tpu_is_given_clips_in_pieces(monkeypatch):
    """As many as make 8 sequences, of no fewer frames than a kernel reaches; others whole clips."""
    cfg = n2m.MODELS["superresolution_cascader"].unet  # 256 samples are a frame at the bottom
    for rows, frames, pieces in [(1, 2813, 29), (2, 2816, 4), (3, 2816, 4), (16, 2813, 1),
                                 (1, 24, 8), (1, 12, 4), (1, 2, 1), (1, 0, 1)]:
        assert n2m.pieces_of(cfg, rows, 256 * frames) == pieces, (rows, frames)

    cfg, plain, seen = UNETS["aligned"], n2m.unet.__wrapped__, []
    case = unet_case(cfg, t=144)

    def spy(params, cfg, x_t, t, condition, text_on):
        seen.append((x_t.shape, condition.aligned.shape))
        return plain(params, cfg, x_t, t, condition, text_on)

    def run():  # traced anew
        entered = lambda params, *inputs: n2m.on_a_tpu_in_pieces(spy)(params, cfg, *inputs)
        return jax.jit(entered)(*case)

    whole = run()
    for n, kind in ((3, "TPU v4"), (1, "TPU v5p"), (3, "NVIDIA H100")):  # 1 and 3 rows a device
        device = namedtuple("Device", "device_kind num_cores platform")(kind, 1, "any")
        mesh = jax.sharding.AbstractMesh((n, 1), ("data", "model"), abstract_device=device,
                                         axis_types=(jax.sharding.AxisType.Auto,) * 2)
        with jax.sharding.use_abstract_mesh(mesh):
            assert jax.eval_shape(run).shape == whole.shape
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind="TPU v4")])
    close(run(), whole, atol=1e-4)
    whole, three, eight = (((3, 144, 1), (3, 24, 5)), ((3, 3, 48, 1), (3, 3, 8, 5)),
                           ((3, 8, 18, 1), (3, 8, 3, 5)))
    assert seen == [whole, eight, three, whole, three]


def test_bfloat16_changes_little_and_tells_close_times_apart():
    """1000 t in bfloat16 would round t to 1 / 256: one clip, at three times."""
    cfg, t = UNETS["text and low_fi"], jnp.array([0.5, 0.5003, 0.5006])
    params, *inputs = unet_case(cfg)
    x_t, _, c, text_on = jax.tree.map(lambda a: jnp.repeat(a[:1], 3, 0), inputs)
    y, low = (np.asarray(jit_unet(params, replace(cfg, dtype=dtype), x_t, t, c, text_on))
              for dtype in ("float32", "bfloat16"))
    assert low.dtype == np.float32 and 1e-4 < np.abs(low - y).mean() / np.abs(y).mean() < 0.05
    assert np.corrcoef((y[2] - y[0]).ravel(), (low[2] - low[0]).ravel())[0, 1] > 0.9
    e, angles = n2m.time_embedding(t, 256), np.float64(t)[:, None] * 1e-4 ** np.linspace(0, 1, 128)
    close(e, np.hstack([np.sin(1000 * angles), np.cos(1000 * angles)]), atol=3e-4)


def test_bfloat16_with_the_weights_of_the_demo():
    """Its rms error in eps, without guidance and with that of the demo, of music-like tones."""
    model, params, _ = train.load_model(sample.DEMO, "waveform_generator")
    t, w = np.array([0.05, 0.3, 0.7]), model.inference.cfg_scale
    x = 0.2 * jnp.sin(np.outer([220, 330, 550], np.arange(4096)) * 2 * np.pi / 3_200)[..., None]
    logsnr = n2m.SCHEDULES[model.training.noise_schedule](t)
    x_t = n2m.diffuse(x, normal(*x.shape), logsnr)
    text = n2m.Condition(text=normal(3, 5, model.unet.text_width), text_mask=jnp.ones((3, 5), bool))
    both = jax.tree.map(lambda a: jnp.concatenate([a, a]), (x_t, jnp.float32(t), text))
    f32, bf16 = (jit_unet(params, replace(model.unet, dtype=dtype), *both, jnp.arange(6) < 3)
                 for dtype in ("float32", "bfloat16"))
    on, off = (bf16 - f32)[:3], (bf16 - f32)[3:]
    rms = lambda error: np.sqrt(np.mean(np.square(error), axis=(1, 2)))
    assert (1e-3 < rms(on)).all() and (rms(on) < 0.04).all() and (rms(off) < 0.04).all()
    assert w == 5 and (rms(w * on + (1 - w) * off) < 0.1).all()


@reference
@pytest.mark.parametrize("mean, dtype, atol", [
    (0, "float32", 1e-5), (5, "float32", 1e-4), (50, "float32", 3e-3), (30, "bfloat16", 3e-3)])
def test_group_norm_against_torch(mean, dtype, atol):
    """Moments by E[x^2] - E[x]^2 lose digits where the mean is large; too few to matter.

    In bfloat16 the output is rounded, to 8 bits, and nothing before it."""
    torch = pytest.importorskip("torch", reason="group_norm is compared with torch's")
    x = (mean + normal(3, 17, 12)).astype(dtype)
    p = {"scale": normal(12, seed=1), "bias": normal(12, seed=2)}
    tensor = lambda a: torch.tensor(np.asarray(a, np.float64))
    expected = torch.nn.functional.group_norm(tensor(x).mT, 4, *map(tensor, p.values())).mT
    y = n2m.group_norm(p, x, 4)
    assert y.dtype == dtype
    close(np.float64(y), expected, rtol=1e-7 if dtype == "float32" else 2**-8, atol=atol)
    assert np.isfinite(n2m.group_norm(p, jnp.full((1, 5, 12), 3e3), 4)).all()


# ---- noise2music.py: the five models of Table 2 ----

def count_by_hand(cfg):
    """Parameters, box by box of Figs. 1 and 5; kernel 2 S, an up-sampling bias for each phase."""
    base, hk = cfg.base_dimension, cfg.attention_heads * cfg.head_width
    fc = lambda i, o: (i + 1) * o
    feed_forward = lambda c: 2 * c + fc(c, 2 * c) + fc(2 * c, c)
    attention = lambda c, kv: 2 * c + fc(c, hk) + 2 * fc(kv, hk) + fc(hk, c) + feed_forward(c)
    total = fc(base, base) + fc(3 * cfg.in_channels, base) + fc(3 * base, cfg.out_channels)
    outer, rows = base, (cfg.channels, cfg.strides, cfg.blocks, cfg.self_attention)
    for multiple, s, n, sa, ca in zip(*rows, cfg.cross_attention):
        c = multiple * base
        total += fc(2 * s * outer, c) + fc(2 * c, s * outer)
        for w in (c, outer):  # down and up
            pair = fc(base, 2 * w) + 4 * w + 2 * fc(cfg.kernel_size * w, w) + fc(w, w)
            total += n * (pair + sa * attention(w, w) + ca * attention(w, cfg.text_width))
        outer = c
    return total + (fc(cfg.aligned_channels, outer) if cfg.aligned_channels else 0)


def test_init_has_the_declared_shapes_and_starts_as_zero_noise():
    """A new block is x -> x, even without a token, so an untrained network has a loss of 1."""
    cfg = small_unet(in_channels=1, aligned_channels=5, blocks=(1, 1))
    params, c = n2m.init_params(jax.random.key(0), cfg), random_condition(cfg)
    assert sum(a.size for a in jax.tree.leaves(params)) == count_by_hand(cfg)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}
    assert not jit_unet(params, cfg, *unet_case(cfg)[1:]).any()
    close(params["down"][1]["resample"]["w"].std() * math.sqrt(2 * 2 * 12), 1, atol=0.1)
    p, x = params["down"][1]["blocks"][0], normal(3, 7, 18)
    k, v = (p["cross_attention"][name]["w"] for name in "kv")
    assert (k != v).all()  # noise of its own for each
    y = n2m.block(p, cfg, x, normal(3, 6), c.text, c.text_mask & False, jnp.ones(3))
    close(y, x, atol=1e-6)


@pytest.mark.parametrize("H, T, L", [(2, 13, 7), (1, 1400, 3001)], ids=("plain", "long"))
def test_attend_is_that_of_jax_nn(H, T, L):
    """Also of so many queries that they are taken a part at a time, the last part smaller; also its
    gradients; a clip without a token gets the average."""
    q, k, v = normal(3, H, T, 5), normal(3, H, L, 5, seed=1), normal(3, H, L, 5, seed=2)
    mask = np.arange(L) < np.array([[L], [L // 3], [0]])
    heads_last = lambda *arrays: [a.swapaxes(1, 2) for a in arrays]
    plain = lambda q, k, v, mask: jax.nn.dot_product_attention(
        *heads_last(q, k, v), mask=mask[:, None, None]).swapaxes(1, 2)
    close(n2m.attend(q, k, v, mask), plain(q, k, v, mask), atol=1e-5)
    close(n2m.attend(q, k, v), plain(q, k, v, mask | True), atol=1e-5)
    of = lambda f: jax.grad(lambda *qkv: jnp.sum(f(*qkv, mask) ** 2), argnums=(0, 1, 2))(q, k, v)
    for ours, theirs in zip(of(n2m.attend), of(plain)):
        close(ours, theirs, atol=1e-4 * np.abs(theirs).max())


LENGTHS_OF_30_S = dict(zip(NAMES, (98_304, 480_256, 3_072, 480_000, 720_128)))


@each_model
def test_the_full_models_by_shape(name):
    """Parameters as in Table 2; 30.72 s divides by all strides, 30 s is padded to it or below."""
    model, cfg = n2m.MODELS[name], n2m.MODELS[name].unet
    assert n2m.param_count(name) == n2m.param_count(model) == count_by_hand(cfg)
    assert abs(n2m.param_count(name) / model.training.params - 1) < 0.025
    T = round(30.72 * model.rate)
    assert n2m.padded_length(cfg, T) == T
    assert n2m.padded_length(cfg, 30 * model.rate) == LENGTHS_OF_30_S[name] <= T
    array = lambda *shape, dtype=jnp.float32: jax.ShapeDtypeStruct(shape, dtype)
    text = (array(2, 64, 2048), array(2, 64, dtype=bool)) if n2m.uses_text(model) else ()
    c = n2m.Condition(array(2, T, 1) if model.low_rate else None,
                      array(2, T // 160, 80) if "vocoder" in name else None, *text)
    x_t = array(2, T, 80 if name == "spectrogram_generator" else 1)
    run = lambda params, x_t, t, c: n2m.unet(params, cfg, x_t, t, c, t)
    params = jax.eval_shape(n2m.init_params, jax.random.key(0), cfg)
    assert jax.eval_shape(run, params, x_t, array(2), c) == x_t


# ---- noise2music.py: resampling and log-mel ----

@reference
@pytest.mark.parametrize("t, length", [
    (320, 1600), (1600, 320), (640, 960), (960, 641), (441, 240), (442, 240), (101, 103),
    (103, 101), (20, 10), (10, 20), (16, 15), (12, 12)])
def test_fft_resample_against_scipy(t, length):
    """On noise, so that the Nyquist bin of even lengths counts."""
    signal = pytest.importorskip("scipy.signal", reason="fft_resample is compared with scipy's")
    x = rng(2).normal(size=(2, 3, t))
    expected = signal.resample(x, length, axis=-1)
    close(n2m.fft_resample(x, length, np), expected, atol=1e-12)
    y = n2m.fft_resample(jnp.float32(x), length)
    assert y.dtype == np.float32
    close(y, expected, atol=1e-5)


sine = lambda hz, n=8000: jnp.float32(np.sin(2 * np.pi * hz * np.arange(n) / 16_000)[None])


def test_log_mel_is_decibels_within_its_range():
    """20 dB are 0.4. A full-scale sine has 1.7 to 9.9 dB: near the top of 10, and not beyond."""
    silence = n2m.log_mel(jnp.zeros((2, 1759)))
    assert silence.shape == (2, 10, 80) and (silence == -1).all()  # with which it is padded
    loud = n2m.log_mel(100 * normal(1, 3200))
    assert float(loud.max()) == 1 and float(loud.min()) >= -1
    tones = sine(np.array([59, 7727.5, *np.geomspace(50, 7900, 100)])[:, None], 1600)[0]
    full, quiet, quieter = (n2m.log_mel(g * tones)[:, 5].max(axis=1) for g in (1, 0.03, 0.003))
    close([50 * full.min() - 40, 50 * full.max() - 40], [1.7, 9.9], atol=0.1)
    close(quiet - quieter, 0.4, atol=1e-3), close(full - quiet, 0.609, atol=1e-3)


@reference
def test_mel_filters_against_transformers():
    audio_utils = pytest.importorskip("transformers.audio_utils", reason="mel filters are compared")
    bank = audio_utils.mel_filter_bank(513, 80, 0.0, 8000.0, 16_000, norm=None, mel_scale="htk")
    close(n2m.mel_filters(), bank, atol=1e-6)


def test_stft_against_the_definition():
    """Frame k: 640 Hann-weighted samples about 160 k + 80, zeros beyond the ends."""
    x = rng().normal(size=1600)
    spectrum = np.asarray(n2m.stft(jnp.float32(x[None])))
    assert spectrum.shape == (1, 10, 513)
    window, padded = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(640) / 640), np.pad(x, 1000)
    for k in (0, 1, 5, 9):
        n = np.arange(160 * k + 80 - 320, 160 * k + 80 + 320)
        fourier = np.exp(-2j * np.pi * np.outer(np.arange(513), n) / 1024)
        expected = np.abs(fourier @ (padded[n + 1000] * window)) / 160
        close(np.abs(spectrum[0, k]), expected, atol=1e-4)


@pytest.mark.parametrize("hz", [250, 3000])
def test_griffin_lim_returns_the_pitch(hz):
    tone = 0.3 * sine(hz)
    audio = np.asarray(n2m.griffin_lim(n2m.log_mel(tone), 8))
    assert audio.shape == (1, 8000)
    loudest = np.abs(np.fft.rfft(audio[0] * np.hanning(8000))).argmax() * 2
    assert abs(loudest - hz) < 0.04 * hz + 10
    assert 0.3 < audio[0, 2000:6000].std() / float(tone.std()) < 3


# ---- noise2music.py: augmentation and training inputs, Sec. 4.1 ----

@reference
@pytest.mark.parametrize("taps, axes", [(10, (1,)), (10, (2,)), (5, (1, 2))])
def test_blur_against_scipy(taps, axes):
    """10 taps at -5..4, 5 at -2..2; edges repeated, a kernel a clip; along both axes it is 2D."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="the blur is compared with scipy's")
    x, stds = np.asarray(normal(3, 23, 14)), np.array([0.3, 1.7, 5.0])
    y = jnp.asarray(x)
    for axis in axes:
        y = n2m.gaussian_blur(y, jnp.float32(stds), taps, axis)
    for ours, clip, std in zip(y, x, stds):
        kernel = np.exp(-0.5 * (np.arange(-(taps // 2), taps - taps // 2) / std) ** 2)
        kernel = np.outer(kernel, kernel) if axes == (1, 2) else np.expand_dims(kernel, 2 - axes[0])
        expected = ndimage.correlate(clip, kernel / kernel.sum(), mode="nearest")
        close(ours, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "cosine_quiet", "linear"])
@pytest.mark.parametrize("t_max", [0.0, 0.5, 1.0])
def test_noise_augmentation_is_diffusion_at_a_uniform_time(name, t_max):
    """Eq. 2 with t ~ U[0, t_max] for each clip: of ones, the mean is alpha, the deviation sigma."""
    x, schedule = jnp.ones((4000, 200, 1)), n2m.SCHEDULES[name]
    y = np.asarray(n2m.noise_augment(jax.random.key(2), x, t_max, schedule), np.float64)
    alpha, sigma = alpha_sigma64(name, (np.arange(10_000) + 0.5) / 10_000 * t_max)
    clip_alpha, clip_sigma = y.mean((1, 2)), y.std((1, 2))
    close(clip_alpha.mean(), alpha.mean(), atol=0.02)
    close(clip_sigma.mean(), sigma.mean(), rtol=0.03)
    deciles = lambda a: np.quantile(a, [0.1, 0.5, 0.9])
    close(deciles(clip_sigma), deciles(sigma), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name, t_max, taps, lowest, highest, axes", [
    ("waveform_cascader", 0.5, 10, 0.1, 5.0, (1,)), ("spectrogram_vocoder", 1, 5, 0.2, 1.0, (1, 2)),
    ("superresolution_cascader", 1.0, 0, 0, 0, ())])
def test_augmentations_of_section_4_1(monkeypatch, name, t_max, taps, lowest, highest, axes):
    """What each of the three conditioned models asks for: blur, then noise, each clip its own."""
    calls = []
    blur = lambda x, std, taps, axis: calls.append((std, taps, axis)) or x + 1
    noise = lambda key, x, t_max, schedule: calls.append((key, t_max, schedule)) or 2 * x
    monkeypatch.setattr(n2m, "gaussian_blur", blur)
    monkeypatch.setattr(n2m, "noise_augment", noise)
    batch = n2m.Batch(jnp.zeros((2000, 480)), n2m.Condition())
    _, (low_fi, aligned, *_) = n2m.training_inputs(n2m.MODELS[name], jax.random.key(0), batch)
    *blurs, (key, *noise) = calls
    assert noise == [t_max, n2m.linear]
    assert [b[1:] for b in blurs] == [(taps, axis) for axis in axes]
    for std, _, _ in blurs:
        assert std.shape == (2000,) and lowest <= std.min() and std.max() <= highest
        moments = [std.min(), std.mean(), std.max()]
        close(moments, [lowest, (lowest + highest) / 2, highest], atol=0.04 * highest)
        assert (std == blurs[0][0]).all()
        assert (std != jax.random.uniform(key, std.shape, minval=lowest, maxval=highest)).any()
    close((low_fi if aligned is None else aligned)[:, :3], 2 * (len(blurs) - (aligned is not None)))


@each_model
def test_training_inputs_and_the_condition_of_sampling(name):
    """Padded with silence alike. Sampling has them clean; so has training without augmentation."""
    training = replace(n2m.MODELS[name].training, t_max=0.0, blur_taps=0)
    model = replace(n2m.tiny(n2m.MODELS[name]), training=training)
    N = 4830  # samples: not whole frames of log-mel, nor at the bottom
    tone = lambda cycles, n: np.sin(2 * np.pi * cycles * np.arange(n) / n + 1)
    audio = jnp.float32([0.5 * tone(51, N) + 0.25 * tone(2173, N), tone(2173, N)])  # 0.45 of rate
    text = random_condition(small_unet(), 2)._replace(low_fi=None)
    x, c = n2m.training_inputs(model, jax.random.key(0), n2m.Batch(audio, text))
    clean = n2m.log_mel(audio) if n2m.writes_log_mel(model) else audio[:, :, None]
    length, silence = clean.shape[1], -1 if n2m.writes_log_mel(model) else 0
    T = n2m.padded_length(model.unet, length)
    assert x.shape == (2, T, model.unet.out_channels) and length < T
    close(x[:, :length], clean), close(x[:, length:], silence)
    assert c.text is text.text and c.text_mask is text.text_mask

    low = N * (model.low_rate or 0) // model.rate
    previous = 0.5 * tone(51, low)[None].repeat(2, 0) if low else n2m.log_mel(audio)
    given = n2m.sampling_condition(model, text, jnp.float32(previous), N / model.audio_rate)
    assert (given.low_fi is None) == (model.low_rate is None) and given.text is text.text
    assert (given.aligned is None) == (model.unet.aligned_channels == 0)
    if low:  # of the high tone, above the Nyquist frequency, sigma_0 = 0.01 of noise is left
        close(given.low_fi[:, :, 0], [[*0.5 * tone(51, N), *[0] * (T - N)]] * 2, atol=1e-5)
        close(c.low_fi[0], given.low_fi[0], atol=0.06), close(c.low_fi[:, N:], 0)
        close(c.low_fi[1, :N].std(), 0.01, rtol=0.1)
    if given.aligned is not None:
        assert given.aligned.shape == (2, T // 160, 80)
        close(given.aligned[:, :30], n2m.log_mel(audio)), close(given.aligned[:, 30:], -1)
        close(c.aligned, given.aligned, atol=0.06), close(c.aligned[:, 30:], -1)


# ---- noise2music.py: the loss, Eq. 1 ----

def loss_of(monkeypatch, clips, stub, key=0, **training):
    """diffusion_loss of the cascader on clips of 0.25, with `stub` in place of the network."""
    model = n2m.MODELS["waveform_cascader"]
    model = replace(model, training=replace(model.training, **training))
    monkeypatch.setattr(n2m, "unet", lambda params, cfg, *args: stub(*args))
    c = jax.tree.map(lambda a: a.repeat(clips, 0), random_condition(small_unet(), 1))
    batch = n2m.Batch(jnp.full((clips, 240), 0.25), c._replace(low_fi=None))
    return n2m.diffusion_loss(None, model, jax.random.key(key), batch)


def test_the_true_noise_has_no_loss(monkeypatch):
    def stub(x_t, t, condition, text_on):
        alpha, sigma = (a[:, None, None] for a in alpha_sigma64("linear", t))
        x = jnp.where(jnp.arange(x_t.shape[1]) < 240, 0.25, 0)[:, None]  # padded with silence
        assert condition.low_fi.shape == x_t.shape and condition.text.shape == (64, L, 7)
        return (x_t - alpha * x) / sigma

    loss, t = loss_of(monkeypatch, 64, stub)
    close(loss, 0, atol=1e-5)
    assert loss.shape == t.shape == (64,)


def test_weight_time_noise_and_occlusion(monkeypatch):
    """Of eps_hat = 0 the loss is E[eps^2] = 1. t is uniform, text hidden for a tenth of clips."""
    seen, quantiles = [], [0.1, 0.25, 0.5, 0.75, 0.9]
    spy = lambda x_t, t, c, on: seen.append((t, on)) or jnp.zeros_like(x_t)
    loss, t = loss_of(monkeypatch, 4000, spy)
    (t_seen, text_on), = seen
    assert (t == t_seen).all() and 0 <= t.min() and t.max() < 1
    close(np.quantile(t, quantiles), quantiles, atol=0.025)
    close([text_on.mean(), loss.mean()], [0.9, 1], atol=0.015)
    assert set(np.unique(text_on)) == {0, 1}
    assert np.abs(np.corrcoef([t, text_on, loss]) - np.eye(3)).max() < 0.06
    for schedule in ("cosine", "linear"):
        weighted, t = loss_of(monkeypatch, 4000, spy, loss_weight="sigma", noise_schedule=schedule)
        close(weighted, loss * alpha_sigma64(schedule, t)[1] ** 2, rtol=2e-3)
    assert (loss_of(monkeypatch, 4000, spy, key=1)[0] != loss).mean() > 0.99


def test_velocity_weight_is_the_loss_in_v_up_to_its_bound():
    (x, eps, eps_hat), logsnr = rng().normal(size=(3, 200)), rng(1).uniform(-5, 20, 200)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))
    x0_hat = (alpha * x + sigma * eps - sigma * eps_hat) / alpha
    v, v_hat = alpha * eps - sigma * x, alpha * eps_hat - sigma * x0_hat
    weight = n2m.LOSS_WEIGHTS["velocity"]
    close(weight(jnp.float32(logsnr)) * (eps_hat - eps) ** 2, (v_hat - v) ** 2, rtol=1e-4)
    close(weight(jnp.float32([-20.0, -10.0])), 1 + math.exp(5), rtol=1e-5)


# ---- noise2music.py: both routes ----

def encode_prompts(prompts, model):
    if not n2m.uses_text(model):
        return n2m.Condition()
    L = model.training.token_length
    text = np.float32([rng(sum(map(ord, prompt))).normal(size=(L, 7)) for prompt in prompts])
    mask = np.arange(L) < np.array([[len(prompt)] for prompt in prompts])
    return n2m.Condition(text=text, text_mask=mask)


@pytest.mark.parametrize("route", PAPER_ROUTES)
def test_clip_i_of_a_seed_is_the_same_whatever_the_batch(route):
    """Clips 0, 1 and clips 0, 1, 2 agree, at every stage; without super-resolution too."""
    prompts, done, weights = ["slow piano", "fast drums", "harp"], [], {}
    for seed, name in enumerate(n2m.ROUTES[route]):  # two depths, random parameters, three steps
        model, unet = n2m.MODELS[name], replace(small(name).unet, text_width=7)
        model = replace(model, unet=unet, inference=replace(model.inference, steps=3))
        weights[name] = model, random_params(unet, seed)
    run = functools.partial(n2m.generate, weights=weights, encode=encode_prompts, seconds=0.37)
    first = run(prompts[:2], seed=4, progress=lambda *a: done.append(a))
    second = run(prompts, seed=4)
    same_prompt = run(["harp"] * 2, seed=5, weights=dict(list(weights.items())[:2]))
    assert tuple(first) == n2m.ROUTES[route] and done == [(name, 3, 3) for name in first]
    for name, x in first.items():
        close(second[name][:2], x, atol=1e-3, err_msg=name)
        assert np.isfinite(x).all() and 0 < np.abs(x).max() <= 1
    assert tuple(same_prompt) == n2m.ROUTES[route][:2]
    for name, x in same_prompt.items():  # clips differ, and so do seeds
        assert min(np.abs(x[0] - x[1]).max(), np.abs(x[1] - second[name][2]).max()) > 0.1


@pytest.mark.parametrize("route", PAPER_ROUTES)
@pytest.mark.parametrize("seconds", [1.0, 0.07, 1.1, 0.37002, 0.3732, 30.0])
def test_every_duration_reaches_every_stage(monkeypatch, route, seconds):
    """Lengths only, by a stage that checks what it is given. 1.1 * 100 is 110.00000000000001.

    0.3732 s of 16 kHz are 37.3 frames: 38 cover them."""
    seen = []

    def stage(params, model, c, keys, length, progress):
        bottom, L = length // math.prod(model.unet.strides), model.training.token_length
        assert length == n2m.padded_length(model.unet, length) and keys.shape == (2,)
        assert c.low_fi is None or c.low_fi.shape == (2, length, 1)
        assert c.aligned is None or c.aligned.shape == (2, bottom, 80)
        assert c.text is None if L == 0 else c.text.shape == (2, L, 7)
        for before in (a for a in (c.low_fi, c.aligned) if a is not None):  # of the last stage
            close(before[0, 0, 0], 0.25 * len(seen), atol=1e-3)
        seen.append((model.name, *np.asarray(jax.random.key_data(keys)).ravel().tolist()))
        return jnp.full((2, length, model.unet.out_channels), 0.25 * len(seen))

    monkeypatch.setattr(n2m, "sample", stage)
    weights = {name: (n2m.MODELS[name], None) for name in n2m.ROUTES[route]}
    out = n2m.generate(["a", "b"], weights, encode_prompts, seconds)
    assert tuple(out) == tuple(s[0] for s in seen) == n2m.ROUTES[route]
    assert len({s[1:] for s in seen}) == 3  # noise of its own
    low, middle, high = (round(seconds * rate) for rate in (3_200, 16_000, 24_000))
    first = (2, low) if route == "waveform" else (2, -(-middle // 160), 80)
    assert [x.shape for x in out.values()] == [first, (2, middle), (2, high)]


# ---- t5_encoder.py: cases ----

CAPTIONS = [
    "A slow, melancholic piano ballad with warm strings and a soft female voice.",
    "Energetic techno at 140 BPM: distorted kick, acid bass, sparse hi-hats",
    "Musique électronique française, très douce; ça va bien — à l'été, naïve & cœur",
    "ρεμπέτικο με μπουζούκι", "Русская народная песня",
    "一首节奏明快的电子舞曲", "音楽は静かで美しいピアノ曲です",
    "موسيقى عربية هادئة مع العود", "느린 피아노 음악",
    "धीमा भारतीय शास्त्रीय संगीत",
    "</s> <pad> <unk> <extra_id_0> are words, and/or not <s> 1234567890 #$%^*()[]{}|\\"]
ORDINARY = CAPTIONS[:-1] + [
    "", " ", "      ", "a", "  leading and trailing   ", "many    spaces     between",
    "tabs\tand\nnewlines\r\n here\t", "nbsp\u00a0thin\u2009ideographic\u3000space",
    "zero\u200bwidth\u200djoiner\ufeff", "soft\u00adhyphen",
    "🎵 emoji 🎹🎹 family 👨‍👩‍👧 flag 🇫🇷",
    "e\u0301 combining a\u030a\u0323 z\u0335\u0321",
    "ｆｕｌｌ　ｗｉｄｔｈ１２３！",
    "ﬁne ½ ² ™ Å", "Ω ẞ ß İ ı ǅ",
    "العربيةEnglishमिला",
    "ไทย ພາສາລາວ ქართული ሙዚቃ",
    "𝔅𝔩𝔞𝔠𝔨 𝕄𝕖𝕥𝕒𝕝",
    "\u202eright to left\u202c", "a/b\\c\"d'e`f", "UPPER lower MiXeD", "...!!!???", "12,345.678e-9",
    "line\u2028separator\u2029paragraph", "control\x01\x02\x1f\x7fcharacters",
    "x" * 300, "jazz " * 2000, "音" * 500, "\U0010ffff\ufffe", "a\ufffdb"]


def torch_and_transformers():
    pytest.importorskip("google.protobuf", reason="transformers reads spiece.model with protobuf")
    return (pytest.importorskip("torch", reason="the reference encoder runs on torch"),
            pytest.importorskip("transformers", reason="T5 is compared with transformers' T5"))


def reference_t5(folder, kind="T5EncoderModel", dtype="float32", shards="1GB", **changes):
    """A T5 of transformers, saved. Its random weights make every part of the computation matter."""
    torch, transformers = torch_and_transformers()
    sizes = dict(vocab_size=331, d_model=37, d_kv=5, d_ff=53, num_layers=3, num_heads=7)
    proj = dict(feed_forward_proj="gated-gelu")
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.T5Config(**sizes | proj | changes)).eval()
    for name, parameter in model.named_parameters():
        parameter.data = torch.randn(parameter.shape) * 0.12 + ("layer_norm" in name)
        parameter.data *= 5 if "relative_attention_bias" in name else 1
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=shards)
    (folder / "spiece.model").write_bytes(random_t5([], 0).tokenizer.serialized_model_proto())
    return model


def reference_values(model, ids, mask):
    torch, _ = torch_and_transformers()
    with torch.no_grad():
        model = getattr(model, "encoder", model).double()
        out = model(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    return out.last_hidden_state.float().numpy()


def ids_and_mask(vocab_size, length=151):
    mask = np.arange(length) < np.array([[length], [83], [2]])
    return np.where(mask, rng().integers(1, vocab_size, mask.shape), 0).astype(np.int32), mask


def one_line(error, path):
    text = str(error.value)
    assert text.startswith(str(path)) and len(text.splitlines()) == 1 and len(text) < 700, text


@pytest.fixture(scope="session")
def t5():
    return random_t5(CAPTIONS, 0)


@pytest.fixture(scope="session")
def t5_folder(t5, tmp_path_factory):
    save_t5(folder := tmp_path_factory.mktemp("t5"), t5)
    return folder


# ---- t5_encoder.py: the encoder ----

FOLDERS = {  # kind: changes to reference_t5
    "v1.1": {}, "v1.0": dict(feed_forward_proj="relu"),
    "odd": dict(relative_attention_num_buckets=10, relative_attention_max_distance=23,
                layer_norm_epsilon=1e-2, num_layers=1, d_model=12, num_heads=2),
    "bfloat16": dict(dtype="bfloat16"), "float16": dict(dtype="float16"),  # float32 arithmetic
    "embed_tokens alone": {}, "with decoder": dict(kind="T5ForConditionalGeneration"),
    "shards": dict(shards="20KB"),
    "encoder's shards": dict(kind="T5ForConditionalGeneration", shards="20KB"),
}


@reference
@pytest.mark.parametrize("kind", FOLDERS)
def test_t5_values_equal_transformers(kind, tmp_path):
    model = reference_t5(tmp_path, **FOLDERS[kind])
    shards = sorted(tmp_path.glob("model-*"))
    assert ("shards" in kind) == (len(shards) > 2)
    if kind == "embed_tokens alone":
        tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        write_safetensors(tmp_path / "model.safetensors", tensors, metadata)
    if kind == "encoder's shards":
        for path in shards:
            if not any(n.startswith(("shared", "encoder")) for n in read_safetensors(path)[0]):
                path.unlink()
        assert 2 < len(list(tmp_path.glob("model-*"))) < len(shards)
    t5, (ids, mask) = load_t5(tmp_path), ids_and_mask(331)
    assert {x.dtype.name for x in jax.tree.leaves(t5.params)} == {"float32"}
    ours = np.asarray(t5_encoder.t5_encoder(t5.params, t5.config, ids, mask))
    assert ours.shape == (3, 151, t5.config.d_model) and ours.dtype == np.float32
    close(ours, reference_values(model.float(), ids, mask), atol=1e-5)  # at masked positions too
    if kind == "shards":
        shards[1].unlink()
        with pytest.raises(ValueError, match="no encoder.block"):
            load_t5(tmp_path)


@reference
@pytest.mark.parametrize("buckets, distance",
                         [(32, 128), (32, 127), (10, 23), (64, 1000), (7, 3), (4, 2)])
def test_position_buckets_equal_transformers(buckets, distance):
    torch, transformers = torch_and_transformers()
    offset = torch.arange(1300) - torch.arange(1300)[:, None]
    theirs = transformers.models.t5.modeling_t5.T5Attention._relative_position_bucket(
        offset, num_buckets=buckets, max_distance=distance)
    config = T5Config(9, 9, 9, 9, 9, 9, buckets, distance)
    np.testing.assert_array_equal(position_buckets(config, 1300), theirs.numpy())


def test_padding_and_batch_do_not_matter(t5):
    ids, mask = ids_and_mask(t5.config.vocab_size)
    a, b = (np.asarray(t5_encoder.t5_encoder(t5.params, t5.config, x, mask))
            for x in (ids, np.where(mask, ids, ids[:, ::-1])))
    np.testing.assert_array_equal(a[mask], b[mask])
    assert np.abs(a - b)[~mask].max() > 0.1
    nothing = t5_encoder.t5_encoder(t5.params, t5.config, ids, np.zeros_like(mask))
    assert np.isfinite(nothing).all()
    (one, mask), (many, _) = encode(t5, CAPTIONS[:1], 61), encode(t5, CAPTIONS[:3], 90)
    assert one.shape == (1, 61, 64) and isinstance(one, np.ndarray)
    close(one[mask], many[:1, :61][mask], atol=1e-5)


# ---- t5_encoder.py: text to tokens ----

@pytest.fixture(scope="session")
def without_bytes():
    """A T5 with a tokenizer trained like the released T5s': what it has not seen is <unk>."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=400, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, num_threads=1, minloglevel=2)
    return T5(None, None, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()))


@reference
def test_token_ids_equal_transformers(t5, without_bytes, tmp_path):
    for ours in (t5, without_bytes):
        (tmp_path / "spiece.model").write_bytes(ours.tokenizer.serialized_model_proto())
        theirs = torch_and_transformers()[1].T5Tokenizer.from_pretrained(tmp_path)
        for text in ORDINARY:
            (ids, mask), expected = tokenize(ours, [text], 20000), theirs(text).input_ids
            if any(ours.tokenizer.is_byte(int(i)) for i in ids[mask]):  # theirs has no bytes for T5
                assert 2 not in ids[mask] and 2 in expected
            else:
                assert ids[mask].tolist() == expected, ascii(text)[:80]
        assert theirs("a</s>b").input_ids.count(1) == 2  # in ours it stays text, see below


def test_text_cannot_spell_control_tokens(t5, without_bytes):
    texts = ["</s>", "a</s>b", "<pad>", "<unk>", "<extra_id_0> x", "<0x41>", "▁</s>▁"]
    for ours, text in itertools.product((t5, without_bytes), texts):
        ids, mask = tokenize(ours, [text], 99)
        tokens = ids[mask].tolist()
        assert not set(tokens[:-1]) & {0, 1, 2} and tokens[-1] == 1
        assert ours.tokenizer.decode(tokens[:-1]).strip() == text.strip("▁")
        assert "<0x41>" not in map(ours.tokenizer.id_to_piece, tokens)


def test_tokens_are_counted_and_cut(t5, without_bytes):
    texts = ["jazz " * 99, "", "a"]
    full, count = tokenize(t5, texts, 1000)[0], count_tokens(t5, texts[0])
    assert count > 99 and [count_tokens(t5, text) for text in texts[1:]] == [0, 1]
    for length in (1, 2, 7, count, count + 1, count + 2):
        ids, mask = tokenize(t5, texts, length)
        assert ids.shape == mask.shape == (3, length) and (ids.dtype, mask.dtype) == ("i4", "?")
        kept = min(length, count + 1)
        assert mask.sum(1).tolist() == [kept, 1, min(length, 2)] and not ids[~mask].any()
        assert ids[0, :kept].tolist() == [*full[0, :kept - 1], 1] and ids[1, 0] == 1  # </s> stays
    np.testing.assert_array_equal(tokenize(t5, ["a \ud800"], 20), tokenize(t5, ["a ?"], 20))
    for arguments in (("a string", 8), (["a"], 0)):
        with pytest.raises(ValueError, match="list"):
            tokenize(t5, *arguments)
    unknown = "ሙዚቃ", "ሙዚቃ ሙዚቃ", "ሙዚቃ bass"
    counts = [count_tokens(without_bytes, text) for text in unknown]
    assert counts[:2] == [0, 0] and counts[2] == 2 + count_tokens(without_bytes, "bass")


def test_text_encoder_is_all_that_others_know(t5, t5_folder):
    text = t5_encoder.load_text_encoder(t5_folder)
    assert text.width == 64 and text.count_tokens("jazz bass") == count_tokens(t5, "jazz bass") > 0
    np.testing.assert_equal(text.encode(CAPTIONS, 64), encode(t5, CAPTIONS, 64))
    others = [t5, random_t5(CAPTIONS, 1), random_t5([], 0),
              t5._replace(params=t5.params | {"final_norm": 2 * t5.params["final_norm"]}),
              t5._replace(config=replace(t5.config, layer_norm_epsilon=1e-5))]
    marks = [t5_encoder.fingerprint(other) for other in others]
    assert text.fingerprint == marks[0] and len(set(marks)) == len(marks)
    assert t5_encoder.load_text_encoder(sample.DEMO / "t5").fingerprint == "0c6e0214"  # as stored


# ---- t5_encoder.py: folders ----

@reference
def test_saved_t5_loads_here_and_in_transformers(tmp_path):
    t5, folder = random_t5(CAPTIONS, 0, 13, 3, 17, 3, 5), tmp_path / "new" / "t5"
    save_t5(folder, t5)
    again = load_t5(folder)
    assert read_safetensors(folder / "model.safetensors")[1] == {"format": "pt"}  # transformers 4
    assert again.config == t5.config
    jax.tree.map(np.testing.assert_array_equal, again.params, t5.params)
    T5EncoderModel = torch_and_transformers()[1].T5EncoderModel
    model, info = T5EncoderModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = tokenize(t5, CAPTIONS, 140)
    close(encode(again, CAPTIONS, 140)[0], reference_values(model.eval(), ids, mask), atol=1e-5)


def edit_config(**changes):
    def edit(folder):
        entries = json.loads((folder / "config.json").read_text()) | changes
        entries = {key: value for key, value in entries.items() if value != "absent"}
        (folder / "config.json").write_text(json.dumps(entries))
    return edit


def edit_tensor(name, value):
    def edit(folder):
        tensors, metadata = read_safetensors(path := folder / "model.safetensors")
        del tensors[name]
        write_safetensors(path, tensors | ({} if value is None else {name: value}), metadata)
    return edit


BROKEN = [  # (what the message says, what was done to the folder)
    ("config.json.*'bert'", edit_config(model_type="bert")),
    ("config.json.*'gated-silu'", edit_config(feed_forward_proj="gated-silu")),
    ("config.json.*'d_model'", edit_config(d_model="absent")),
    ("config.json.*layer_norm_epsilon", edit_config(layer_norm_epsilon=float("nan"))),
    ("config.json.*max_distance", edit_config(relative_attention_max_distance=8)),
    ("config.json", edit_config(relative_attention_max_distance="128")),
    ("config.json.*buckets", edit_config(relative_attention_num_buckets=2)),
    ("config.json", lambda f: (f / "config.json").write_text("{")),
    ("config.json", lambda f: (f / "config.json").write_text("[" * 100000)),
    ("config.json", lambda f: (f / "config.json").write_text("[]")),
    ("spiece.model: not of this T5", edit_config(vocab_size=200)),
    ("spiece.model", lambda f: (f / "spiece.model").write_bytes(b"not a model")),
    ("spiece.model: is empty", lambda f: (f / "spiece.model").write_bytes(b"")),
    ("no model.safetensors", lambda f: (f / "model.safetensors").unlink()),
    ("no shared.weight of floats", edit_config(vocab_size=1001)),
    ("no .*relative_attention_bias.weight", edit_config(num_heads=-4, d_kv=-16)),
    ("a size is not a whole number", edit_config(d_ff=True)),
    ("a size is not a whole number", edit_config(num_heads=4.0)),
    ("no encoder.block.0.layer.1.DenseReluDense.wi.weight", edit_config(feed_forward_proj="relu")),
    ("no encoder.block.2.layer.0.layer_norm.weight", edit_config(num_layers=3)),
    ("more layers than the 1", edit_config(num_layers=1)),
    ("copy, download or write", edit_config(num_layers=0)),
    ("copy, download or write", edit_config(num_layers=2.5)),
    ("no encoder.final_layer_norm.weight", edit_tensor("encoder.final_layer_norm.weight", None)),
    ("no encoder.final_layer_norm.weight of floats",
     edit_tensor("encoder.final_layer_norm.weight", np.ones(64, np.int8))),
]


@pytest.mark.parametrize("words, damage", BROKEN)
def test_broken_folders_are_named_in_one_line(words, damage, tmp_path, t5_folder):
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    damage(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        load_t5(tmp_path)
    one_line(error, tmp_path)


def test_what_a_t5_folder_may_lack_and_what_not(tmp_path, t5_folder):
    with pytest.raises(ValueError, match="google/t5-v1_1-small: no such folder"):
        load_t5("google/t5-v1_1-small")
    shutil.copytree(t5_folder, tmp_path, dirs_exist_ok=True)
    edit_config(relative_attention_max_distance="absent", layer_norm_epsilon="absent")(tmp_path)
    assert load_t5(tmp_path).config == load_t5(t5_folder).config
    for name in ("spiece.model", "config.json"):
        (tmp_path / name).unlink()
        with pytest.raises(OSError, match=name):
            load_t5(tmp_path)


@reference
def test_pickle_is_converted_by_the_command_that_is_named(tmp_path):
    model = reference_t5(tmp_path, feed_forward_proj="relu", num_layers=1)
    (tmp_path / "model.safetensors").unlink()
    torch_and_transformers()[0].save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="can run code") as error:
        load_t5(tmp_path)
    code = str(error.value).split('-c "')[1].rstrip('"')
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    edit_config(feed_forward_proj="absent")(tmp_path)  # as in the first T5s
    assert load_t5(tmp_path).config.feed_forward_proj == "relu"


# ---- t5_encoder.py: random T5 ----

@pytest.mark.parametrize("captions", [[], [""], ["音楽"], ["x" * 10000], ["a\nb\0c\td"], CAPTIONS,
                                      [chr(i) for i in range(0x4E00, 0x9FFF)], ["\ud800 a"]])
def test_random_t5_takes_any_captions(captions):
    t5, again = (random_t5(captions, 3) for _ in range(2))
    assert t5.tokenizer.serialized_model_proto() == again.tokenizer.serialized_model_proto()
    jax.tree.map(np.testing.assert_array_equal, t5.params, again.params)
    assert t5.tokenizer.get_piece_size() == t5.config.vocab_size <= 1000
    text = "any script: 音楽 موسيقى 🎵"
    ids, mask = tokenize(t5, [text], 200)
    assert 2 not in ids[mask] and t5.tokenizer.decode(ids[mask][:-1].tolist()) == text


def test_random_t5_tells_texts_apart(t5):
    embeddings, mask = encode(t5, CAPTIONS, 64)
    assert abs(np.mean(embeddings[mask]**2) - 1) < 0.01
    mean = np.stack([e[m].mean(0) for e, m in zip(embeddings, mask)])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert (mean @ mean.T - np.eye(len(mean))).max() < 0.9
    # Context counts, not the token alone: the same word in another sentence.
    (a, b), _ = encode(t5, ["jazz piano", "jazz drums and guitar"], 16)
    assert 0.05 < np.sqrt(np.mean((a[0] - b[0])**2)) < 1


# ---- t5_encoder.py: safetensors ----

def some_tensors():
    values = rng().standard_normal((3, 5)) * 9
    return {name: values.astype(name) for name in t5_encoder.DTYPES.values()} | {
        "scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 3), np.int16),
        "é/名\n": np.ones(1), "jax": jnp.arange(7, dtype=jnp.bfloat16),
        "strided": np.arange(12.0).reshape(3, 4).T[::2]}


same = partial(jax.tree.map, partial(np.testing.assert_array_equal, strict=True))  # types too


def test_safetensors_round_trip(tmp_path):
    tensors, metadata = some_tensors(), {"step": "7", "note": 'q"uote \u00e9 \ud800 00000000'}
    write_safetensors(tmp_path / "a", tensors, metadata)
    assert os.listdir(tmp_path) == ["a"]
    read, meta = read_safetensors(tmp_path / "a")
    same(read, tensors)
    assert meta == metadata
    assert all(a.flags.aligned and not a.flags.owndata for a in read.values())
    read, _ = read_safetensors(tmp_path / "a", keep=lambda name: name.startswith("u"))
    assert set(read) == {"uint8", "uint16", "uint32", "uint64"}
    data = (tmp_path / "a").read_bytes()  # the checksum, as the file itself explains it
    crc = json.loads(data[8:8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]["crc32"]
    assert f"{zlib.crc32(data.replace(crc.encode(), b'0' * 8, 1)):08x}" == crc
    write_safetensors(tmp_path / "b", {"x": np.arange(3, dtype=">f4")}, {})
    same(read_safetensors(tmp_path / "b")[0], {"x": np.arange(3, dtype="<f4")})
    write_safetensors(tmp_path / "b", {}, {})  # in place of the old one
    assert read_safetensors(tmp_path / "b") == ({}, {})


@reference
def test_safetensors_and_its_package_read_each_other(tmp_path):
    package = pytest.importorskip("safetensors.numpy", reason="compared with its own package")
    in_numpy = {k: v for k, v in some_tensors().items() if k not in ("bfloat16", "jax")}
    write_safetensors(tmp_path / "a", in_numpy, {"format": "pt"})
    same(package.load_file(tmp_path / "a"), in_numpy)
    del in_numpy["scalar"]
    in_numpy["strided"] = np.ascontiguousarray(in_numpy["strided"])
    for metadata in (None, {"a": "b"}):
        package.save_file(in_numpy, tmp_path / "a", metadata)
        read, meta = read_safetensors(tmp_path / "a")
        same(read, in_numpy)
        assert meta == (metadata or {})
    torch = pytest.importorskip("torch", reason="bfloat16 is read through torch")
    write_safetensors(tmp_path / "a", some_tensors(), {"format": "pt"})
    read = pytest.importorskip("safetensors.torch").load_file(tmp_path / "a")
    assert read["bfloat16"].dtype == torch.bfloat16
    assert read["jax"].tolist() == list(range(7))


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "a"
    for tensors, metadata in (({"x": np.zeros(2, complex)}, {}), ({"x": np.zeros(2)}, {"a": 1})):
        with pytest.raises(ValueError) as error:
            write_safetensors(path, tensors, metadata)
        one_line(error, path)
        assert not list(tmp_path.iterdir())
    write_safetensors(path, {"x": np.arange(4)}, {})

    for step in ("fsync", "replace"):  # not by a signal, which a run here may have taken over
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, step, Mock(side_effect=KeyboardInterrupt))
            write_safetensors(path, {"x": np.ones(9)}, {})
        assert os.listdir(tmp_path) == ["a"]  # the old file, whole
        same(read_safetensors(path)[0], {"x": np.arange(4)})
    with pytest.raises(OSError, match="a/b"):  # in a file
        write_safetensors(path / "b", {}, {})


def refused(path, data):
    path.write_bytes(data)
    with pytest.raises(ValueError) as error:
        read_safetensors(path, keep=lambda name: False)  # also where no tensor is wanted
    one_line(error, path)


def test_every_damage_to_a_written_file_is_found(tmp_path):
    path, g = tmp_path / "a", rng()
    write_safetensors(path, {"w": np.arange(9, dtype=np.float32), "b": jnp.ones(5, jnp.bfloat16),
                             "é": np.zeros((2, 1), bool)}, {"step": "3", "note": "tab\tésc\x1f"})
    good, demo = path.read_bytes(), (sample.DEMO / "t5" / "model.safetensors").read_bytes()
    flips = [(good, bit) for bit in range(len(good) * 8)]  # each bit
    flips += [(demo, bit) for limit in (900, 8 * len(demo)) for bit in g.integers(0, limit, 40)]
    for whole, bit in flips:
        bad = bytearray(whole)
        bad[bit // 8] ^= 1 << bit % 8
        refused(path, bad)
    for bad in [good[:i] for i in range(len(good))] + [good + b"\0", good + b" ", 2 * good]:
        refused(path, bad)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
MALFORMED = [  # (header or its bytes, bytes of data)
    (b"{nonsense", 0), (b'{"\xff": 1}', 0), (b'{"a":' + b"[" * 200_000, 0), (b'{"a":' * 100_000, 0),
    (b"", 0), ([], 0), (7, 0), (None, 0), ({"a": 3}, 8), ({"a": None}, 8), ({"a": {}}, 8),
    ({"__metadata__": 3}, 0), ({"__metadata__": {"a": [1]}}, 0),
    ({"a": F32}, 7), ({"a": F32}, 9), ({"a": F32, "b": F32}, 8),
    ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, 12),  # overlap
    ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, 20),  # hole
    ({"a": F32 | {"shape": [2**40], "data_offsets": [0, 2**42]}}, 8),
    ({"a": F32 | {"shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}, 0),
    ({"a\nb" * 999: F32 | {"dtype": "x\ny" * 999}}, 8),  # a short line all the same
    (json.dumps({"a": F32}).replace("[2]", "[%s]" % ("9" * 9999)).encode(), 8),
    *[({"__metadata__": crc, "a": F32}, 8)
      for crc in ({"crc32": "00000000"}, {"crc32": "\ud800"}, {"crc32_of": "x"})],
    *[({"a": F32 | {"dtype": dtype}}, 8) for dtype in ("F33", ["F32"], None, 7)],
    *[({"a": F32 | {"shape": shape}}, 8) for shape in (
        [-2], [-2, -1], [2.0], "2", [math.inf], [2**40, 2**40], [2] + [1] * 70, [3], [1], None)],
    *[({"a": F32 | {"data_offsets": offsets}}, 8) for offsets in (
        [8, 0], [-8, 0], [0, 8, 8], [4, 12], [0.5, 8.5], ["0", "8"], None)],
]


def test_malformed_safetensors(tmp_path):
    path = tmp_path / "a"
    for header, size in MALFORMED:
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        refused(path, struct.pack("<Q", len(header)) + header + bytes(size))
    for data in (b"", b"abc", struct.pack("<Q", 999) + b"{}", struct.pack("<Q", 2**63 + 5) + b"{}"):
        refused(path, data)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # sparse: takes no space
    with pytest.raises(ValueError, match="no safetensors"):  # said before the header is read
        read_safetensors(path)
    empty = F32 | {"shape": [0], "data_offsets": [8, 8]}  # and what they are varied from is read:
    for header in ({"a": F32}, {"__metadata__": {"a": "b"}, "b": empty, "a": F32}):
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<ff", 1, 2))
        assert read_safetensors(path)[0]["a"].tolist() == [1, 2]


# ---- train.py: data ----

def write_tone(path, seconds=2.0, rate=16_000, channels=1, hz=440.0):
    tone = 0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)
    soundfile.write(path, np.outer(tone, np.arange(1, channels + 1) * 2 / (channels + 1)), rate)
    return path


def write_tones(path, *tones, seconds=10.0, rate=2_000, **tags):
    """A tone of each frequency (0 is silence), one after the other; the tags go into the file."""
    t = np.arange(round(seconds * rate)) / rate
    with soundfile.SoundFile(path, "w", rate, 1) as file:
        for name, value in tags.items():
            setattr(file, name, value)
        file.write(np.concatenate([0.3 * np.sin(2 * np.pi * hz * t) for hz in tones]))
    return path


def manifest(folder, *entries):
    folder.mkdir(exist_ok=True)
    lines = [e if isinstance(e, str) else json.dumps(e) for e in entries]
    (folder / "captions.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def maker(clips, name="waveform_generator", seed=0):
    """`example_maker` whose tokens are words."""
    return train.example_maker(clips, tiny(n2m.MODELS[name]), seed, lambda text: len(text.split()))


def test_a_track_gives_six_clips_that_do_not_overlap(tmp_path):
    """Sec. 3.6, from 400 s down to less than a clip."""
    for seconds, n in [(400, 6), (181, 6), (179, 5), (61, 2), (59, 1), (3, 1)]:
        path = write_tone(tmp_path / f"{seconds}.wav", seconds, rate=2_000)
        clips = train.track_clips(train.Track(path))
        starts = [clip.start for clip in clips] + [max(seconds, 30)]
        assert len(clips) == n and starts[0] == 0 and min(np.diff(starts)) >= 30
        assert {clip.seconds for clip in clips} == {min(seconds, 30)}


@pytest.mark.parametrize("suffix, rate, channels", [
    ("wav", 8_000, 1), ("flac", 44_100, 2), ("ogg", 48_000, 2), ("mp3", 22_050, 1),
    ("aiff", 11_025, 3)])
def test_audio_of_any_kind_becomes_the_same_mono_tone(tmp_path, suffix, rate, channels):
    path = write_tone(tmp_path / f"a.{suffix}", 2.0, rate, channels)
    audio = train.load_audio(path, 0.5, 1.0, 16_000)
    assert audio.shape == (16_000,) and audio.dtype == np.float32
    assert np.abs(np.fft.rfft(audio)).argmax() == 440 and 0.3 < audio[4000:12000].max() < 0.7


def test_a_snippet_of_a_short_file_is_not_its_padding(tmp_path):
    """1.28 s of a 2 s file sound; of 0.5 s, sound, then silence."""
    for seconds in (2.0, 0.5):
        track = train.Track(write_tone(tmp_path / f"{seconds}.wav", seconds))
        example = maker(train.track_clips(track), "superresolution_cascader")
        for audio in (example(i).audio for i in range(5)):
            assert audio.shape == (30_720,) and audio[:11_000].std() > 0.3
            assert (audio[12_100:].std() > 0.3) == (seconds == 2.0)


def test_text_batch_is_long_prompts_and_packed_tags(tmp_path):
    """Sec. 4.1; words stand for tokens. Titles and tags are short prompts."""
    write_tone(tmp_path / "a.wav")
    entry = {"audio": "a.wav", "short": ["d e f", "g"], "tags": ["c", " "], "title": "a b"}
    track = train.parse_caption(tmp_path, json.dumps(entry | {"long": ["one, long", "two"]}), True)
    count = lambda text: len(text.split())
    assert train.text_batch(track, 5, count) == ["one, long", "two", "a b, c", "d e f, g"]
    assert train.text_batch(track, 6, count)[2] == "a b, c"  # "d e f" would leave no place for </s>
    assert train.text_batch(track, 100, count)[2:] == ["a b, c, d e f, g"]


def test_examples_are_a_pure_function_of_seed_and_index(tmp_path):
    """What makes a resumed run see the data that it would have seen."""
    tracks = [train.Track(write_tone(tmp_path / f"{k}.wav", 8, hz=100 * k), (f"{k}",))
              for k in range(1, 8)]
    clips = train.find_clips(tracks)
    first = [maker(clips, seed=5)(i) for i in range(12)]
    loader = train.batches(maker(clips, seed=5), [0, 2], 3, 6)
    again = next(loader) + next(loader)
    loader.close()
    np.testing.assert_equal(again, [first[i] for i in (6, 8, 9, 11)])
    assert [maker(clips, seed=6)(i).text for i in range(7)] != [e.text for e in first[:7]]
    assert len({float(maker(clips[:1], seed=s)(0).audio[0]) for s in range(5)}) > 1  # its start


def test_folders_are_mixed_by_their_clips_or_by_weight(tmp_path, capfd, monkeypatch):
    """Each clip once an epoch; or of each folder its share, to a ten-thousandth, and each of its
    clips as often. What a resumed run sees depends on the index alone."""
    for folder, n in [("many", 5), ("few", 2)]:
        (tmp_path / folder).mkdir()
        for k in range(n):
            write_tone(tmp_path / folder / f"{k}.wav", 0.2, rate=2_000)
            (tmp_path / folder / f"{k}.txt").write_text(f"{folder} {k}")
    name, maker, seen = "spectrogram_vocoder", train.example_maker, []
    begun = train.Run(small(name), types.SimpleNamespace(step=0), {"seed": 3, "index": 0}, None)
    monkeypatch.setattr(train, "new_run", lambda *_: begun)
    monkeypatch.setattr(train, "place", lambda state, _: state)
    monkeypatch.setattr(train.signal, "signal", lambda *_: None)

    def mixed(*data):  # the arguments of the example_maker of a run on these folders
        monkeypatch.setattr(train, "example_maker", lambda *given: seen.append(given) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_train(name, "--tiny", "--out", tmp_path / "runs", "--data",
                      *(f"{tmp_path}/{folder}" for folder in data))
        return capfd.readouterr().out, *seen[-1]

    out, *given = mixed("many", "few")
    assert "/many: 5 clips, 71.43% of the examples" in out
    assert "/few: 2 clips, 28.57% of the examples" in out
    everything = sorted(clip.track.long[0] for clip in given[0])
    text = lambda i: maker(*given[:3], len)(i).text
    first, second = [*map(text, range(7))], [*map(text, range(7, 14))]
    assert sorted(first) == sorted(second) == everything and first != second
    out, *given = mixed("many:1", "few:2.5")
    assert "/many: 5 clips, 28.57% of the examples" in out
    clips, *_, weights = given
    order = lambda epoch, seed=3: train.epoch_order(clips, weights, seed, epoch)
    counts = lambda *orders: np.bincount(np.concatenate(orders)).tolist()
    served = counts(*map(order, range(3)))  # 2 / 7 and 5 / 7 of 30,000, the clips of `many` first
    assert sorted(served[:5]) == [1714] * 4 + [1715] and sorted(served[5:]) == [10_714, 10_715]
    assert (order(0) != order(1)).any() and counts(order(0)) != counts(order(0, seed=4))
    assert maker(*given[:3], len, weights)(10_007).text in clips[order(1)[7]].track.long
    argv = name, "--tiny", "--out", tmp_path, "--data"
    assert "each folder a weight, or none" in exits(capfd, train.main, *argv, "a:1", "b")
    assert "DIR:WEIGHT (a number above 0) value: 'a:0'" in exits(capfd, train.main, *argv, "a:0")


def test_a_batch_is_what_the_examples_hold():
    model = small("waveform_cascader")
    examples = [train.Example(np.full(8, k, np.float32), "x" * k) for k in (1, 2, 3)]
    encode = lambda texts, L: (np.array([[len(t)] * L for t in texts]), np.ones((len(texts), L)))
    audio, condition = train.make_batch(examples, model, encode)
    assert audio.tolist() == [[k] * 8 for k in (1, 2, 3)] and condition.text_mask.shape == (3, 64)
    assert condition.text[:, 0].tolist() == [1, 2, 3] and condition[:2] == (None, None)
    none = train.make_batch(examples, small("spectrogram_vocoder"), None).condition
    assert none == n2m.Condition()


def test_bad_files_and_lines_are_reported_once_and_skipped(tmp_path, capfd):
    for name in ("good", "cut"):
        write_tone(tmp_path / f"{name}.flac", 20.0)
    cut = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(cut[:-10_000])
    soundfile.write(tmp_path / "nan.wav", np.full(32_000, np.nan), 16_000, "FLOAT")
    soundfile.write(tmp_path / "zero.wav", np.zeros(0), 16_000)
    (tmp_path / "empty.flac").write_bytes(b"")
    (tmp_path / "text.flac").write_text("not audio")
    entries = [{"audio": f"{name}.flac", "long": name} for name in ("good", "cut", "empty")]
    entries += [{"audio": name, "tags": [name]} for name in ("zero.wav", "text.flac", "nan.wav")]
    bad = ['{"audio": "good.flac"', "[1, 2]", "[" * 100_000, {"audio": "absent.wav", "long": "x"},
           {"audio": "good.flac", "long": [3]}, {"audio": "good.flac"}]
    starts = ('"30"', "-1", "true", "NaN", "1e999", "[0]")
    bad += [f'{{"audio": "good.flac", "long": "x", "start": {start}}}' for start in starts]
    folder = manifest(tmp_path, *entries, *bad)
    clips = train.find_clips(train.read_tracks(folder, needs_text=True))
    assert [clip.track.path.name for clip in clips] == ["good.flac", "cut.flac", "nan.wav"]
    err = capfd.readouterr().err
    files = "zero.wav: has no", "empty.flac", "text.flac"
    for words in (*files, *(f".jsonl:{n}: " for n in range(7, 19))):
        assert words in err, words
    assert err.count('"start"') == 6 and err.count("\n") == 15 + 3  # two sums, one wait
    assert "skipped 12 of 18" in err and "skipped 3 of 6" in err
    example = maker(clips)
    assert {example(i).text for i in range(20)} == {"good"}
    err = capfd.readouterr().err
    assert err.count("nan.wav") == err.count("cut.flac") == 1 and "good" not in err


def test_a_start_makes_exactly_that_clip(tmp_path, capfd):
    """A track's "start" is of the one clip that it captions; one beyond the end is reported."""
    write_tones(tmp_path / "a.wav", 100, 200, 300, 400, 500)  # 50 s
    entries = [{"audio": "a.wav", "long": str(t), "start": t} for t in (10, 20.5, 49.5, 50, 99)]
    folder = manifest(tmp_path, *entries, {"audio": "a.wav", "long": ["all"]})
    clips = train.find_clips(train.read_tracks(folder, needs_text=True))
    assert [(clip.track.long, clip.start, clip.seconds) for clip in clips] == [
        (("10",), 10, 30), (("20.5",), 20.5, 29.5), (("49.5",), 49.5, 0.5), (("all",), 0, 30)]
    err = capfd.readouterr().err
    assert err.count("\n") == 3 and "no audio at 50 s" in err and "no audio at 99 s" in err
    example = train.example_maker(clips[:1], n2m.MODELS["waveform_generator"], 0)(0)
    seconds = example.audio[: 30 * 3_200].reshape(30, 3_200)  # a bin is a Hz
    peaks = np.abs(np.fft.rfft(seconds))[:, 1:].argmax(axis=1) + 1
    assert peaks.tolist() == [200] * 10 + [300] * 10 + [400] * 10 and example.text == ""


def test_a_txt_captions_the_audio_beside_it(tmp_path, capfd):
    write_tone(tmp_path / "a.wav"), write_tone(tmp_path / "b.wav")
    (tmp_path / "a.TXT").write_text("first caption\n\nsecond caption\n")
    (track,) = train.read_tracks(tmp_path, needs_text=True)
    assert track == (tmp_path / "a.wav", ("first caption", "second caption"), (), None)
    assert "b.wav: no caption" in capfd.readouterr().err
    assert len(train.read_tracks(tmp_path, needs_text=False)) == 2  # the vocoder needs no captions


# ---- train.py: optimiser, checkpoints, the run ----

tiny = n2m.tiny  # before a test replaces it
TWO_STRIDES = dict(zip(NAMES, [(4, 8), (4, 4), (2, 3), (16, 10), (4, 4)]))


def small(name, **training):
    """A model on the code path of all the others, small enough to compile and train in a test."""
    model = tiny(n2m.MODELS[name])
    text = n2m.uses_text(model)
    unet = replace(model.unet, base_dimension=8, depth=2, strides=TWO_STRIDES[name],
                   channels=(1, 2), blocks=(1, 1), self_attention=(False, text),
                   cross_attention=(False, text), attention_heads=2 * text, head_width=4)
    return replace(model, unet=unet, inference=replace(model.inference, steps=3),
                   training=replace(model.training, **dict(seconds=0.32) | training))


def leave_run(out, model, averages=None):
    """What train.py leaves of a run of no steps, with a random T5. Returns its checkpoint."""
    if not (out / "t5").exists():
        save_t5(out / "t5", random_t5(["slow piano", "fast drums and bass"], 0))
    mark = t5_encoder.load_text_encoder(out / "t5").fingerprint
    metadata = {"seed": 0, "index": 0, "t5": None, "t5_fingerprint": mark}
    state = train.init_state(model, 0)
    state = state._replace(ema=averages or state.ema)
    (out / model.name).mkdir()
    return train.save_checkpoint(out / model.name, state, model, metadata)


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.setattr(n2m, "tiny", lambda model: small(model.name))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for k in range(3):
        write_tone(folder / f"{k}.wav", 6.0, hz=200 * (k + 1))
    caption = "a tone of {} hundred hertz".format
    return manifest(folder, *({"audio": f"{k}.wav", "long": caption(k), "short": "tone"}
                              for k in range(3)))


run_train = lambda *argv: train.main([str(a) for a in argv])
last_tensors = lambda folder: t5_encoder.read_safetensors(train.checkpoints(folder)[-1])[0]
log_of = lambda folder: [*map(json.loads, (folder / "log.jsonl").read_text().splitlines())]


def exits(capfd, main, *argv, status=2):
    """Runs a script's main, which must end with a line on stderr and no traceback; returns it."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    err = capfd.readouterr().err
    assert stop.value.code == status and "Traceback" not in err and err.endswith("\n")
    return err


def test_learning_rate_of_section_4_1(capfd):
    args = ["waveform_generator", "--data", "x", "--out", "x", "--steps", "2500001"]
    train.overridden(n2m.MODELS["waveform_generator"], train.parse_args(args))
    assert "from step 2500000 on the learning rate is 0" in capfd.readouterr().err
    tx = train.optimizer(n2m.MODELS["waveform_generator"].training)
    adam, schedule = tx.init(jnp.zeros(1))
    adam = adam._replace(mu=jnp.ones(1), nu=jnp.ones(1), count=jnp.int32(1_000_000))
    for step, rate in [(0, 0.0), (5_000, 0.5e-4), (10_000, 1e-4), (1_255_000, 0.5e-4),
                       (2_500_000, 0.0)]:
        update, _ = tx.update(jnp.ones(1), (adam, schedule._replace(count=jnp.int32(step))))
        assert abs(-float(update[0]) - rate) < 1e-9


def test_accumulation_averages_gradients_clipping_scales_them_and_the_ema_warms_up(monkeypatch):
    """Parts of a batch with the loss of the whole: the same update. Each has noise of its own."""
    model = small("superresolution_cascader", warmup_steps=0)  # else the first rate is 0
    keys = set()
    monkeypatch.setattr(train, "gradients", lambda params, model, key, batch: keys.add(
        tuple(jax.random.key_data(key).tolist())) or (
        jax.tree.map(lambda p: jnp.full_like(p, batch.audio.mean()), params),
        (jnp.asarray(batch.audio.mean(1)), jnp.asarray(batch.audio.max(1)))))
    batch = n2m.Batch(np.arange(8.0).reshape(4, 2), n2m.Condition())
    begin = lambda step=0: train.init_state(model, 0)._replace(step=jnp.int32(step))
    runs = [train.train_step(begin(), model, 0, batch, n) for n in (1, 2, 4)]
    for state, losses, t, norm in runs:
        close(norm, runs[0][3], rtol=1e-5)
        assert losses.tolist() == [0.5, 2.5, 4.5, 6.5] and t.tolist() == [1, 3, 5, 7]
        jax.tree.map(partial(close, rtol=1e-4, atol=1e-9), state.params, runs[0][0].params)
    for step, decay in [(0, 0.1), (90, 0.91), (10**6, 0.9999)]:
        old, (state, *_) = begin().params, train.train_step(begin(step), model, 0, batch)
        expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, old, state.params)
        jax.tree.map(partial(close, rtol=1e-5, atol=1e-9), state.ema, expected)
    assert len(keys) == 4 + 2  # of the parts of step 0, and of two other steps
    whole, *_, norm = runs[0]
    for share, left in (0.5, 0.5), (2.0, 1.0):
        clipped = replace(model.training, clip_norm=share * float(norm))
        state, *_, said = train.train_step(begin(), replace(model, training=clipped), 0, batch)
        close(said, norm, rtol=1e-5)  # as it was
        scaled = jax.tree.map(lambda mu: left * mu, whole.opt[0].mu)
        jax.tree.map(partial(close, rtol=1e-4, atol=1e-9), state.opt[0].mu, scaled)


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, data, small_models, capfd):
    common = ["waveform_cascader", "--tiny", "--data", data, "--batch-size", 2, "--log-every", 1]
    whole, parts = (tmp_path / name / "waveform_cascader" for name in ("whole", "parts"))
    run_train(*common, "--out", whole.parent, "--steps", 5)
    common += ["--out", parts.parent]
    run_train(*common, "--steps", 2, "--seed", 0)
    with (parts / "log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9}\n{"step"')  # what a killed run leaves behind
    run_train(*common, "--steps", 5, "--resume")
    save_t5(tmp_path / "other", random_t5(["another"], 1))
    for argv, words in [(["--steps", 5], "more --steps"), (["--seed", 1], "of seed 0"),
                        (["--t5", tmp_path / "other"], "not the text encoder")]:
        assert words in exits(capfd, train.main, *common, "--resume", *argv)
    assert "--resume" in exits(capfd, train.main, *common)
    assert [path.name[11:19] for path in train.checkpoints(parts)] == ["00000002", "00000005"]
    np.testing.assert_equal(last_tensors(parts), last_tensors(whole))
    assert [e["step"] for e in log_of(parts)] == [1, 2, 3, 4, 5]
    assert [e["loss"] for e in log_of(parts)] == [e["loss"] for e in log_of(whole)]


def test_a_run_begins_with_the_averages_of_another(tmp_path, data, capfd):
    """--init takes the model, with what the command line changes of it; bf16 and rematerialisation
    reach the network, and are stored."""
    name = "waveform_generator"
    old = small(name, batch_size=2, seconds=0.64, loss_weight="velocity")
    init = ["--init", leave_run(tmp_path / "a", old, averages := random_params(old.unet))]
    run_train(name, "--data", data, "--out", tmp_path / "b", *init, "--steps", 1, "--seed", 9,
              "--learning-rate", 1e-30, "--seconds", 0.32, "--bf16", "--remat")
    model, params, metadata = train.load_model(tmp_path / "b", name, raw=True)
    jax.tree.map(np.testing.assert_array_equal, params, averages)
    training = replace(old.training, steps=1, learning_rate=1e-30, seconds=0.32)
    unet = replace(old.unet, dtype="bfloat16", remat=True)
    assert model == replace(old, training=training, unet=unet)
    assert (metadata["seed"], metadata["index"], metadata["parts"]) == (9, 2, 1)
    assert "hertz" in metadata["words"]
    assert metadata["t5"] == str(tmp_path / "a" / "t5") and not (tmp_path / "b" / "t5").exists()
    text = n2m.Condition(text=np.zeros((2, 64, 64)), text_mask=np.ones((2, 64), bool))
    batch = n2m.Batch(np.zeros((2, 1024), np.float32), text)
    program = str(jax.make_jaxpr(train.gradients, static_argnums=1)(
        params, model, jax.random.key(0), batch))
    assert "bf16[" in program and ("remat" in program or "checkpoint" in program)
    assert "of waveform_generator" in exits(capfd, train.main, "waveform_cascader", "--data", data,
                                            "--out", tmp_path / "c", *init)


def test_what_a_checkpoint_refuses(tmp_path):
    model = small("superresolution_cascader")
    folder = tmp_path / model.name
    folder.mkdir()
    metadata = {"seed": 3, "index": 12, "t5": None, "t5_fingerprint": None}
    state = train.init_state(model, 3)._replace(ema=random_params(model.unet))
    (mine := folder / "checkpoint-00000001-copy.safetensors").touch()
    for step in (1, 2, 3):
        path = train.save_checkpoint(folder, state._replace(step=jnp.int32(step)), model, metadata)
    assert [p.name[-13] for p in train.checkpoints(folder)] == ["2", "3"]  # the last two are kept
    assert mine.exists()
    loaded, params, meta = train.load_model(tmp_path, model.name)
    assert loaded == model and meta == metadata
    jax.tree.map(np.testing.assert_array_equal, params, state.ema)
    write = partial(train.write_checkpoint, path, {"ema/entry/w": np.zeros(3)})
    foreign = replace(model, training=replace(model.training, noise_schedule="mine"))
    slow = replace(model, inference=replace(model.inference, step_schedule="slow"))
    for written, meta, words in [(model, {"seed": 0}, "not a checkpoint"),
                                 (model, metadata, "lacks ema/"),
                                 (foreign, metadata, r"needs SCHEDULES\['mine'\]"),
                                 (slow, metadata, r"needs STEP_SCHEDULES\['slow'\]")]:
        write(written, meta)
        with pytest.raises(ValueError, match=words):
            train.load_model(tmp_path, model.name)


REFUSALS = [  # script, command line, words of the line in which it refuses it with status 2
    *((train, f"waveform_generator --tiny --out {{tmp}}/out {argv}", words) for argv, words in [
        ("--data {tmp}/absent", "absent: no such folder"),
        ("--data {tmp}/empty", "no audio with a caption"),
        ("--data {tmp}/broken", "unusable"), ("--data :5", ":5: no such folder"),
        ("--overfit {tmp}/absent.wav", "absent.wav: no such file"),
        ("--overfit {tmp}/broken/a.wav", "a.wav"),
        ("", "--data"),
        ("--data {data} --overfit {data}/0.wav", "not allowed with"),
        ("--data {data} --init {data}/0.wav", "not allowed with"),
        ("--data {data}:1e308", "--data"), ("--data {tmp}/dangling", "captions.jsonl"),
        ("--data {data} --batch-size 0", "--batch-size"),
        (f"--data {{data}} --steps {10**400}", "--steps"),
        ("--data {data} --accumulate 3", "--accumulate"),
        ("--data {data} --learning-rate nan", "--learning-rate"),
        ("--data {data} --learning-rate inf", "--learning-rate"),
        ("--data {data} --occlusion 1.5", "--occlusion"),
        ("--data {data} --seconds 30.1", "--seconds"),
        ("--data {data} --decay-steps 100", "--warmup-steps"),
        ("--data {data} --noise-schedule x", "--noise-schedule"),
        ("--data {data} --loss-weight x", "--loss-weight"),
        ("--data {data} --seed -1", "--seed"), ("--data {data} --seed 4294967303", "--seed"),
        ("--data {data} --resume", "no checkpoint to resume from"),
        ("--data {data} --t5 {tmp}/absent", "absent"),
        ("--data {data} --model-parallel 2", "model"),
        ("--data {data} --processes 2 --process 2", "--process")]),
    (train, "mulan --out {tmp}/out --data {data}", "MODEL"),
    (train, "waveform_generator --data {data}", "--out"),
    (train, "waveform_generator --tiny --out {tmp}/file --data {data}", "file"),
    (train, "waveform_generator --out {tmp}/out --data {data} --init {tmp}/absent", "absent"),
    (train, "waveform_generator --out {tmp}/out --data {data} --init {data}/0.wav", "0.wav: "),
    (train, "waveform_generator --out {tmp}/out --data {data} --init x --resume", "--init begins"),
    (train, "superresolution_cascader --out {demo} --data {data} --resume", "averages alone"),
    (train, "superresolution_cascader --out {tmp}/out --data {tmp}", "all of whose audio is data"),
    *((sample, f"slow --models {{runs}} -o {{tmp}}/out/x.wav {argv}", words) for argv, words in [
        ("--prompts {tmp}/odd.jsonl", "give a prompt"),
        *((f"--seconds {seconds}", "--seconds") for seconds in ("x", 0, -1, "nan", 1e9)),
        ("--num -1", "--num"), ("--steps 0", "--steps"), ("--steps 1,2", "--steps"),
        ("--cfg-scale -1", "--cfg-scale"), ("--gamma 1.5", "--gamma"), ("--seed 1e3", "--seed"),
        ("--seed 4294967303", "--seed"),
        ("--route sideways", "'spectrogram'"), ("--schedule sideways", "has uniform, quadratic, "),
        ("--model-parallel 99", "is more than the"), ("--t5 {tmp}/t5", "not the T5 encoder")]),
    *((sample, f"--models {{runs}} {argv}", words) for argv, words in [
        ("", "give a prompt"), ("'  ' -o {tmp}/out/x.wav", "the prompt is empty"),
        ("slow -o {tmp}/a.wav", "is a folder"), ("slow -o {tmp}/b.wav --num 2", "is a folder"),
        ("slow -o {tmp}/out/x.mp3", ".wav"),
        ("slow -o {tmp}/file/x.wav", "file/x.wav: cannot be written"),
        ("--prompts {tmp}/absent", "absent"), ("--prompts {tmp}/file", "no prompt"),
        ("--prompts {tmp}/bad.jsonl", "bad.jsonl:2"),
        *((f"--prompts {{tmp}}/{name}.jsonl", f"{name}.jsonl:1")
          for name in ("odd", "half", "long", "number")),
        *((f"--prompts {{tmp}}/{name}.jsonl", "prompt 1: the prompt is empty")
          for name in ("blank", "space"))]),
    (sample, "slow --models {demo} -o {tmp}/out/x.wav --raw", "leave --raw out"),
    (sample, "slow --models {tmp} -o {tmp}/out/x.wav", "python train.py waveform_generator"),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory, data, runs):
    """What the command lines of REFUSALS name."""
    tmp = tmp_path_factory.mktemp("refusals")
    (tmp / "empty").mkdir()
    (tmp / "file").touch()
    broken = manifest(tmp / "broken", {"audio": "a.wav", "long": ["x"]})
    (broken / "a.wav").write_bytes(b"RIFF....WAVE")
    (tmp / "a.wav").mkdir()
    (tmp / "b-1.wav").mkdir()
    (tmp / "dangling").mkdir()
    (tmp / "dangling" / "captions.jsonl").symlink_to(tmp / "nowhere")
    write_tone(tmp / "dangling" / "a.wav", 1.0)
    for name, text in [("bad", 'good\n{"prompt": \n'), ("odd", '{"prompt": "x", "sed": 1}'),
                       ("half", '{"prompt": "x", "seed": 1.5}'),
                       ("long", '{"prompt": "x", "seconds": 601}'), ("number", '{"prompt": 5}'),
                       ("blank", '{"prompt": ""}'), ("space", '{"prompt": " "}')]:
        (tmp / f"{name}.jsonl").write_text(text)
    save_t5(tmp / "t5", random_t5(["another vocabulary"], 1))
    return {"tmp": tmp, "data": data, "runs": runs, "demo": sample.DEMO}


@pytest.mark.parametrize("script, argv, words", REFUSALS)
def test_a_refusal_is_one_line(script, argv, words, places, small_models, capfd):
    err = exits(capfd, script.main, *(word.format(**places) for word in shlex.split(argv)))
    refusal = [line for line in err.splitlines() if "skipped" not in line and "no --t5" not in line]
    assert len(refusal) == 1 and words in refusal[0]
    written = [*places["tmp"].glob("out/*"), *places["tmp"].rglob("*.part")]
    assert not [path for path in written if path.name != "t5"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data, capfd, small_models):
    common = ["superresolution_cascader", "--tiny", "--data", data, "--out", tmp_path,
              "--batch-size", 2]
    run_train(*common, "--steps", 2)
    err = exits(capfd, train.main, *common, "--resume", "--steps", 9, "--learning-rate", 1e30,
                "--warmup-steps", 0, status=1)
    assert "step 4: " in err and "not finite" in err and "checkpoint-00000002" in err
    kept = [path.name for path in train.checkpoints(tmp_path / common[0])]
    assert kept == ["checkpoint-00000002.safetensors"]


def test_memorise_kill_resume_sample(tmp_path):
    """One clip memorised, the run killed in the middle and resumed; sampled, it is the clip."""
    t = np.arange(round(0.32 * 3_200)) / 3_200
    hz = np.array([220, 330, 262, 440])[(t / 0.08).astype(int)]
    notes = 0.3 * np.sin(2 * np.pi * hz * t) * np.exp(-16 * (t % 0.08))
    soundfile.write(tmp_path / "clip.wav", notes, 3_200, "FLOAT")
    options = ("waveform_generator --seconds 0.32 --steps 120 --decay-steps 200 --warmup-steps 20 "
               "--learning-rate 2e-3 --save-every 35")
    more, folder = ("--overfit", tmp_path / "clip.wav", "--out"), tmp_path / "waveform_generator"
    with start(options, *more, tmp_path, tiny="test.four_depths") as run:
        while run.poll() is None and len(train.checkpoints(folder)) < 2:
            time.sleep(0.05)
        run.kill()
    assert run.returncode == -signal.SIGKILL and train.checkpoints(folder)[-1].stem[-3:] < "120"
    command = [sys.executable, "train.py", *options.split(), *more, tmp_path, "--resume"]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)

    model, params, _ = train.load_model(tmp_path, "waveform_generator")
    encoder = t5_encoder.load_text_encoder(tmp_path / "t5")
    text, text_mask = encoder.encode(["clip"], model.training.token_length)
    condition = n2m.Condition(text=text, text_mask=text_mask)
    for seed in (1, 2):
        keys = jax.random.key(seed)[None]
        clip = n2m.sample(params, model, condition, keys, len(t))[0, :, 0]
        assert np.corrcoef(clip, notes)[0, 1] > 0.9
    wav, rate = soundfile.read(folder / "sample-00000120.wav")
    assert rate == 3_200 and np.corrcoef(wav, notes)[0, 1] > 0.9


def four_depths(model):
    """As wide as `tiny` has the generator, less deep, with a block at each depth."""
    model, last = tiny(model), (False, False, False, True)
    return replace(model, unet=replace(
        model.unet, depth=4, strides=(4,) * 4, channels=(1, 1, 2, 3), blocks=(1,) * 4,
        self_attention=last, cross_attention=last))


def start(options, *more, env=None, tiny="lambda model: test.small(model.name)"):
    """train.py in a process of its own, on small models."""
    code = (f"import sys, test_noise2music as test, train; test.n2m.tiny = {tiny}; "
            "train.main(sys.argv[1:])")
    command = [sys.executable, "-c", code, *options.split(), "--tiny", *map(str, more)]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


# ---- what a fork does, from outside the modules ----

def test_a_noise_schedule_and_a_sixth_model_are_entries_of_tables(tmp_path, data, monkeypatch,
                                                                  capfd):
    """Two steps of the model, under the schedule, and a clip of the route that it is alone in."""
    monkeypatch.setitem(n2m.SCHEDULES, "straight", lambda t, xp=jnp: 10 - 20 * t)
    like = small("waveform_generator", seconds=0.4)
    sixth = replace(like, name="sixth", unet=replace(like.unet, strides=(3, 5)), rate=2_000,
                    audio_rate=2_000, inference=n2m.InferenceConfig("uniform", 1.0, 3.0, steps=4))
    monkeypatch.setitem(n2m.MODELS, "sixth", sixth)
    monkeypatch.setitem(n2m.ROUTES, "short", ("sixth",))
    argv = ["sixth", "--data", data, "--out", tmp_path]
    run_train(*argv, "--steps", 2, "--batch-size", 2, "--noise-schedule", "straight")
    model, params, _ = train.load_model(tmp_path, "sixth")
    assert (model.unet.strides, model.training.noise_schedule) == ((3, 5), "straight")
    encode = partial(sample.encode, t5_encoder.load_text_encoder(tmp_path / "t5"))
    audio = n2m.generate(["a tone"], {"sixth": (model, params)}, encode, 0.5)["sixth"]
    assert audio.shape == (1, 1_000) and np.isfinite(audio).all() and audio.std() > 0
    assert "no small variant of sixth" in exits(capfd, train.main, *argv, "--tiny")
    paper = replace(n2m.MODELS["waveform_generator"], name="sixth")  # its steps are Table 8's
    monkeypatch.setitem(n2m.MODELS, "sixth", paper)
    lacks = "MODELS['sixth']: needs STEP_SCHEDULES['front_heavy']"
    assert lacks in exits(capfd, train.main, *argv[:-1], tmp_path / "new")


def test_another_conditioning_input_is_five_places_to_touch(tmp_path, data, monkeypatch):
    """A tempo for each clip, those of the README: it is trained on, saved and heard."""
    spec, unet = n2m.unet_spec, n2m.unet
    plain_batch, plain_encode, tempo = train.make_batch, sample.encode, 1.0

    def with_tempo(params, cfg, x_t, t, c, text_on):
        heard = n2m.linear_layer(params["tempo"], c.tempo[:, None])  # (B, 1)
        return unet(params, cfg, x_t, t, c, text_on) + n2m.per_clip(heard, x_t)

    def make_batch(examples, model, encode):
        audio, c = plain_batch(examples, model, encode)
        return n2m.Batch(audio, c._replace(tempo=np.ones(len(audio), np.float32)))

    def encode(text_encoder, prompts, model):
        tempi = jnp.full(len(prompts), tempo)
        return plain_encode(text_encoder, prompts, model)._replace(tempo=tempi)

    fields = [*n2m.Condition._fields, "tempo"]
    mine = namedtuple("Condition", fields, defaults=[None] * len(fields))
    monkeypatch.setattr(n2m, "Condition", mine)
    monkeypatch.setattr(n2m, "unet_spec", lambda cfg: spec(cfg) | {
        "tempo": n2m.linear_spec(1, 1, ("whole", "whole"))})
    monkeypatch.setattr(n2m, "unet", with_tempo)
    monkeypatch.setattr(train, "make_batch", make_batch)
    monkeypatch.setattr(sample, "encode", encode)

    like = small("waveform_generator", seconds=0.4)  # of a shape of its own, so traced anew
    model = replace(like, unet=replace(like.unet, kernel_size=3))
    monkeypatch.setattr(n2m, "tiny", lambda _: model)
    monkeypatch.setitem(n2m.ROUTES, "alone", ("waveform_generator",))
    run_train("waveform_generator", "--tiny", "--data", data, "--out", tmp_path, "--steps", 2,
              "--batch-size", 2)
    assert last_tensors(tmp_path / "waveform_generator")["ema/tempo/w"].shape == (1, 1)
    clips = []
    for tempo in (1.0, 2.0):
        run_sample("a tone", "-o", tmp_path / "x.wav", "--models", tmp_path, "--route", "alone",
                   "--seconds", 0.5)
        clips.append(soundfile.read(tmp_path / "x.wav")[0])
    assert clips[0].shape == (1600,) and np.abs(clips[0] - clips[1]).max() > 0.01


# ---- sample.py ----

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All five models, small and untrained, as train.py leaves them."""
    out = tmp_path_factory.mktemp("runs")
    for name in NAMES:
        leave_run(out, small(name))
    return out


run_sample = lambda *argv: sample.main([str(a) for a in argv])
settings_in = lambda folder: [json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))]


def test_the_t5_of_a_route_is_where_any_of_its_models_says(tmp_path, runs):
    """Links to a generator that names none, beside a cascader that was trained with --t5."""
    for name in PAPER_ROUTES["waveform"][:2]:
        shutil.copytree(runs / name, tmp_path / name)
    path, = (tmp_path / "waveform_cascader").glob("*.safetensors")
    model, tensors, metadata = train.load_checkpoint(path, "waveform_cascader")
    train.write_checkpoint(path, tensors, model, metadata | {"t5": str(runs / "t5")})
    run_sample("slow piano", "-o", tmp_path / "x.wav", "--models", tmp_path, "--no-superres",
               "--seconds", 0.3)
    assert soundfile.info(tmp_path / "x.wav").frames == 4_800


def test_a_prompt_becomes_a_wav_by_each_route(tmp_path, runs):
    for route, names in PAPER_ROUTES.items():
        out = tmp_path / route / "music.wav"
        run_sample("slow piano", "-o", out, "--models", runs, "--route", route, "--seconds", 0.5,
                   "--num", 2, "--keep-stages", "--seed", 5)
        for i, settings in enumerate(settings_in(out.parent)):
            audio, rate = soundfile.read(out.with_name(f"music-{i}.wav"))
            assert rate == 24_000 and audio.shape == (12_000,) and audio.std() > 0
            assert (settings["prompt"], settings["seed"], settings["clip"]) == ("slow piano", 5, i)
            assert [*settings["stages"]] == list(names)
            stage = soundfile.info(out.with_name(f"music-{i}.{names[1]}.wav"))
            assert (stage.samplerate, stage.frames) == (16_000, 8_000)
        assert i == 1 and not list(out.parent.glob("*.part"))
        first, second = (out.with_name(f"music-{i}.wav").read_bytes() for i in (0, 1))
        assert first != second
    mel = np.load(tmp_path / "spectrogram/music-1.spectrogram_generator.npy")
    assert mel.shape == (50, 80)


def test_clips_of_many_prompts_have_names_in_their_order():
    """`evaluate.py` pairs the n-th clip by name with the n-th real one."""
    for n in (1, 10_000, 21_638):  # Sec. 4.3.3: MagnaTagATune has 21,638
        names = [sample.clip_name(i, n) for i in range(n)]
        assert names == sorted(names) and len({*names}) == n
    assert sample.clip_name(7, 10_000) == "0007.wav"


def test_a_file_of_prompts_continues_where_it_was_interrupted(tmp_path, runs, capfd):
    """Of all kinds of lines; prompt n has seed + n. Of captions (Sec. 4.3.3) the first long one, or
    else all tags. 10,000 words are cut, with a remark; any script is encodable."""
    hard = "спокойное фортепиано 静かなピアノ 🎹 </s> <extra_id_0>"
    lines = ["word " * 10_000, "", hard, {"prompt": "fast drums", "seed": 3, "seconds": 0.4},
             {"audio": "a.wav", "long": ["slow piano", "fast"], "short": ["bass"]},
             {"audio": "a.wav", "tags": ["drums", "fast"], "title": "slow", "start": 1}]
    write_tone(tmp_path / "a.wav")
    (tmp_path / "prompts").write_text("\n".join(
        line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
    argv = ["--prompts", tmp_path / "prompts", "-o", tmp_path / "out", "--models", runs,
            "--seconds", 0.5, "--seed", 7, "--steps", 1, "--no-superres"]
    run_sample(*argv)
    wavs = sorted((tmp_path / "out").glob("*.wav"))
    assert [soundfile.info(wav).frames for wav in wavs] == [8_000, 8_000, 6_400, 8_000, 8_000]
    assert [(s["prompt"], s["seed"]) for s in settings_in(tmp_path / "out")][1:] == [
        (hard, 8), ("fast drums", 3), ("slow piano", 10), ("slow, drums, fast", 11)]
    assert "the model reads the first 63" in capfd.readouterr().err
    assert len({wav.read_bytes() for wav in wavs}) == 5  # of other seeds
    before = [wav.stat().st_mtime_ns for wav in wavs]
    wavs[1].with_suffix(".json").unlink()  # as if stopped while the second was written
    run_sample(*argv)
    changed = [wav.stat().st_mtime_ns != old for wav, old in zip(wavs, before)]
    assert changed == [False, True, False, False, False]


def test_inference_parameters_reach_the_stages(runs):
    """Guidance only where there is text; with --gamma by Eq. 4, whatever sampler a model has."""
    def loaded(*options):
        argv = ["piano", "--models", runs, "--route", "spectrogram", *options]
        args, stages = sample.parse_args([str(a) for a in argv]), n2m.ROUTES["spectrogram"]
        weights = sample.load_weights(args, stages, sample.serving_mesh(1, 1))[0].values()
        fields = ("steps", "step_schedule", "cfg_scale", "gamma", "sampler")
        dtypes = {(model.unet.dtype, str(p["exit"]["w"].dtype)) for model, p in weights}
        return [tuple(getattr(m.inference, f) for f in fields) for m, _ in weights], dtypes

    assert loaded("--steps", "2,3,4", "--schedule", "uniform,back_heavy,front_heavy",
                  "--cfg-scale", 2, "--gamma", "0,1,0.5", "--bf16") == (
        [(2, "uniform", 2, 0, "ddpm"), (3, "back_heavy", None, 1, "ddpm"),
         (4, "front_heavy", None, 0.5, "ddpm")], {("bfloat16", "bfloat16")})
    models = [small(name).inference for name in n2m.ROUTES["spectrogram"]]
    assert loaded("--steps", 5) == (
        [(5, m.step_schedule, m.cfg_scale, m.gamma, m.sampler) for m in models],
        {("float32", "float32")}) and models[1].sampler != "ddpm"


def test_another_text_encoder_is_one_place_to_touch(tmp_path, data, small_models, monkeypatch):
    """Letters, each an embedding of five numbers."""
    read = []

    def encode(texts, length):
        read.extend(texts)
        letters = np.array([[*text.ljust(length)[:length]] for text in texts]).view(np.uint32)
        letters = letters.reshape(len(texts), length)
        return np.float32(letters[..., None] % np.arange(2, 7)), letters != ord(" ")

    mine = t5_encoder.TextEncoder(5, encode, len, "letters")
    monkeypatch.setattr(t5_encoder, "load_text_encoder", lambda folder: mine)
    monkeypatch.setitem(n2m.ROUTES, "short", ("waveform_generator",))
    run_train("waveform_generator", "--tiny", "--data", data, "--t5", tmp_path, "--out", tmp_path,
              "--batch-size", 2, "--steps", 2)
    model, _, metadata = train.load_model(tmp_path, "waveform_generator")
    assert model.unet.text_width == 5 and metadata["t5_fingerprint"] == "letters"
    assert any("tone" in text for text in read)
    run_sample("αβγ", "--models", tmp_path, "--route", "short", "--seconds", 0.3, "-o",
               tmp_path / "x.wav")
    assert read[-1] == "αβγ" and soundfile.info(tmp_path / "x.wav").samplerate == 3_200


def test_the_models_in_demo():
    """Five as `tiny` has them, and their T5, in 40 MB; it knows of words that no caption has."""
    files = sorted(sample.DEMO.rglob("*.safetensors"))
    assert len(files) == 6 and sum(path.stat().st_size for path in files) < 40e6
    text_encoder = t5_encoder.load_text_encoder(sample.DEMO / "t5")
    for name, full in ((name, n2m.MODELS[name]) for name in NAMES):
        model, params, metadata = train.load_model(sample.DEMO, name)
        unet = replace(n2m.tiny(full).unet, text_width=model.unet.text_width)
        assert (model.unet, model.inference) == (unet, n2m.tiny(full).inference)
        how = attrgetter("loss_weight", "noise_schedule", "t_max", "blur_taps", "blur_std")
        assert how(model.training) == how(n2m.tiny(full).training)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
        if n2m.uses_text(model):
            assert metadata["t5_fingerprint"] == text_encoder.fingerprint
            assert "violin" in metadata["words"]
            assert not {"viola", "keyboard", "speedy"} & set(metadata["words"])
    words = ["viola", "violin", "trumpet", "keyboard", "piano", "speedy", "fast", "slow"]
    text, mask = text_encoder.encode(words, 8)
    of = dict(zip(words, n2m.unit(np.array((text * mask[..., None]).sum(1)), np)))
    for word, near, far in [("viola", "violin", "trumpet"), ("keyboard", "piano", "trumpet"),
                            ("speedy", "fast", "slow")]:
        assert of[word] @ of[near] > of[word] @ of[far]


# ---- faults: nothing is lost, nothing is silently wrong ----

@pytest.mark.parametrize("data, right", [
    ("a\r\nb\u2028c\x85d\n".encode(), ["a", "b\u2028c\x85d"]), (b"\xef\xbb\xbfa\n\n", ["a", ""]),
    ("a\nb".encode("utf-16"), ":1: is not UTF-8 but, it seems, UTF-16"),
    (b"a\nb\0", ":2: .*UTF-16"),
    ("a\ncaf\xe9\n".encode("latin-1"), ":2: .*Latin-1"), (b"\xed\xa0\x80", ":1: ")])
def test_lines_are_utf8_and_end_in_newlines_only(tmp_path, data, right):
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    if isinstance(right, list):
        assert t5_encoder.read_lines(path) == right
    else:
        with pytest.raises(ValueError, match=right) as error:
            t5_encoder.read_lines(path)
        one_line(error, path)


def test_json_and_what_is_no_file(tmp_path):
    with pytest.raises(ValueError):
        t5_encoder.parse_json('{"a": {"b": 1, "b": 2}}')
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        for read in (t5_encoder.read_lines, read_safetensors, train.duration_of):
            with pytest.raises(ValueError, match="is no regular file"):
                read(path)


def test_whole_files_and_what_the_killed_leave(tmp_path, monkeypatch):
    parts = [tmp_path / f"a.{node}.{pid}.part" for node, pid in [
        (t5_encoder.platform.node(), 2**22 + 1), (t5_encoder.platform.node(), os.getppid()),
        ("elsewhere", 2**22 + 1)]]
    for part in parts:
        part.touch()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space.*x/b'"):
        patch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left")))
        with t5_encoder.whole_file(tmp_path / "x/b") as file:  # the folder is made
            file.write(b"1")
    assert not os.listdir(tmp_path / "x")
    with t5_encoder.whole_file(tmp_path / "b") as file:
        assert len(list(tmp_path.glob("b.*.part"))) == 1 and not (tmp_path / "b").exists()
    assert [part.exists() for part in parts] == [False, True, True]
    parts[0].mkdir()  # of a dead process, and not ours to remove
    monkeypatch.setattr(shutil, "rmtree", Mock(side_effect=PermissionError(1, "no")))
    with t5_encoder.whole_file(tmp_path / "c"):
        pass
    assert parts[0].is_dir() and (tmp_path / "c").is_file()


def say_samples(path, samples):
    """Writes another number of samples into a FLAC: four bits of byte 21, and 4 bytes."""
    data = bytearray(path.read_bytes())
    data[21:26] = (data[21] >> 4 << 36 | samples).to_bytes(5, "big")
    path.write_bytes(data)


@pytest.mark.parametrize("samples", [0, 2**36 - 1])
def test_a_length_that_cannot_be_is_counted(tmp_path, samples):
    path = write_tone(tmp_path / "a.flac", 70.0)
    right = train.track_clips(train.Track(path))
    audio = train.load_audio(path, 35, 30, 16_000)
    say_samples(path, samples)
    assert train.track_clips(train.Track(path)) == right and len(right) == 2
    close(train.load_audio(path, 35, 30, 16_000), audio)


def test_a_short_clip_of_no_known_length_is_memorised(tmp_path, small_models, monkeypatch):
    path = write_tone(tmp_path / "a.flac", 0.5)
    say_samples(path, 0)
    monkeypatch.setattr(train, "train", lambda args, run, folder, clips, *_: found.extend(clips))
    found = []
    run_train("superresolution_cascader", "--tiny", "--overfit", path, "--out", tmp_path / "out",
              "--seconds", 1)
    assert len(found) == 1 and train.load_clips(found, 16_000)[0].shape == (8_000,)


def test_audio_that_cannot_be_is_refused_and_named(tmp_path):
    tone = 0.5 * np.sin(np.arange(16_000) / 9)
    spoiled = tone.copy()
    spoiled[99] = 1e30
    for name, audio, rate in [("spoiled", spoiled, 16_000), ("integers", 32768 * tone, 16_000),
                              ("rate", tone, 2**31 - 1)]:
        soundfile.write(tmp_path / f"{name}.wav", audio, rate, "FLOAT")
    (tmp_path / "a.raw").write_bytes(bytes(99))
    soundfile.write(tmp_path / "loud.wav", 8 * tone, 16_000, "FLOAT")
    for name, words in [("spoiled.wav", "full scale"), ("integers.wav", "full scale"),
                        ("rate.wav", "2147483647 Hz"), ("a.raw", "samplerate must be")]:
        with pytest.raises(ValueError, match=words) as error:
            train.load_audio(tmp_path / name, 0, 1, 16_000)
        one_line(error, tmp_path / name)
    assert train.load_audio(tmp_path / "loud.wav", 0, 1, 16_000).max() > 3
    with pytest.raises(ValueError, match="no sample at 3200 Hz there"):
        train.load_audio(tmp_path / "loud.wav", 0.9999, 0.0001, 3_200)


def test_one_entry_does_not_stop_a_run(tmp_path, capfd, monkeypatch):
    write_tone(tmp_path / "a.wav"), (tmp_path / "a.txt").write_text("a tone")
    write_tone(tmp_path / "b.wav"), (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt").write_text("c"), os.mkfifo(tmp_path / "c.wav")
    (tmp_path / "closed").mkdir(), (tmp_path / "linked").symlink_to(tmp_path / "closed")
    scandir = os.scandir

    def scan(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert [track.path.name for track in train.read_tracks(tmp_path, True)] == ["a.wav"]
    err = capfd.readouterr().err
    for words in ("closed: Permission denied", "b.txt:1: is not UTF-8", "c.wav: is no regular",
                  "linked: a link to a folder", "skipped 2 of 3"):
        assert words in err
    names = "a.wav", "a.raw", "x" * 300 + ".wav", "\ud800.wav", "nul\0.wav", "absent.wav"
    (tmp_path / "a.raw").write_bytes(bytes(99))
    folder = manifest(tmp_path, *({"audio": name, "long": ["\ud800 一"]} for name in names))
    clips = train.find_clips(tracks := train.read_tracks(folder, True))
    assert len(clips) == 1 and "skipped 4 of 6" in (err := capfd.readouterr().err)
    assert "a.raw: samplerate must be" in err and len(tracks) == 2
    (folder / "captions.jsonl").write_text('{"audio": "a.wav", "long": "x", "long": "y"}\n')
    with pytest.raises(ValueError, match="no audio with a caption"):
        train.read_tracks(folder, True)


def test_a_failing_disk_is_named(monkeypatch):
    fails = Mock(side_effect=OSError(5, "Input/output error"))  # as `read` has it, of no file
    monkeypatch.setattr(train, "WAITS", ())
    with pytest.raises(OSError) as error:
        train.usable(fails, [("a.wav", None)], ValueError)
    assert train.reason(error.value) == "a.wav: Input/output error"


def test_a_blink_of_the_system_costs_nothing(tmp_path, small_models, capfd, monkeypatch):
    """A folder that is away and comes back changes no bit, beside a bad file. One that stays away
    stops the run, saved; and the resumed run is the uninterrupted one."""
    monkeypatch.setattr(train, "CACHE", 0)  # decoded at each step
    folder, load, calls = tmp_path / "music", train.load_audio, itertools.count(1)
    manifest(folder, *({"audio": f"{k}.flac", "long": "x"} for k in range(4)))
    for k in range(4):
        write_tone(folder / f"{k}.flac", 31.0 if k == 1 else 3.0, hz=200 * (k + 1))
    cut = (folder / "1.flac").read_bytes()
    (folder / "1.flac").write_bytes(cut[:len(cut) // 2])
    run = lambda out, *argv: run_train("superresolution_cascader", "--tiny", "--data", folder,
                                       "--batch-size", 2, "--out", tmp_path / out, *argv)
    last = lambda out: last_tensors(tmp_path / out / "superresolution_cascader")
    run("whole", "--steps", 9)
    assert capfd.readouterr().err.count("skipped") > 1  # the bad one, at each visit

    def away(path, *args):  # in several threads, so each call takes a number of its own
        if (n := next(calls)) in gone:
            folder.rename(tmp_path / "away")
            back = lambda: (tmp_path / "away").rename(folder)
            gone[n] and threading.Timer(0.3, back).start()
        return load(path, *args)

    monkeypatch.setattr(train, "load_audio", away)
    gone = {4: True}
    monkeypatch.setattr(train, "WAITS", (0.2, 0.5))
    run("blink", "--steps", 9)
    assert "No such file" not in capfd.readouterr().err
    calls, gone = itertools.count(1), {15: False}
    common = ["superresolution_cascader", "--tiny", "--data", folder, "--batch-size", 2, "--out"]
    err = exits(capfd, train.main, *common, tmp_path / "gone", "--steps", 9).splitlines()[-1]
    assert "flac: No such file" in err and "Last good checkpoint" in err
    (saved,) = train.checkpoints(tmp_path / "gone" / "superresolution_cascader")
    assert saved.name in err and 0 < int(saved.stem[-8:]) < 9
    (tmp_path / "away").rename(folder), gone.clear()
    run("gone", "--resume", "--steps", 9)
    for out in ("blink", "gone"):
        np.testing.assert_equal(last(out), last("whole"))


def test_captions_that_are_cut_or_cannot_be_read_are_counted(monkeypatch, capfd):
    reader = t5_encoder.TextEncoder(7, None, {"slow": 63, "long": 64, "ゆっくり": 0}.get, "x")
    monkeypatch.setattr(t5_encoder, "load_text_encoder", lambda _: reader)
    args = types.SimpleNamespace(t5="t5", out=Path("out"), model="waveform_generator")
    train.text_encoder(args, small("waveform_generator"), {"t5_fingerprint": None},
                       ["slow", "long", "ゆっくり"])
    err = capfd.readouterr().err
    assert "knows no word of 1 of 3 captions" in err and "1 of 3 captions are cut to 63" in err


def test_a_refused_run_leaves_no_random_t5(tmp_path, data, small_models, capfd):
    common = ["waveform_generator", "--tiny", "--out", tmp_path / "out"]
    (tmp_path / "x.py").write_text("no audio")
    exits(capfd, train.main, *common, "--overfit", tmp_path / "x.py")
    assert not (tmp_path / "out").exists()
    run_train(*common, "--data", data, "--steps", 1, "--batch-size", 1)
    shutil.rmtree(tmp_path / "out" / "t5")  # of a folder that was moved in part
    err = exits(capfd, train.main, *common, "--data", data, "--steps", 2, "--resume")
    assert "t5: no such folder" in err and not (tmp_path / "out" / "t5").exists()


def test_one_run_folder_has_one_trainer(tmp_path, data, small_models, capfd, monkeypatch):
    common = ["superresolution_cascader", "--tiny", "--data", data, "--batch-size", 2, "--out"]
    with train.lock(tmp_path / "superresolution_cascader" / "lock-0"):
        err = exits(capfd, train.main, *common, tmp_path)
        assert f"process {os.getpid()} on" in err and "another folder" in err
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no locks.*lock-1"):
        patch.setattr("fcntl.flock", Mock(side_effect=OSError(37, "no locks")))
        train.lock(tmp_path / "lock-1")
    calls, made = [], t5_encoder.random_t5

    def race(captions, seed):  # another model's training ends first
        save_t5(tmp_path / "t5", made(["others"], 1))
        return made(captions, seed)

    monkeypatch.setattr(t5_encoder, "random_t5", race)
    monkeypatch.setattr(train, "train", lambda _, run, *args: calls.append(run.encoder))
    run_train("waveform_generator", "--tiny", "--data", data, "--out", tmp_path)
    assert calls[0].fingerprint == t5_encoder.load_text_encoder(tmp_path / "t5").fingerprint
    assert calls[0].fingerprint == t5_encoder.fingerprint(made(["others"], 1))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("text, kept", [
    ('{"step": 1}\n{"step": 2}\n{"st', 1), ('{"step": 1}\n{"st', 1), ('{"step": 1}', 1),
    ("", 0), ("{", 0), ("notes\n", None), ("notes", None),
    ('{"step": 1}\n[]\n', None), ('{"loss": 1}\n', None)])
def test_a_log_loses_what_a_kill_has_torn_and_nothing_else(tmp_path, text, kept):
    """What a kill has torn is dropped; another's file is left as it is."""
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    if kept is None:
        with pytest.raises(ValueError, match="log.jsonl"):
            train.read_log(path, lambda entry: entry["step"] <= 1)
        assert path.read_text() == text
    else:
        assert len(train.read_log(path, lambda entry: entry["step"] <= 1)) == kept
        assert path.read_text() == '{"step": 1}\n' * kept


@pytest.fixture
def signals():
    """As in a terminal: what is started in the background or under nohup ignores some."""
    before = {n: signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_full_disk_a_closed_stdout_and_a_signal_stop_a_run_saved(
        tmp_path, data, small_models, capfd, monkeypatch, signals):
    name = "superresolution_cascader"
    common = [name, "--tiny", "--data", data, "--batch-size", 2, "--log-every", 1, "--out"]
    (tmp_path / "full" / name).mkdir(parents=True)
    report = train.report

    def full(pending, seconds, steps, log):
        report(pending, seconds, steps, Path("/dev/full") if pending[-1][0] == 2 else log)

    monkeypatch.setattr(train, "last_good", lambda folder: f"Good: {train.checkpoints(folder)[-1]}")
    monkeypatch.setattr(train, "report", full)
    err = exits(capfd, train.main, *common, tmp_path / "full")
    assert "/dev/full: No space left on device; stopped at step 2. Good: " in err
    assert "checkpoint-00000002" in err and err.count("\n") == 1

    monkeypatch.setattr(train, "report", Mock(side_effect=BrokenPipeError(32, "Broken pipe")))
    err = exits(capfd, train.main, *common, tmp_path / "pipe", status=141)
    assert "stdout: Broken pipe; stopped at step 1. Good: " in err and err.count("\n") == 1

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        once = iter([number])
        monkeypatch.setattr(train, "report", lambda *_: [os.kill(os.getpid(), n) for n in once])
        err = exits(capfd, train.main, *common, tmp_path / str(number), status=128 + number)
        assert "stopped at step 2, saved as" in err and err.count("\n") == 1
        assert len(train.checkpoints(tmp_path / str(number) / name)) == 1 and "--resume" in err


def test_what_is_said_to_a_closed_stream_is_said_nowhere(capfd, monkeypatch, signals):
    """Where one is closed it is None, which has no isatty, and which `print` takes for stdout."""
    say = lambda _: [print(name, getattr(sys, name).isatty(), file=getattr(sys, name))
                     for name in ("stdout", "stderr")]
    for closed in ("stdout", "stderr"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, closed, None)
            train.run_command(say, None)
        assert closed not in "".join(capfd.readouterr())


def test_what_is_not_finite_is_not_saved_where_files_are_gone(tmp_path, data, small_models, capfd,
                                                              monkeypatch):
    def batches(*_):
        yield []
        raise FileNotFoundError(2, "No such file", "music")

    monkeypatch.setattr(train, "batches", batches)
    monkeypatch.setattr(train, "make_batch", lambda *_: None)
    step = lambda state, *_: (state, np.zeros(2), np.zeros(2), np.inf)
    monkeypatch.setattr(train, "train_step", step)
    name = "superresolution_cascader"
    err = exits(capfd, train.main, name, "--tiny", "--data", data, "--out", tmp_path, status=1)
    assert "step 1: the loss" in err and not train.checkpoints(tmp_path / name)


def test_signals_before_the_first_step(tmp_path, data, capfd, monkeypatch, signals):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        monkeypatch.setattr(train, "read_tracks", lambda *_: os.kill(os.getpid(), number))
        err = exits(capfd, train.main, "waveform_generator", "--tiny", "--data", data, "--out",
                    tmp_path, status=128 + number)
        assert err.count("\n") == 1 and number.name in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [
    MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 9")])
def test_out_of_memory_says_what_takes_less(error, capfd):
    err = exits(capfd, partial(train.run_command, Mock(side_effect=error)))
    assert "--accumulate" in err and err.count("\n") == 1


def test_one_of_several_processes_ends_at_once(capfd, monkeypatch):
    """Through `os._exit`: else a full disk of one would keep all waiting for minutes."""
    run = Mock(side_effect=OSError(28, "No space left", "x"))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status + 40))
    assert "x: No space left" in exits(capfd, partial(train.run_command, run), status=42)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keep_memory knows glibc alone")
def test_freed_memory_is_not_handed_out_anew():
    code = """if True:
        import resource, train
        def pages():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            bytearray(2**26)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        pages(), print(pages()), train.keep_memory(), pages(), print(pages())"""
    command = [sys.executable, "-c", code]
    before, after = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()
    assert int(after) + 10 < int(before)  # 2^14 pages, or 32 large ones


def test_the_cache_of_programs_is_no_condition(tmp_path, capfd, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        for home in Mock(side_effect=RuntimeError("no home")), lambda: Path("/proc"):
            monkeypatch.setattr(Path, "home", home)
            train.keep_programs()
            err = capfd.readouterr().err
            assert "compiled programs are not kept: " in err and err.count("\n") == 1
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # to be put back
        (tmp_path / "jit_f-0123-cache").touch(), (tmp_path / "jit_g-0123-cache").touch()
        train.keep_programs()
        for how in ("reading", "writing"):
            for f in "fg"[:1 + (how == "writing")]:
                warnings.showwarning(UserWarning(f"Error {how} persistent compilation cache entry "
                                                 f"for 'jit_{f}': error: x"), UserWarning, "", 0)
        assert capfd.readouterr().err.count("\n") == 1
        assert [path.name for path in tmp_path.iterdir()] == ["jit_g-0123-cache"]
        monkeypatch.chdir(tmp_path), jax.config.update("jax_compilation_cache_dir", "gs://a/b")
        train.keep_programs()  # JAX writes there itself
        assert jax.config.jax_compilation_cache_dir == "gs://a/b" and not Path("gs:").exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_settings_name_the_weights_and_the_json_its_wav(tmp_path, runs, capfd):
    """Another checkpoint's wavs are not there already, nor another seed's."""
    models, prompts, out = tmp_path / "runs", tmp_path / "prompts.txt", tmp_path / "out"
    shutil.copytree(runs, models)
    prompts.write_text("slow piano\nfast drums\n")
    run = lambda *more: run_sample("--prompts", prompts, "-o", out, "--models", models, "--seconds",
                                   0.5, "--no-superres", *more)
    again = lambda *more: (run(*more), capfd.readouterr().out.count("there already"))[1]
    assert (again(), again()) == (0, 2)
    kept = "-o", tmp_path / "kept"
    assert again(*kept) == again(*kept, "--keep-stages") == 0  # which a first run did not keep
    assert again(*kept, "--keep-stages") == again(*kept) == 2
    wav = (out / "0000.wav").read_bytes()
    (out / "0001.wav").write_bytes(wav)  # under the json of another
    assert again() == 1
    name = "waveform_cascader"
    train.save_checkpoint(models / name, train.init_state(small(name), 5), small(name), {
        "seed": 0, "index": 0, "t5": None, "t5_fingerprint": None} | train.load_checkpoint(
            train.checkpoints(models / name)[0], name)[2])
    assert (again(), again()) == (0, 2)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sample, "write_wav", Mock(side_effect=KeyboardInterrupt))
        run("--seed", 4)
    assert [path.name for path in sorted(out.iterdir())] == ["0000.wav", "0001.json", "0001.wav"]
    prompts.write_text("slow piano\n"), capfd.readouterr(), run()
    assert "holds 1 clips of other prompts" in capfd.readouterr().err


def test_programs_of_many_lengths_are_dropped(tmp_path, runs, monkeypatch):
    dropped, prompts = [], tmp_path / "prompts.txt"
    prompts.write_text("".join(f'{{"prompt": "slow", "seconds": {1 + n // 2}}}\n'
                               for n in range(20)))
    monkeypatch.setattr(jax, "clear_caches", lambda: dropped.append(1))
    monkeypatch.setattr(sample, "run_job", lambda *_: None)
    run_sample("--prompts", prompts, "-o", tmp_path, "--models", runs)
    assert len(dropped) == 2  # 10 lengths, 4 at a time


def test_the_first_stage_that_is_not_finite_is_named(tmp_path, runs, monkeypatch, capfd):
    outputs = {"waveform_generator": np.full((1, 9), np.nan), "waveform_cascader": np.ones((1, 9))}
    monkeypatch.setattr(n2m, "generate", lambda *_, **__: outputs)
    argv = "slow", "-o", tmp_path / "x.wav", "--models", runs, "--no-superres"
    assert "waveform_generator: sampled values" in exits(capfd, sample.main, *argv)
    assert not list(tmp_path.iterdir())


def test_a_report_has_the_mean_loss_by_t_and_the_days(tmp_path, capfd):
    pending = [(1, np.array([1.0, 3.0]), np.array([0.1, 0.9]), 1.0)]
    train.report(pending, 3600.0, 101, tmp_path / "log.jsonl")
    out = capfd.readouterr().out
    assert "loss 2.0000 by t [1.0000 - - 3.0000]" in out and "ETA 4 days, 4:00:00" in out


# ---- sharding and several processes ----

ONE_DEPTH = dict(base_dimension=16, groups=8, depth=1, channels=(2,), blocks=(1,))
SHARDED = {  # every width, head and group divides by 8
    "waveform_cascader": small_unet(
        **ONE_DEPTH, strides=(6,), self_attention=(True,), cross_attention=(True,),
        attention_heads=8),
    "spectrogram_vocoder": small_unet(
        **ONE_DEPTH, strides=(160,), self_attention=(False,), cross_attention=(False,),
        attention_heads=0, in_channels=1, aligned_channels=80),
}


def check_splits(name, N, *model_parallel):
    """Run on 8 devices: the loss, its gradients and a clip of a mesh equal those of one device,
    of clips of N samples.

    And no program gathers the clips, as the partitioner of CPU programs would for an FFT."""
    inference = replace(n2m.MODELS[name].inference, steps=3)
    model = replace(n2m.MODELS[name], unet=SHARDED[name], inference=inference)
    params, keys = random_params(model.unet), jax.random.split(jax.random.key(3), 8)
    given = random_condition(model.unet, b=5, t=N)._replace(low_fi=None, aligned=None)
    given = jax.tree.map(lambda a: np.resize(np.asarray(a), (8, *a.shape[1:])), given)
    audio, low = 0.3 * np.asarray(normal(8, N)), 0.3 * np.asarray(normal(8, N // 5, seed=1))

    def results(params, audio, low, given, keys):
        batch = n2m.Batch(audio, given)
        grads, (losses, _) = train.gradients(params, model, keys[0], batch)
        previous = low if model.low_rate else n2m.log_mel(audio)
        condition = n2m.sampling_condition(model, given, previous, N / 16_000)
        clip = n2m.sample(params, model, condition, keys, N)
        return losses, grads, clip, condition, n2m.log_mel(audio)

    clips = audio, low, given, keys
    losses, grads, *rest = jax.jit(results)(params, *clips)
    for n in model_parallel:
        mesh = n2m.make_mesh(n)
        rows = jax.NamedSharding(mesh, jax.P("data"))
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, n2m.shardings(model.unet, mesh))
            placed = placed, *jax.device_put(clips, rows)
            program = jax.jit(results).lower(*placed).compile()
            text = program.as_text()
            gathered = re.findall(r"\[([\d,]+)\]\S* all-gather\(", text)
            assert text.count(" all-gather(") == len(gathered)
            # Losses for a log, and a few indices: no audio.
            assert all(math.prod(map(int, shape.split(","))) <= 8 for shape in gathered)
            assert " fft(" in text and "all-reduce" in text
            losses_n, grads_n, *rest_n = program(*placed)
            if n == 2:  # 4 along data: 2 clips each, though their keys and condition are anywhere
                clip = n2m.sample(placed[0], model, rest[1], keys, N)
                assert clip.sharding.shard_shape(clip.shape) == (2, N, 1)
        close(losses_n, losses, rtol=1e-5)
        jax.tree.map(functools.partial(close, atol=2e-5), rest_n, rest)
        bound = lambda b: 1e-5 * max(1, np.abs(b).max())
        jax.tree.map(lambda a, b: close(a, b, rtol=1e-3, atol=bound(b)), grads_n, grads)


@pytest.mark.parametrize("case", [("waveform_cascader", 480, 2, 8),
                                  ("spectrogram_vocoder", 960, 1, 4)], ids=SHARDED)
def test_every_split_of_eight_devices_gives_the_same_numbers(case):
    code = f"import test_noise2music; test_noise2music.check_splits(*{case})"
    subprocess.run([sys.executable, "-c", code], check=True, env=devices(8), cwd=ROOT)


def devices(n):
    """The environment of a process of n devices, which may wait for each other beyond XLA's 40 s.

    Collectives that wait hold threads of XLA's pool, by default one a core or a device: all of them
    can wait for one that then finds no thread, for ever. NPROC is the size of that pool."""
    flags = (f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n} "
             "--xla_cpu_collective_call_terminate_timeout_seconds=600")
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "NPROC": str(16 * n)}


def test_the_table_lays_out_parameters_and_state():
    """What is split, along which axis; without devices."""
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    model = replace(n2m.MODELS["waveform_cascader"], unet=SHARDED["waveform_cascader"])
    block = lambda tree: jax.tree.map(lambda s: tuple(s.spec), tree["down"][0]["blocks"][0])
    state = train.state_layout(model, mesh)
    now, rest = block(state.params), block(state.ema)
    assert now["conv1"] == {"w": (None, None, "model"), "b": ("model",)}
    assert now["conv2"] == {"w": (None, "model", None), "b": (None,)}
    attention = now["cross_attention"]
    assert attention["q"]["w"] == (None, "model") and attention["out"]["w"] == ("model", None)
    assert now["skip"] == {"w": (None, None), "b": (None,)}
    assert rest["conv1"]["w"] == (None, "data", "model") and rest["skip"]["w"] == (None, "data")
    assert block(state.opt[0].mu) == block(state.opt[0].nu) == rest


def test_what_does_not_divide_is_an_error_that_names_it(monkeypatch):
    """Of parameters and activations. Averages and moments (column 1) stay whole there."""
    mesh = jax.sharding.AbstractMesh((4, 2), ("data", "model"))
    uneven = replace(SHARDED["waveform_cascader"], attention_heads=3)  # 3 heads of 5
    layout, collision = n2m.partition, "'heads', 'hidden'.* laid along 'model'"
    for text, f, *args in [
        ("'hidden' of size 15 .* 2 devices along 'model'", layout, mesh, (16, 15),
         ("channels", "hidden")),
        ("'batch' of size 6 .* 4 devices along 'data'", layout, mesh, (6, 100), ("batch",)),
        (collision, layout, mesh, (8, 8), ("heads", "hidden")),
        (collision, layout, mesh, (8, 8), ("heads", "hidden"), 1),
        ("'heads' of size 15", n2m.shardings, uneven, mesh),
        ("6 devices cannot be split 4 ways", n2m.make_mesh, 4, list(range(6))),
    ]:
        with pytest.raises(ValueError, match=text):
            f(*args)
    odd = layout(mesh, (3, 2, 16), ("whole", "channels", "hidden"), column=1)
    assert odd == jax.P(None, None, "model")
    parts = [train.default_parts(n, mesh) for n in (4, 32, 64, 96)]
    assert parts == [1, 1, 2, 3]  # 1, 8, 16, 24 clips a device, 8 of them at once
    args = train.parse_args(["waveform_generator", "--data", "x", "--out", "x"])
    assert [train.mesh_and_parts(args, 64, before)[1] for before in (None, 16)] == [8, 16]
    with monkeypatch.context() as patch:
        patch.setattr(n2m, "make_mesh", lambda model, devices: (model, len(devices)))
        assert sample.serving_mesh(6, 2, range(16)) == (2, 4)  # 2 groups of 2, of 3 clips each
    monkeypatch.setattr(n2m, "make_mesh", lambda _: mesh)
    with pytest.raises(ValueError, match="batch of 6 .* 4 groups of devices; choose --batch-size"):
        train.mesh_and_parts(args, 6)


def test_the_rows_of_all_processes_are_the_batch(monkeypatch):
    """Each reads its share of every part."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    rows = []
    for i in range(3):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        rows.append(train.process_rows(24, 2))
    assert rows[1] == [4, 5, 6, 7, 16, 17, 18, 19] and sorted(sum(rows, [])) == list(range(24))


def test_two_processes_train_as_one_and_resume_on_another_number(tmp_path, data):
    """The losses of 2 processes of 4 devices are those of 1 of 2; a killed one ends the other; one
    process, of 2 devices again, goes on."""
    options = ("spectrogram_vocoder --batch-size 16 --seconds 0.32 --accumulate 2 --log-every 1 "
               "--save-every 3 --model-parallel 2 --seed 5 --warmup-steps 0")
    folders = {name: tmp_path / name / "spectrogram_vocoder" for name in ("one", "two")}
    run = lambda n, name, *more: start(options, "--data", data, "--out", folders[name].parent,
                                       *more, env=devices(n))
    logged = lambda name, key: [entry[key] for entry in log_of(folders[name])]

    def pair(*more):
        with socket.create_server(("localhost", 0)) as free:
            host = f"localhost:{free.getsockname()[1]}"
        return [run(4, "two", *more, "--processes", 2, "--process", i, "--coordinator", host)
                for i in (0, 1)]

    one = run(2, "one", "--steps", 6)
    assert one.wait(200) == 0, one.stderr.read()
    two = pair("--steps", 3)
    assert [p.wait(200) for p in two] == [0, 0] and "step" not in two[1].stdout.read()
    close(logged("two", "loss"), logged("one", "loss")[:3], rtol=1e-4)
    close(logged("two", "grad_norm"), logged("one", "grad_norm")[:3], rtol=1e-3)

    two = pair("--steps", 100_000, "--resume")
    while "step 5/" not in two[0].stdout.readline():
        assert two[0].poll() is None, two[0].stderr.read()
    two[1].kill()
    assert two[0].wait(60) != 0 and "another" in two[0].stderr.read()

    saved = int(train.checkpoints(folders["two"])[-1].stem[-8:])
    assert saved % 3 == 0
    assert run(2, "two", "--steps", saved + 1, "--resume").wait(200) == 0
    by_step = dict(zip(logged("two", "step"), logged("two", "loss")))
    for step, loss in zip(logged("one", "step"), logged("one", "loss")):
        assert step > saved + 1 or abs(by_step[step] - loss) < 1e-3 * loss


# ---- noise2music.py: pseudo-labels and metrics, Secs. 3.5 and 4.3.2 ----

def test_top_captions_by_hand(monkeypatch):
    """Cosines, not products; of equals the lower index; two blocks, one filled up, merged."""
    monkeypatch.setattr(n2m, "CAPTION_BLOCK", 4)
    captions = np.array([[0, 5], [1, 0], [2, 0], [1, 1], [-1, 0], [0, 0]], np.float32)
    clips = np.array([[3, 0], [0, 0.1], [-1, 1]], np.float32)
    assert n2m.top_captions(captions, clips, 3).tolist() == [[1, 2, 3], [0, 3, 1], [0, 4, 3]]
    assert n2m.top_captions(captions, clips[2:], 6).tolist() == [[0, 4, 3, 5, 1, 2]]  # no padding


def test_captions_are_drawn_with_probabilities_inverse_to_their_counts():
    """Three of four: the distributions of the first and of the one left out (chi-squared)."""
    counts, n = np.array([1, 2, 4, 9]), 4000
    padding = np.repeat(np.arange(4), n * counts).reshape(-1, 4)  # other clips, counted too
    everything = np.concatenate([np.tile([0, 1, 2, 3], (n, 1)), padding])
    weight = 1 / np.bincount(everything.ravel())
    weight /= weight.sum()

    def check(drawn, p):  # 16.3 is the 99.9 % point of 3 degrees of freedom
        observed, expected = np.bincount(drawn, minlength=4), n * np.asarray(p)
        assert np.sum((observed - expected) ** 2 / expected) < 16.3

    check(n2m.draw_captions(everything, 1, seed=7)[:n, 0], weight)
    three = n2m.draw_captions(everything, 3, seed=8)
    assert (three == n2m.draw_captions(everything, 3, seed=8)).all()
    assert (np.diff(three[:n], axis=1) > 0).all()  # no caption twice, the closest first
    last = np.zeros(4)
    for *order, left in itertools.permutations(range(4)):  # the probability of each to be left
        rest = 1 - np.cumsum([0, *weight[order]])[:3]
        last[left] += np.prod(weight[order] / rest)
    check(6 - three[:n].sum(axis=1), last)


@reference
@pytest.mark.parametrize("clips", [400, 9])
def test_fad_against_the_square_root_of_scipy(clips):
    """With more clips than dimensions, and with fewer."""
    linalg = pytest.importorskip("scipy.linalg", reason="FAD is compared with scipy's square root")
    x, y = rng().normal(size=(clips, 12)), rng(1).normal(size=(300, 12))
    y = y * np.linspace(0.5, 2, 12) + 0.3
    a, b = np.cov(x.T), np.cov(y.T)
    half = linalg.sqrtm(b).real  # tr sqrt(a b) = tr sqrt(half a half), which is symmetric
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(half @ a @ half), 0)).sum()
    assert clips < 12 or abs(root - np.trace(linalg.sqrtm(a @ b).real)) < 1e-6
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(a + b) - 2 * root
    close(n2m.frechet_distance(n2m.gaussian(x), n2m.gaussian(y)), expected, rtol=1e-6)


def test_fad_infinity_of_the_same_distribution_is_closer_to_zero():
    truth, x = n2m.Gaussian(np.zeros(16), np.eye(16)), rng(3).normal(size=(300, 16))
    plain = n2m.frechet_distance(n2m.gaussian(x), truth)
    assert plain > 0.1 and abs(n2m.fad_infinity(x, truth)) < plain / 3


def test_log_mel_statistics_are_a_vector_a_second():
    audio = 0.1 * normal(2, 40_000)
    x, second = n2m.log_mel_statistics(audio), n2m.log_mel(audio)[1, 100:200]
    assert x.shape == (2, 2, 160)
    close(x[1, 1], [*second.mean(axis=0), *second.std(axis=0)], atol=1e-5)


def test_windows_of_ten_seconds():
    """A rest of 5 s or more is filled up with silence; but there is always a window."""
    for seconds, n in [(0.3, 1), (4, 1), (10, 1), (14.9, 1), (15, 2), (29, 3), (30, 3)]:
        audio = rng().uniform(0.1, 1, round(seconds * 16_000))  # nowhere silent
        pieces = n2m.windows(audio)
        assert pieces.shape == (n, 160_000)
        kept = min(len(audio), pieces.size)
        assert (pieces.ravel()[:kept] == audio[:kept]).all() and not pieces.ravel()[kept:].any()


# ---- README.md ----

README = (ROOT / "README.md").read_text()


def table_after(heading):
    """The rows of the first table below a heading of the README, as lists of cells."""
    lines = README.split(f"## {heading}")[1].split("\n## ")[0].splitlines()
    rows = [line.strip("|") for line in lines if line.startswith("| ")]
    return [[cell.strip() for cell in row.split(" | ")] for row in rows][1:]


def top_level(file):
    """(last line, name) of every top-level statement of a file that names something."""
    for node in ast.parse((ROOT / file).read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node
        target = target.elts[0] if isinstance(target, ast.Tuple) else target
        if name := getattr(target, "name", None) or getattr(target, "id", None):
            yield node.end_lineno, name


def cited(text):
    """{"Sec 3.1", "Eq 4", ...} of a text that may say "Secs. 4.4, 4.5" or "Tables 5 and 6"."""
    found = set()
    pattern = r"(Sec|Eq|Table|Fig|App)s?\.? ([A-D\d](?:[\d., ]|and |[A-D]\b)*)"
    for kind, numbers in re.findall(pattern, text):
        numbers = re.findall(r"[A-D\d][\d.]*", numbers)
        found |= {f"{kind} {number.rstrip('.')}" for number in numbers}
    return found


def test_the_map_of_the_readme_is_complete_and_every_name_in_it_is_there():
    rows, found = table_after("Read it beside the paper"), set()
    for paper, here in rows:
        found |= cited(paper)
        words = re.findall(r"`([^`]+)`", here)
        files = [word.split()[0] for word in words if word.split()[0].endswith(".py")]
        assert all((ROOT / file).is_file() for file in files)
        assert words, here
        names = {name for file in ("noise2music.py", *files) for _, name in top_level(file)}
        for word in words:
            name = re.match(r"\w+", word)[0]
            assert word.split()[0] in files or name in names, f"{word} ({paper}) is nowhere"
            assert "[" not in word or eval(f"n2m.{word}")
    last = {"Eq ": 6, "Table ": 9, "Fig ": 5, "Sec 3.": 6, "Sec 4.": 6}
    wanted = {f"{kind}{n}" for kind, end in last.items() for n in range(1, end + 1)}
    wanted |= {f"App {letter}" for letter in "ABCD"}
    sections = [ref for ref in found if re.match(r"Sec|App", ref)]
    found |= {re.match(r"\w+ (\d\.\d|[A-D])", ref)[0] for ref in sections}
    assert not wanted - found, f"the map lacks {sorted(wanted - found)}"


def test_the_table_of_choices_is_what_grep_finds():
    """What the README's grep finds, by the top-level name around or below the line."""
    tagged, listed = set(), set()
    tools = (f"tools/{name}.py" for name in ("corpora", "evaluate", "label", "listen", "plan"))
    for file in ("noise2music.py", "t5_encoder.py", "train.py", "sample.py", *tools):
        ends = [(ast.parse((ROOT / file).read_text()).body[0].end_lineno, file), *top_level(file)]
        for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
            if re.search(r"(?<!`)(choice|departs):", line):
                tagged.add((file, next(name for end, name in ends if number <= end)))
    for where, *_ in table_after("Where the paper is silent or disagrees with itself"):
        file = (re.findall(r"\((.+\.py)\)", where) or ["noise2music.py"])[0]
        listed |= {(file, name) for name in re.findall(r"`([^`]+)`", where)}
    assert tagged == listed, f"without a row: {tagged - listed}; without a tag: {listed - tagged}"


def test_every_command_of_the_readme_is_understood_and_it_has_200_lines():
    sys.path.insert(0, str(ROOT / "tools"))
    blocks, seen = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)), set()
    blocks = blocks.replace("\\\n", " ")
    for script, rest in re.findall(r"python (\S+\.py)(.*)", blocks):
        words = shlex.split(rest.replace("MODEL", "waveform_generator"), comments=True)
        assert (ROOT / script).is_file(), script
        __import__(Path(script).stem).parse_args(words)
        seen.add(script)
    assert seen >= {"sample.py", "train.py", "tools/label.py", "tools/evaluate.py"}
    assert len(README.splitlines()) <= 200
