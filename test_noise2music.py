"""What a sceptical reader would check: the paper against noise2music.py, T5 against its reference, both scripts."""

import ast
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import replace
from functools import partial
from pathlib import Path

cache = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name  # shared with the processes that tests start

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import soundfile

import noise2music as n2m
import sample
import t5_encoder
import train
from t5_encoder import (T5, T5Config, count_tokens, encode, load_t5, position_buckets, random_t5,
                        read_safetensors, save_t5, tokenize, write_safetensors)

reference = pytest.mark.reference  # needs the packages of the extra "reference"; skipped, with a reason, without them

# ---- noise2music.py: helpers ----

close = np.testing.assert_allclose


def rng(seed=0):
    return np.random.default_rng(seed)


def normal(*shape, seed=0):
    return jnp.asarray(rng(seed).normal(size=shape), jnp.float32)


def alpha_sigma64(name, t):
    """alpha_t and sigma_t in float64, from the formula of each schedule as one reads it (not by log-SNR)."""
    t = np.asarray(t, np.float64)
    if name.startswith("cosine"):
        a, b = np.arctan(np.exp(10)) - np.arctan(np.exp(-10)), np.arctan(np.exp(-10))
        alpha, sigma = np.sin(a * (1 - t) + b), np.sin(a * t + b)  # cos(x) = sin(pi / 2 - x)
        level = {"cosine": 0, "cosine_quiet": -15}[name]
        sigma = sigma * 10 ** (level / 20)  # beside alpha: louder or quieter, then of variance 1
        return alpha / np.hypot(alpha, sigma), sigma / np.hypot(alpha, sigma)
    if name == "linear":
        return np.exp(-(1e-4 + 10 * t**2) / 2), np.sqrt(-np.expm1(-(1e-4 + 10 * t**2)))
    return np.sqrt(1 - (0.0001 + 0.0199 * t)), np.sqrt(0.0001 + 0.0199 * t)


def small_unet(**changes):
    """Sizes that all differ, so that a swapped axis fails: widths 6, 12, 18; H 3, K 5; strides 3, 2; E 7."""
    cfg = n2m.UNetConfig(6, 5, 2, (3, 2), (2, 3), (1, 2), (False, True), (True, True), 3, 2, 1, 0, 7, 5, 3)
    return replace(cfg, **changes)


NO_TEXT = dict(self_attention=(False, False), cross_attention=(False, False), attention_heads=0)
T, L = 6 * 7, 11  # 7 frames at the bottom, 11 tokens


def small_model(name="waveform_cascader", **changes):
    return replace(n2m.MODELS[name], unet=small_unet(**changes))


def random_params(cfg, seed=0):
    """No zeros and no identities: every parameter matters."""
    g = rng(seed)

    def draw(p):
        if len(p.shape) == 1:
            return jnp.asarray(0.5 + 0.5 * g.normal(size=p.shape), jnp.float32)
        return jnp.asarray(0.7 * g.normal(size=p.shape) / math.sqrt(math.prod(p.shape[:-1])), jnp.float32)

    return jax.tree.map(draw, n2m.unet_spec(cfg), is_leaf=lambda p: isinstance(p, n2m.Param))


def random_condition(cfg, b=3, t=T, seed=1):
    text = any(cfg.cross_attention)
    mask = jnp.arange(L) < jnp.array([L, 4, 1, 7, 2])[:b, None]
    return n2m.Condition(
        low_fi=normal(b, t, 1, seed=seed) if cfg.in_channels > cfg.out_channels else None,
        aligned=normal(b, t // math.prod(cfg.strides), cfg.aligned_channels, seed=seed + 1) if cfg.aligned_channels else None,
        text=normal(b, L, cfg.text_width, seed=seed + 2) if text else None,
        text_mask=mask if text else None,
    )


jit_unet = jax.jit(n2m.unet, static_argnames=("cfg", "dtype", "remat"))

# ---- noise2music.py: tables 2, 3, 8, 9, typed a second time ----

TABLE_2_AND_3 = """
waveform_generator       724M  1.6M  64  simplified  cosine  front_heavy      0  10.0
waveform_cascader        487M  460k  64  simplified  linear  front_heavy      1  5.0
spectrogram_generator    745M  1.8M  96  sigma       linear  back_heavy_eval  0  5.0
spectrogram_vocoder      25.7M 840k  -   simplified  linear  front_heavy      0  N/A
superresolution_cascader 81M   270k  -   simplified  linear  front_heavy      0  N/A
""".strip().splitlines()

TABLE_9 = """
256 7 6 444444 256*112344 333444 FFFTTT FFFTTT 8
256 7 5 44444  256*11234  33466  FFFFF  FFFTT  8
256 9 5 43222  256*12234  66666  FFFTT  FFFTT  8
128 5 4 2445   128*1124   4444   FFFF   FFFF   -
256 7 4 4444   256*1122   4444   FFFF   FFFF   -
""".strip().splitlines()

TABLE_8 = {  # (total time, steps) of each segment of the front-heavy schedules
    "waveform_generator": [(0.01, 200), (0.04, 400), (0.15, 200), (0.3, 150), (0.5, 50)],
    "waveform_cascader": [(0.05, 400), (0.15, 200), (0.3, 150), (0.5, 50)],
    "spectrogram_generator": [(0.01, 400), (0.04, 800), (0.15, 400), (0.3, 300), (0.5, 100)],
    "spectrogram_vocoder": [(0.05, 50), (0.15, 30), (0.3, 15), (0.5, 5)],
    "superresolution_cascader": [(0.05, 400), (0.15, 200), (0.3, 150), (0.5, 50)],
}
UNIFORM_STEPS = {"waveform_generator": 1000, "waveform_cascader": 800, "spectrogram_generator": 1000, "spectrogram_vocoder": 100}
ALL_STEP_SCHEDULES = [(name, s) for name in n2m.NAMES for s in n2m.TABLE_8[name]]


@pytest.mark.parametrize("row", TABLE_2_AND_3, ids=lambda row: row.split()[0])
def test_tables_2_and_3_field_by_field(row):
    number = lambda s: 0 if s == "-" else None if s == "N/A" else float(s.translate({77: "e6", 107: "e3"}))
    name, params, steps, tokens, weight, noise, denoising, gamma, cfg_scale = row.split()
    c, i = n2m.MODELS[name].training, n2m.MODELS[name].inference
    assert (c.params, c.steps, c.token_length) == tuple(map(number, (params, steps, tokens)))
    assert (c.loss_weight, c.noise_schedule, i.step_schedule) == (weight, noise, denoising)
    assert (i.gamma, i.cfg_scale, i.steps) == (number(gamma), number(cfg_scale), None)
    assert bool(c.token_length) == n2m.uses_text(n2m.MODELS[name]) == (i.cfg_scale is not None)


@pytest.mark.parametrize("name, column", list(zip(n2m.NAMES, TABLE_9)), ids=n2m.NAMES)
def test_table_9_field_by_field(name, column):
    cfg = n2m.MODELS[name].unet
    base, kernel, depth, strides, channels, blocks, self_attention, cross_attention, heads = column.split()
    assert (cfg.base_dimension, cfg.kernel_size, cfg.depth) == (int(base), int(kernel), int(depth))
    assert cfg.strides == tuple(map(int, strides)) and cfg.blocks == tuple(map(int, blocks))
    assert channels == f"{cfg.base_dimension}*" + "".join(map(str, cfg.channels))
    assert cfg.self_attention == tuple(c == "T" for c in self_attention)
    assert cfg.cross_attention == tuple(c == "T" for c in cross_attention)
    assert cfg.attention_heads == (0 if heads == "-" else int(heads))
    assert {len(x) for x in (cfg.strides, cfg.channels, cfg.blocks, cfg.self_attention, cfg.cross_attention)} == {cfg.depth}


def test_section_4_1_training_parameters():
    for name in n2m.NAMES:
        c = n2m.MODELS[name].training
        assert (c.beta1, c.beta2, c.decay_steps, c.learning_rate, c.warmup_steps) == (0.9, 0.999, 2_500_000, 1e-4, 10_000)
        assert (c.ema, c.occlusion, c.batch_size) == (0.9999, 0.1, 4096 if name == "superresolution_cascader" else 2048)
        assert c.seconds == 30 if "generator" in name else 3 <= c.seconds <= 4


def test_sample_rates_and_strides_of_section_3_3():
    m = n2m.MODELS
    assert [m[n].audio_rate for n in n2m.NAMES] == [3_200, 16_000, 16_000, 16_000, 24_000]
    assert [m[n].rate for n in n2m.NAMES] == [3_200, 16_000, 100, 16_000, 24_000]
    assert [m[n].low_rate for n in n2m.NAMES] == [None, 3_200, None, None, 16_000]
    assert math.prod(m["spectrogram_vocoder"].unet.strides) == n2m.HOP == 160


@pytest.mark.parametrize("name", n2m.NAMES)
def test_table_8_segment_by_segment(name):
    front = [total / n for total, n in TABLE_8[name] for _ in range(n)]
    expected = {"front_heavy": front}
    if name in UNIFORM_STEPS:
        expected |= {"back_heavy": front[::-1], "uniform": [1 / UNIFORM_STEPS[name]] * UNIFORM_STEPS[name]}
    if name == "spectrogram_generator":
        expected["back_heavy_eval"] = [d for total, n in [(0.3, 50), (0.3, 150), (0.2, 300), (0.2, 500)] for d in [total / n] * n]
    assert n2m.TABLE_8[name].keys() == expected.keys()
    for key, deltas in expected.items():
        close(n2m.TABLE_8[name][key], deltas, rtol=1e-12)
        close(math.fsum(n2m.TABLE_8[name][key]), 1, rtol=1e-12)
    used = n2m.TABLE_8[name][n2m.MODELS[name].inference.step_schedule]
    assert len(used) == dict(zip(n2m.NAMES, (1000, 800, 1000, 100, 800)))[name]  # the column "steps" of Table 4


@pytest.mark.parametrize("name, schedule", ALL_STEP_SCHEDULES)
def test_denoising_times_run_from_0_to_1(name, schedule):
    deltas = n2m.TABLE_8[name][schedule]
    times = n2m.denoising_times(deltas)
    assert times.dtype == np.float64 and len(times) == len(deltas) + 1 and times[0] == 0 and times[-1] == 1
    close(times[1:], [math.fsum(deltas[: n + 1]) for n in range(len(deltas))], rtol=1e-9)
    close(n2m.denoising_times(deltas, len(deltas)), times, rtol=1e-12)
    for steps in (1, 2, 7, 64, 2 * len(deltas)):
        curve = n2m.denoising_times(deltas, steps)
        assert len(curve) == steps + 1 and curve[0] == 0 and curve[-1] == 1 and (np.diff(curve) > 0).all()
        if steps > 7:  # after half of the steps the same time is reached, and half the steps are twice as long
            close(curve[steps // 2], times[len(deltas) // 2], rtol=1e-9)
    assert (np.diff(times).astype(np.float32) > 0).all() and (np.diff(np.float32(times)) > 0).all()  # also on the device


def test_front_heavy_has_its_steps_near_0():
    """Sec. 4.2.1: "many steps to the front of the schedule near t = 0"."""
    half = lambda s: n2m.denoising_times(n2m.TABLE_8["waveform_generator"][s])[500]
    assert half("front_heavy") < 0.05 and half("back_heavy") > 0.95 and abs(half("uniform") - 0.5) < 1e-12


# ---- noise2music.py: schedules, Eqs. 2 to 6 ----


@pytest.mark.parametrize("xp, tol", [(np, 1e-9), (jnp, 2e-6)])
def test_schedule_end_points(xp, tol):
    t = xp.linspace(0.0, 1.0, 2)
    close(n2m.cosine(t, xp), [20, -20], rtol=tol)
    close(n2m.linear(t, xp), [-math.log(math.expm1(1e-4)), -math.log(math.expm1(10.0001))], rtol=max(tol, 1e-9))
    close(n2m.linear(t, xp), [9.21, -10.0], atol=5e-3)
    close(n2m.linear_eq5(t, xp), [math.log(0.9999 / 0.0001), math.log(0.98 / 0.02)], rtol=tol)


def test_cosine_is_symmetric_about_one_half():
    t = np.linspace(0, 1, 101)
    close(n2m.cosine(t, np), -n2m.cosine(1 - t, np), atol=1e-9)


@pytest.mark.parametrize("name", n2m.SCHEDULES)
def test_schedules_against_their_formulas(name):
    """Monotone, variance-preserving, and alpha_t, sigma_t are those of Eqs. 3, 5, 6; on the device too."""
    t = np.linspace(0, 1, 1001)
    alpha, sigma = alpha_sigma64(name, t)
    logsnr = n2m.SCHEDULES[name](t, np)
    close(logsnr, 2 * np.log(alpha / sigma), rtol=1e-7, atol=1e-7)
    assert (np.diff(logsnr) < 0).all()
    for a, expected in zip(n2m.alpha_sigma(n2m.SCHEDULES[name](jnp.asarray(t, jnp.float32))), (alpha, sigma)):
        close(a, expected, rtol=3e-4)  # at the ends t itself has only 24 bits
    a, s = n2m.alpha_sigma(jnp.asarray(logsnr, jnp.float32))
    close(a, alpha, rtol=3e-6), close(s, sigma, rtol=3e-6), close(a**2 + s**2, 1, rtol=1e-6)


def test_linear_starts_at_the_printed_variance_and_eq_5_never_gets_to_noise():
    assert abs(1 / (1 + math.exp(n2m.linear(0.0, np))) - 1e-4) < 1e-8
    x_1 = n2m.diffuse(jnp.ones((1, 5000, 1)), normal(1, 5000, 1), n2m.linear_eq5(jnp.ones(1)))
    assert abs(float(n2m.linear_eq5(1.0, np)) - 3.9) < 0.01 and float(x_1.mean()) > 0.98  # not N(0, I)
    assert all(m.training.noise_schedule != "linear_eq5" for m in n2m.MODELS.values())


def test_diffuse_has_one_noise_level_per_clip():
    x, eps, logsnr = normal(3, 5, 2), normal(3, 5, 2, seed=1), np.array([2.0, 0.0, -3.0])
    variance = 1 / (1 + np.exp(logsnr))[:, None, None]
    close(n2m.diffuse(x, eps, jnp.asarray(logsnr, jnp.float32)), np.sqrt(1 - variance) * x + np.sqrt(variance) * eps, rtol=1e-5, atol=1e-6)


# ---- noise2music.py: the sampler, Eq. 4 ----


def steps_of(name, times):
    """alpha_t, sigma_t, alpha_s, sigma_s of every step, from t = 1 down."""
    alpha, sigma = alpha_sigma64(name, times)
    return alpha[:0:-1], sigma[:0:-1], alpha[-2::-1], sigma[-2::-1]


@pytest.mark.parametrize("name", n2m.SCHEDULES)
@pytest.mark.parametrize("step_schedule", n2m.TABLE_8["spectrogram_generator"])
def test_updates_are_the_ddpm_posterior(name, step_schedule):
    """q(x_s | x_t, x_0) by conditioning the joint Gaussian of Eq. 2 on x_t; gamma 0 has its variance, 1 that of q(x_t | x_s)."""
    times = n2m.denoising_times(n2m.TABLE_8["spectrogram_generator"][step_schedule], 97)
    at, st, as_, ss = steps_of(name, times)
    covariance = at / as_ * ss**2  # x_t = (alpha_t / alpha_s) x_s + noise
    keep = covariance / st**2
    updates = [n2m.ddpm_updates(n2m.SCHEDULES[name], times, gamma) for gamma in (0, 1, 0.5)]
    for u in updates:
        assert all(a.dtype == np.float32 and a.shape == (97,) for a in u)
        close(u.t, times[:0:-1], rtol=1e-6), close(u.alpha_t, at, rtol=1e-6), close(u.sigma_t, st, rtol=1e-6)
        close(u.keep[:-1], keep[:-1], rtol=1e-6)
        close(u.toward[:-1], (as_ - keep * at)[:-1], rtol=1e-5, atol=1e-12)
        assert (u.keep[-1], u.toward[-1], u.noise[-1]) == (0, 1, 0)  # the last step returns x0_hat
    variances = [ss**2 - covariance**2 / st**2, st**2 - (at / as_ * ss) ** 2]
    for u, variance in zip(updates, variances):
        close(u.noise[:-1] ** 2, variance[:-1], rtol=1e-4, atol=1e-14)
    close(updates[2].noise[:-1], (variances[0] * variances[1])[:-1] ** 0.25, rtol=1e-4)
    new = n2m.ddpm_updates(n2m.SCHEDULES[name], times, None)  # Eq. 2 about x0_hat
    close(new.toward[:-1], as_[:-1], rtol=1e-6), close(new.noise[:-1], ss[:-1], rtol=1e-6)
    assert not new.keep.any() and (new.toward[-1], new.noise[-1]) == (1, 0)


@pytest.mark.parametrize("name", n2m.SCHEDULES)
def test_updates_are_eq_4_as_printed_where_nothing_is_clipped(name):
    times = n2m.denoising_times(n2m.TABLE_8["waveform_cascader"]["front_heavy"], 50)
    u = n2m.ddpm_updates(n2m.SCHEDULES[name], times, 1)
    at, st, as_, ss = (a[:-1] for a in steps_of(name, times))
    x_t, eps = rng(0).normal(size=(2, 49))
    e = (at / st) ** 2 / (as_ / ss) ** 2  # e^(lambda_t - lambda_s)
    printed = as_ / at * x_t - (1 - e) * as_ / at * st * eps
    ours = u.keep[:-1] * x_t + u.toward[:-1] * (x_t - st * eps) / at
    close(ours, printed, rtol=1e-5, atol=1e-5 * np.abs(as_ / at).max())
    close(ours / (as_ / at), printed / (as_ / at), atol=1e-5)


@functools.cache
def exact_sampler(name):
    """ancestral_scan with the exact noise prediction for clips whose elements are N(mu, std^2)."""

    def run(updates, keys, x_1, mu, std):
        def eps_fn(x_t, t):
            a, s = n2m.alpha_sigma(n2m.SCHEDULES[name](t))
            x0 = mu + std**2 * a * (x_t - a * mu) / (a**2 * std**2 + s**2)
            return (x_t - a * x0) / s

        return n2m.ancestral_scan(eps_fn, x_1, keys, 1, updates)

    return jax.jit(run)


def run_exact(name, times, gamma, mu, std, clips=2, length=8_000, seed=0):
    keys = jax.random.split(jax.random.key(seed), clips)
    x_1 = n2m.clip_noise(keys, 0, (length, 1))
    return exact_sampler(name)(n2m.ddpm_updates(n2m.SCHEDULES[name], times, gamma), keys, x_1, mu, std)


def gaussian_through_eq_4(name, times, gamma, mu, std):
    """Mean and variance after Eq. 4 as printed, exactly, when x_1 ~ N(0, 1) and eps is exact: a linear recursion."""
    m, v = 0.0, 1.0
    for n, (at, st, as_, ss) in enumerate(zip(*steps_of(name, times)), 1):
        gain = std**2 * at / (at**2 * std**2 + st**2)  # d E[x_0 | x_t] / d x_t
        x0 = mu + gain * (m - at * mu)
        if n == len(times) - 1:
            return x0, gain**2 * v
        if gamma is None:  # Eq. 2 about x0
            m, v = as_ * x0, (as_ * gain) ** 2 * v + ss**2
            continue
        c = 1 - (at / st) ** 2 / (as_ / ss) ** 2
        m, v = as_ / at * (m - c * (m - at * x0)), (as_ / at * (1 - c * (1 - at * gain))) ** 2 * v
        v += (c * ss**2) ** (1 - gamma) * (c * st**2) ** gamma


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("gamma", [0, 1, None])
def test_a_point_is_sampled_exactly(name, gamma):
    for model, step_schedule in ALL_STEP_SCHEDULES:
        times = n2m.denoising_times(n2m.TABLE_8[model][step_schedule], 37)
        point = jnp.asarray(rng(3).uniform(-0.9, 0.9, (2, 101, 1)), jnp.float32)
        close(run_exact(name, times, gamma, point, jnp.zeros(()), length=101), point, atol=2e-5)


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("gamma", [0, 1, None])
def test_a_gaussian_is_sampled_with_the_moments_of_eq_4(name, gamma):
    """Few steps are biased; the bias must be the one that Eq. 4 has, on every step schedule of Table 8."""
    for model, step_schedule in ALL_STEP_SCHEDULES:
        times = n2m.denoising_times(n2m.TABLE_8[model][step_schedule], 37)
        x = np.asarray(run_exact(name, times, gamma, jnp.float32(0.3), jnp.float32(0.12)), np.float64)
        mean, variance = gaussian_through_eq_4(name, times, gamma, 0.3, 0.12)
        close(x.mean(), mean, atol=5 * math.sqrt(variance / x.size))
        close(x.var(), variance, rtol=5 * math.sqrt(2 / x.size))


@pytest.mark.parametrize("name", ["cosine", "linear"])
@pytest.mark.parametrize("gamma", [0, 1])
def test_many_steps_give_the_distribution_itself(name, gamma):
    times = n2m.denoising_times(n2m.TABLE_8["waveform_generator"]["front_heavy"])  # 1000 steps
    x = np.asarray(run_exact(name, times, gamma, jnp.float32(-0.2), jnp.float32(0.2), length=1500))
    close(x.mean(), -0.2, atol=0.015), close(x.std(), 0.2, rtol=0.06)


def test_a_clip_does_not_depend_on_its_neighbours():
    times = n2m.denoising_times(n2m.TABLE_8["waveform_cascader"]["uniform"], 37)
    u, keys = n2m.ddpm_updates(n2m.linear, times, 1), jax.random.split(jax.random.key(5), 3)
    run = lambda k: exact_sampler("linear")(u, k, n2m.clip_noise(k, 0, (64, 1)), jnp.float32(0.3), jnp.float32(0.9))
    whole = run(keys)
    close(whole[1:2], run(keys[1:2]), atol=1e-5)
    assert abs(np.corrcoef(whole[0, :, 0], whole[1, :, 0])[0, 1]) < 0.5  # and the clips differ


def test_noise_is_fresh_at_every_step_and_for_every_clip():
    keys = jax.random.split(jax.random.key(0), 2)
    draws = np.stack([n2m.clip_noise(keys, n, (4000, 1)) for n in range(3)]).reshape(6, -1)
    assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 0.08 and abs(draws.std() - 1) < 0.02


@pytest.mark.parametrize("percentile", [0, 37.5, 50, 99.5, 100])
@pytest.mark.parametrize("a", [rng().normal(size=(3, 1001)) ** 2, rng().integers(0, 4, (3, 200)), np.zeros((2, 5)), rng().uniform(size=(2, 1))])
def test_percentile_against_numpy(a, percentile):
    """With many elements equal, none equal, and only one."""
    close(n2m._percentile(jnp.asarray(a, jnp.float32), percentile), np.percentile(np.float32(a), percentile, axis=1), rtol=1e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_dynamic_clip_against_numpy(scale):
    """Per clip, over time and channels, never below 1, and then within [-1, 1]."""
    x = np.array([0.2, 1.0, 7.0])[:, None, None] * scale * rng(0).normal(size=(3, 331, 3))
    s = [max(1, np.percentile(np.abs(clip), 99.5)) for clip in x]
    y = np.asarray(n2m.dynamic_clip(jnp.asarray(x, jnp.float32)))
    close(y, [np.clip(clip, -m, m) / m for clip, m in zip(x, s)], rtol=1e-4, atol=1e-6)
    assert np.abs(y).max() <= 1 and (scale > 1 or s[0] == 1)


def test_a_wild_prediction_is_clipped_inside_eq_4():
    """Every x_s is formed from x_t and the clipped x0_hat; the last one is that x0_hat."""
    updates = n2m.ddpm_updates(n2m.cosine, n2m.denoising_times([0.5, 0.5]), 0)
    keys = jax.random.split(jax.random.key(0), 2)
    x_1 = 30 * normal(2, 101, 1)
    (k, _), (w, _), (z, _) = updates.keep, updates.toward, updates.noise
    clipped = lambda x_t, n: n2m.dynamic_clip(x_t / updates.alpha_t[n])  # eps = 0
    x_half = k * x_1 + w * clipped(x_1, 0) + z * n2m.clip_noise(keys, 1, (101, 1))
    x_0 = n2m.ancestral_scan(lambda x_t, t: 0 * x_t, x_1, keys, 1, updates)
    close(x_0, clipped(x_half, 1), atol=1e-5)
    assert np.abs(x_0).max() == 1 and np.abs(x_half).max() < 10


def test_sample_is_one_scan_over_the_schedule_of_the_model(monkeypatch):
    """The chunks that make a progress line possible change nothing; gamma, steps, schedule and guidance are the model's."""
    model = small_model()
    model = replace(model, inference=n2m.InferenceConfig("back_heavy", 1, 3.0, steps=51 * 2))
    stub = lambda params, model, x_t, t, condition, cfg_scale, dtype: 0.1 * cfg_scale * jnp.sin(5 * x_t + t) * params
    monkeypatch.setattr(n2m, "guided_eps", stub)
    keys, calls = jax.random.split(jax.random.key(1), 2), []
    x = n2m.sample(jnp.float32(2), model, n2m.Condition(), keys, T, progress=lambda *a: calls.append(a))
    assert calls == [(34, 102), (68, 102), (102, 102)] and x.shape == (2, T, 1) and x.dtype == jnp.float32
    updates = n2m.ddpm_updates(n2m.linear, n2m.denoising_times(n2m.TABLE_8["waveform_cascader"]["back_heavy"], 102), 1)
    eps_fn = lambda x_t, t: stub(2, None, x_t, t, None, 3.0, None)
    close(x, n2m.ancestral_scan(eps_fn, n2m.clip_noise(keys, 0, (T, 1)), keys, 1, updates), atol=1e-4)


# ---- noise2music.py: guidance ----


@pytest.mark.parametrize("w", [0, 1, None, 2.5, 10.0])
def test_guidance_is_two_calls(monkeypatch, w):
    model, t = small_model(), 0.37
    params, condition, x_t = random_params(model.unet), random_condition(model.unet), normal(3, T, 1)
    call = lambda on: jit_unet(params, model.unet, x_t, jnp.full(3, t), condition, jnp.full(3, on))
    eps_c, eps_u = call(1.0), call(0.0)
    monkeypatch.setattr(n2m, "unet", jit_unet)
    guided = n2m.guided_eps(params, model, x_t, t, condition, w)
    close(guided, eps_c if w is None else w * eps_c + (1 - w) * eps_u, atol=2e-4)
    assert float(jnp.abs(eps_c - eps_u).max()) > 0.05


def test_guidance_is_ignored_by_a_model_without_text(monkeypatch):
    model = small_model("superresolution_cascader", **NO_TEXT)
    params, condition, x_t = random_params(model.unet), random_condition(model.unet), normal(3, T, 1)
    monkeypatch.setattr(n2m, "unet", jit_unet)
    guided = n2m.guided_eps(params, model, x_t, 0.5, condition, 7.0)
    close(guided, jit_unet(params, model.unet, x_t, jnp.full(3, 0.5), condition, jnp.ones(3)), atol=1e-4)


def test_an_occluded_prompt_is_not_read_and_its_neighbour_is():
    cfg = small_unet()
    params, c, x_t = random_params(cfg), random_condition(cfg), normal(3, T, 1)
    call = lambda condition: np.asarray(jit_unet(params, cfg, x_t, jnp.array([0.1, 0.5, 0.9]), condition, jnp.array([1.0, 0.0, 0.0])))
    before = call(c)
    other_text = call(c._replace(text=-2 * c.text, text_mask=c.text_mask[::-1]))
    close(other_text[1:], before[1:], atol=1e-5)
    assert np.abs(other_text[0] - before[0]).max() > 0.01
    assert (np.abs(call(c._replace(low_fi=-c.low_fi)) - before).max(axis=(1, 2)) > 0.01).all()  # not hidden


def test_occlusion_leaves_the_feed_forward_after_the_cross_attention():
    """Sec. 4.1: only "the output of the cross attention layers are set to zero"."""
    cfg = small_unet()
    p = random_params(cfg)["down"][0]["blocks"][0]
    x, time, c = normal(3, 13, 12), normal(3, 6), random_condition(cfg)
    without = {k: v for k, v in p.items() if k != "cross_attention"}
    x_0 = n2m.block(without, cfg, x, time, None, None, None)
    expected = x_0 + n2m.feed_forward(p["cross_attention"]["feed_forward"], cfg, x_0)
    close(n2m.block(p, cfg, x, time, c.text, c.text_mask, jnp.zeros(3)), expected, atol=1e-5)


# ---- noise2music.py: the U-Net, against torch ----


def torch_unet(torch, p, cfg, x_t, t, c, text_on):
    """Figs. 1 and 5 in torch's own layers, channels first; parameters are ours, laid out for them."""
    nn = torch.nn.functional
    linear = lambda p, x: nn.linear(x.mT, p["w"].T, p["b"]).mT  # x (B, C, T)
    conv = lambda p, x: nn.conv1d(x, p["w"].permute(2, 1, 0), p["b"], padding="same")
    norm = lambda p, x: nn.group_norm(x, cfg.groups, p["scale"], p["bias"], eps=1e-5)

    def down(p, x, s):  # kernel 2 S, stride S; tap j of output i reads sample S i + j
        w = p["w"].reshape(2 * s, x.shape[1], -1)
        return nn.conv1d(nn.pad(x, (0, s)), w.permute(2, 1, 0), p["b"], stride=s)

    def up(p, x, s):  # transposed: input i writes samples S i .. S i + 2 S - 1; the bias has one entry for each of S phases
        w = p["w"].reshape(2, x.shape[1], s, -1)
        w = torch.cat([w[1], w[0]], dim=1).permute(0, 2, 1)  # (C_in, C_out, 2 S)
        return nn.conv_transpose1d(x, w, stride=s)[..., : s * x.shape[2]] + p["b"].reshape(s, -1).T.repeat(1, x.shape[2])

    def attend(p, x, kv, mask):
        x = norm(p["norm"], x)
        heads = lambda p, y: linear(p, y).reshape(y.shape[0], cfg.attention_heads, cfg.head_width, -1).mT
        q, k, v = heads(p["q"], x), heads(p["k"], x if kv is None else kv), heads(p["v"], x if kv is None else kv)
        y = nn.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, K)
        return linear(p["out"], y.mT.reshape(y.shape[0], -1, y.shape[2]))

    def feed_forward(p, x):
        return linear(p["out"], nn.silu(linear(p["hidden"], norm(p["norm"], x))))

    def block(p, x):
        scale, bias = linear(p["combine"], time).chunk(2, dim=1)
        x = x * (1 + scale) + bias
        h = conv(p["conv2"], nn.silu(norm(p["norm2"], conv(p["conv1"], nn.silu(norm(p["norm1"], x))))))
        x = linear(p["skip"], x) + h
        if "self_attention" in p:
            x = x + attend(p["self_attention"], x, None, None)
            x = x + feed_forward(p["self_attention"]["feed_forward"], x)
        if "cross_attention" in p:
            x = x + text_on[:, None, None] * attend(p["cross_attention"], x, c.text.mT, c.text_mask[:, None, None])
            x = x + feed_forward(p["cross_attention"]["feed_forward"], x)
        return x

    frequencies = 1e-4 ** torch.linspace(0, 1, cfg.base_dimension // 2, dtype=torch.float64)
    angles = 1000 * t[:, None] * frequencies
    time = linear(p["time"], torch.cat([angles.sin(), angles.cos()], dim=1)[..., None])  # (B, base, 1)
    h = conv(p["entry"], (x_t if c.low_fi is None else torch.cat([x_t, c.low_fi], dim=2)).mT)
    outputs = []
    for p_down, s in zip(p["down"], cfg.strides):
        outputs.append(h)
        h = functools.reduce(lambda h, p: block(p, h), p_down["blocks"], down(p_down["resample"], h, s))
    if c.aligned is not None:
        h = h + linear(p["aligned"], c.aligned.mT)
    for p_up, s, skip in list(zip(p["up"], cfg.strides, outputs))[::-1]:
        h = functools.reduce(lambda h, p: block(p, h), p_up["blocks"], up(p_up["resample"], h, s)) + skip
    return conv(p["exit"], h).mT


UNETS = {
    "text and low_fi": small_unet(),
    "aligned": small_unet(in_channels=1, aligned_channels=5, strides=(2, 3), blocks=(1, 1), **NO_TEXT),
    "low_fi": small_unet(strides=(1, 6), channels=(1, 3), blocks=(2, 1), kernel_size=3, **NO_TEXT),
}


def unet_case(cfg):
    return random_params(cfg), normal(3, T, cfg.out_channels), jnp.array([0.013, 0.5, 0.98]), random_condition(cfg), jnp.array([1.0, 0.0, 1.0])


@functools.partial(jax.jit, static_argnames=("cfg", "remat", "dtype"))
def value_and_gradients(params, cfg, x_t, t, c, text_on, remat=False, dtype=jnp.float32):
    """Of a fixed random projection of the output; the gradients by the parameters, x_t and the conditions."""
    projection = normal(*x_t.shape, seed=9)

    def f(params, x_t, floats):
        y = n2m.unet(params, cfg, x_t, t, c._replace(**floats), text_on, dtype, remat)
        return jnp.sum(y * projection), y

    floats = {k: v for k, v in c._asdict().items() if v is not None and k != "text_mask"}
    (_, y), gradients = jax.value_and_grad(f, argnums=(0, 1, 2), has_aux=True)(params, x_t, floats)
    return y, gradients


def all_close_relative(actual, expected, rtol=1e-4):
    largest = max(float(np.abs(e).max()) for e in jax.tree.leaves(expected))
    check = lambda a, e: close(a, e, rtol=0, atol=rtol * (np.abs(e).max() + 0.02 * largest))
    jax.tree.map(check, actual, expected)


@reference
@pytest.mark.parametrize("kind", UNETS)
def test_unet_against_torch(kind):
    """Values and gradients, with random parameters everywhere."""
    torch = pytest.importorskip("torch", reason="the U-Net is compared with one in torch's own layers")
    cfg = UNETS[kind]
    params, x_t, t, c, text_on = unet_case(cfg)
    y, gradients = value_and_gradients(params, cfg, x_t, t, c, text_on)
    tensor = lambda a: torch.tensor(np.asarray(a), dtype=torch.float64).requires_grad_()
    p, x, (low_fi, aligned, text) = jax.tree.map(tensor, (params, x_t, (c.low_fi, c.aligned, c.text)))
    mask = None if c.text_mask is None else torch.tensor(np.asarray(c.text_mask))
    y_torch = torch_unet(torch, p, cfg, x, tensor(t), n2m.Condition(low_fi, aligned, text, mask), tensor(text_on))
    (y_torch * torch.tensor(np.asarray(normal(*x_t.shape, seed=9)))).sum().backward()
    assert y.dtype == jnp.float32
    close(y, y_torch.detach().numpy(), atol=1e-4, rtol=1e-4)
    floats = {k: v for k, v in dict(low_fi=low_fi, aligned=aligned, text=text).items() if v is not None}
    all_close_relative(gradients, jax.tree.map(lambda a: a.grad.numpy(), (p, x, floats)))


def test_remat_changes_nothing():
    cfg = UNETS["aligned"]
    plain, remat = (value_and_gradients(*unet_case(cfg)[:1], cfg, *unet_case(cfg)[1:], remat=r) for r in (False, True))
    all_close_relative(remat, plain, rtol=1e-5)


def test_bfloat16_changes_little():
    cfg = UNETS["text and low_fi"]
    params, *inputs = unet_case(cfg)
    y, low = jit_unet(params, cfg, *inputs), jit_unet(params, cfg, *inputs, dtype=jnp.bfloat16)
    assert low.dtype == jnp.float32 and 1e-4 < float(jnp.abs(low - y).mean() / jnp.abs(y).mean()) < 0.05


def test_time_embedding_is_computed_in_float32():
    """1000 t in bfloat16 would round t to 1 / 256."""
    t = jnp.array([0.5, 0.5003, 0.5006])
    e = np.asarray(n2m.time_embedding(t, 256))
    angles = 1000 * np.float64(t)[:, None] * 1e-4 ** np.linspace(0, 1, 128)
    close(e, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=3e-4)
    assert e.dtype == np.float32
    cfg = UNETS["text and low_fi"]  # and so bfloat16 still tells these times apart: one clip, three times
    params, *inputs = unet_case(cfg)
    x_t, _, c, text_on = jax.tree.map(lambda a: jnp.repeat(a[:1], 3, 0), inputs)
    y, low = (jit_unet(params, cfg, x_t, t, c, text_on, dtype=d) for d in (jnp.float32, jnp.bfloat16))
    assert np.corrcoef((y[2] - y[0]).ravel(), (low[2] - low[0]).ravel())[0, 1] > 0.9


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_up_is_the_adjoint_of_down(stride):
    """With tied weights <down(x), y> = <x, up(y)>, so that together they move nothing in time."""
    c_outer, c, frames = 3, 4, 7
    w = normal(2, stride * c_outer, c)
    x, y = normal(2, frames * stride, c_outer, seed=1), normal(2, frames, c, seed=2)
    down = n2m.downsample({"w": w, "b": jnp.zeros(c)}, x, stride)
    up = n2m.upsample({"w": w[::-1].mT, "b": jnp.zeros(stride * c_outer)}, y, stride)
    assert down.shape == y.shape and up.shape == x.shape
    close(jnp.vdot(down, y), jnp.vdot(x, up), rtol=1e-5)


@pytest.mark.parametrize("segments, aligned", [(2, False), (7, True)])
def test_pieces_side_by_side_are_the_same_network(segments, aligned):
    """Values and gradients, with self- and cross-attention and with an aligned input; 14 frames at the bottom."""
    cfg = small_unet(**(dict(NO_TEXT, aligned_channels=4) if aligned else {}))
    frames = 14
    c = random_condition(cfg)
    x_t, t, text_on = normal(3, 6 * frames, 1), jnp.array([0.1, 0.5, 0.9]), jnp.array([1.0, 0.0, 1.0])
    c = c._replace(low_fi=None if c.low_fi is None else normal(3, 6 * frames, 1, seed=5),
                   aligned=normal(3, frames, 4, seed=6) if aligned else None)
    whole, pieces = (jax.value_and_grad(lambda p, cfg=cfg: (jit_unet(p, cfg, x_t, t, c, text_on) ** 2).mean())(random_params(cfg))
                     for cfg in (cfg, replace(cfg, segments=segments)))
    jax.tree.map(functools.partial(close, rtol=2e-3, atol=2e-5), pieces, whole)


@pytest.mark.parametrize("segments, multiple", [(1, 6), (4, 24)])
def test_each_piece_is_padded_to_whole_frames(segments, multiple):
    assert n2m.padded_length(small_unet(segments=segments), multiple + 1) == 2 * multiple


@pytest.mark.parametrize("left", [None, 0, 1])
@pytest.mark.parametrize("taps", [2, 5])
@pytest.mark.parametrize("t", [1, 4, 5, 9])  # shorter than the kernel, as long, longer
def test_conv1d_against_its_definition(t, taps, left):
    x, w, b = normal(2, t, 3), normal(taps, 3, 4, seed=1), normal(4, seed=2)
    shift = (taps - 1) // 2 if left is None else left
    expected = np.zeros((2, t, 4)) + np.asarray(b)
    for i in range(t):
        for k in range(taps):
            if 0 <= i + k - shift < t:
                expected[:, i] += np.asarray(x[:, i + k - shift] @ w[k])
    close(n2m.conv1d({"w": w, "b": b}, x, left=left), expected, atol=1e-5)


def test_nothing_drifts_in_time():
    """A folding by 3, 2 and back is the identity: the samples return to their places."""
    x = normal(1, 30, 1)
    fold = lambda n, tap: {"w": jnp.eye(n)[None] * (jnp.arange(2) == tap)[:, None, None], "b": jnp.zeros(n)}
    h = n2m.downsample(fold(6, 0), n2m.downsample(fold(3, 0), x, 3), 2)
    close(n2m.upsample(fold(3, 1), n2m.upsample(fold(6, 1), h, 2), 3), x)


@reference
@pytest.mark.parametrize("mean, atol", [(0, 1e-5), (5, 1e-4), (50, 3e-3)])
def test_group_norm_against_torch(mean, atol):
    """Moments by E[x^2] - E[x]^2 lose digits where the mean is large; not enough to matter in a network."""
    torch = pytest.importorskip("torch", reason="group_norm is compared with torch's")
    x, scale, bias = mean + normal(3, 17, 12), normal(12, seed=1), normal(12, seed=2)
    expected = torch.nn.functional.group_norm(*(torch.tensor(np.asarray(x, np.float64)).mT, 4), *(torch.tensor(np.float64(a)) for a in (scale, bias)))
    close(n2m.group_norm({"scale": scale, "bias": bias}, x, 4), expected.mT, atol=atol)
    assert np.isfinite(n2m.group_norm({"scale": scale, "bias": bias}, jnp.full((1, 5, 12), 3e3), 4)).all()


def test_padded_tokens_have_no_influence():
    cfg = small_unet()
    p, x, text = random_params(cfg)["down"][0]["blocks"][0]["cross_attention"], normal(2, 13, 12), normal(2, L, 7)
    mask = jnp.arange(L) < jnp.array([4, L])[:, None]
    y = n2m.attention(p, cfg, x, text, mask)
    close(n2m.attention(p, cfg, x, text.at[0, 4:].set(1e4), mask), y, atol=1e-6)
    close(n2m.attention(p, cfg, x[:1], text[:1, :4], mask[:1, :4]), y[:1], atol=1e-5)
    assert float(jnp.abs(n2m.attention(p, cfg, x, text.at[0, 3].set(9), mask) - y)[0].max()) > 0.01
    assert np.isfinite(n2m.attention(p, cfg, x, text, mask & False)).all()  # no token at all is no NaN


# ---- noise2music.py: the five models of Table 2 ----


def count_by_hand(cfg):
    """Parameters, box by box of Figs. 1 and 5; kernel 2 S, and an up-sampling bias for each of S phases."""
    base, hk = cfg.base_dimension, cfg.attention_heads * cfg.head_width
    fc = lambda i, o: (i + 1) * o
    attention = lambda c, kv: 2 * c + fc(c, hk) + 2 * fc(kv, hk) + fc(hk, c) + 2 * c + fc(c, 2 * c) + fc(2 * c, c)
    total = fc(base, base) + fc(3 * cfg.in_channels, base) + fc(3 * base, cfg.out_channels)
    c_outer = base
    for s, multiple, n, sa, ca in zip(cfg.strides, cfg.channels, cfg.blocks, cfg.self_attention, cfg.cross_attention):
        c = multiple * base
        total += fc(2 * s * c_outer, c) + fc(2 * c, s * c_outer)
        for w in (c, c_outer):  # down and up
            pair = fc(base, 2 * w) + 4 * w + 2 * fc(cfg.kernel_size * w, w) + fc(w, w)
            total += n * (pair + sa * attention(w, w) + ca * attention(w, cfg.text_width))
        c_outer = c
    return total + (fc(cfg.aligned_channels, c_outer) if cfg.aligned_channels else 0)


@pytest.mark.parametrize("name", n2m.NAMES)
def test_parameter_counts_of_table_2(name):
    model = n2m.MODELS[name]
    assert n2m.param_count(name) == n2m.param_count(model) == count_by_hand(model.unet)
    assert abs(n2m.param_count(name) / model.training.params - 1) < 0.025


def test_init_has_the_declared_shapes_and_starts_as_zero_noise():
    cfg = small_unet(in_channels=1, aligned_channels=5, blocks=(1, 1))
    params = jax.jit(n2m.init_params, static_argnums=1)(jax.random.key(0), cfg)
    assert sum(a.size for a in jax.tree.leaves(params)) == count_by_hand(cfg)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype("float32")}
    y = jit_unet(params, cfg, normal(3, T, 1), jnp.zeros(3), random_condition(cfg), jnp.ones(3))
    assert not y.any() and abs(float(params["down"][1]["resample"]["w"].std()) * math.sqrt(2 * 2 * 12) - 1) < 0.1
    p, x = params["down"][1]["blocks"][0], normal(3, 7, 18)
    c = random_condition(cfg)
    new_block = jax.jit(n2m.block, static_argnums=1)
    close(new_block(p, cfg, x, normal(3, 6), c.text, c.text_mask, jnp.ones(3)), x, atol=1e-6)  # a new block is x -> x


@pytest.mark.parametrize("name", n2m.NAMES)
def test_full_models_take_30_72_seconds(name):
    """By shape alone. 30.72 s divides by the strides of all five; 30 s is padded to it or below it."""
    model, cfg = n2m.MODELS[name], n2m.MODELS[name].unet
    length = round(30.72 * model.rate)
    assert n2m.padded_length(cfg, length) == length >= n2m.padded_length(cfg, 30 * model.rate)
    s = jax.ShapeDtypeStruct
    params = jax.tree.map(lambda p: s(p.shape, jnp.float32), n2m.unet_spec(cfg), is_leaf=lambda p: isinstance(p, n2m.Param))
    condition = n2m.Condition(
        s((2, length, 1), jnp.float32) if model.low_rate else None,
        s((2, length // 160, 80), jnp.float32) if cfg.aligned_channels else None,
        s((2, 64, 2048), jnp.float32) if n2m.uses_text(model) else None,
        s((2, 64), bool) if n2m.uses_text(model) else None,
    )
    run = lambda params, x_t, t, c: n2m.unet(params, cfg, x_t, t, c, t)
    y = jax.eval_shape(run, params, s((2, length, cfg.out_channels), jnp.float32), s((2,), jnp.float32), condition)
    assert y.shape == (2, length, 80 if name == "spectrogram_generator" else 1)


def test_lengths_are_rounded_up_to_the_strides():
    expected = (98_304, 480_256, 3_072, 480_000, 720_128)
    assert [n2m.padded_length(n2m.MODELS[n].unet, 30 * n2m.MODELS[n].rate) for n in n2m.NAMES] == list(expected)


# ---- noise2music.py: resampling and log-mel ----

LENGTHS = [(320, 1600), (1600, 320), (640, 960), (960, 641), (441, 240), (442, 240), (101, 103), (103, 101), (20, 10), (10, 20), (16, 15), (12, 12)]


@pytest.mark.parametrize("t, length", LENGTHS)
def test_fft_resample_is_exact_on_band_limited_signals(t, length):
    k = np.arange((min(t, length) + 1) // 2)  # cycles, below both Nyquist frequencies
    a, phase = rng(1).normal(size=(2, len(k), 2))
    signal = lambda n: (a.T[:, None] * np.cos(2 * np.pi * k * np.arange(n)[:, None] / n + phase.T[:, None])).sum(-1)
    close(n2m.fft_resample(signal(t), length, np), signal(length), atol=1e-10)
    there_and_back = n2m.fft_resample(n2m.fft_resample(jnp.asarray(signal(t), jnp.float32), length), t)
    close(there_and_back, signal(t), atol=2e-4)


@reference
@pytest.mark.parametrize("t, length", LENGTHS)
def test_fft_resample_against_scipy(t, length):
    """On noise, so that the Nyquist bin of even lengths counts."""
    signal = pytest.importorskip("scipy.signal", reason="fft_resample is compared with scipy.signal.resample")
    x = rng(2).normal(size=(2, 3, t)).astype(np.float32)
    expected = signal.resample(x.astype(np.float64), length, axis=-1)
    for xp in (np, jnp):
        y = n2m.fft_resample(xp.asarray(x), length, xp)
        assert y.dtype == np.float32 and y.shape == (2, 3, length)
        close(y, expected, atol=1e-5)


def test_log_mel_has_100_frames_a_second_and_stays_within_its_range():
    for samples in (160, 1600, 1759, 16_000):
        assert jax.eval_shape(n2m.log_mel, jnp.zeros((2, samples))).shape == (2, samples // 160, 80)
    assert (np.asarray(n2m.log_mel(jnp.zeros((1, 1600)))) == -1).all()  # silence is what log-mel is padded with
    loud = n2m.log_mel(100 * normal(1, 3200))
    assert float(loud.max()) == 1 and float(loud.min()) >= -1


@pytest.mark.parametrize("hz", [100, 437.5, 1000, 5000])
def test_log_mel_is_decibels(hz):
    """20 dB are 0.4: 100 dB span [-1, 1]. Full scale is near the top, and not beyond it."""
    sine = np.sin(2 * np.pi * hz * np.arange(8000) / 16_000)[None]
    full, quiet, quieter = (float(n2m.log_mel(jnp.asarray(g * sine, jnp.float32))[0, 25].max()) for g in (1, 0.03, 0.003))
    assert abs(quiet - quieter - 0.4) < 1e-3 and 0.85 < full <= 1 and abs(quiet + 0.609 - 1) < 0.15


@reference
def test_mel_filters_against_transformers():
    audio_utils = pytest.importorskip("transformers.audio_utils", reason="the mel filters are compared with transformers'")
    expected = audio_utils.mel_filter_bank(513, 80, 0.0, 8000.0, 16_000, norm=None, mel_scale="htk")
    close(n2m.mel_filters(), expected, atol=1e-6)


def test_stft_against_the_definition():
    """Frame k: 640 Hann-weighted samples about 160 k + 80, zeros beyond the ends, a full-scale sine of magnitude 1."""
    x = rng(0).normal(size=1600)
    spectrum = np.asarray(n2m.stft(jnp.asarray(x[None], jnp.float32)))
    assert spectrum.shape == (1, 10, 513)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(640) / 640)
    padded = np.pad(x, 1000)
    for k in (0, 1, 5, 9):
        n = np.arange(160 * k + 80 - 320, 160 * k + 80 + 320)
        f = np.abs(np.exp(-2j * np.pi * np.outer(np.arange(513), n) / 1024) @ (padded[n + 1000] * window)) / 160
        close(np.abs(spectrum[0, k]), f, atol=1e-4)
    sine = jnp.asarray(np.sin(2 * np.pi * 1000 * np.arange(1600) / 16_000)[None], jnp.float32)
    close(jnp.abs(n2m.stft(sine))[0, 5].max(), 1, rtol=1e-3)


@pytest.mark.parametrize("sample", [3, 157, 163, 803, 1597])
def test_log_mel_frames_are_where_the_audio_is(sample):
    frames = n2m.log_mel(jnp.zeros((1, 1600)).at[0, sample].set(1.0))[0]
    assert int(frames.mean(-1).argmax()) == sample // 160


@pytest.mark.parametrize("hz", [250, 3000])
def test_griffin_lim_returns_the_pitch(hz):
    sine = jnp.asarray(0.3 * np.sin(2 * np.pi * hz * np.arange(8000) / 16_000)[None], jnp.float32)
    audio = np.asarray(n2m.griffin_lim(n2m.log_mel(sine), 8))
    assert audio.shape == (1, 8000)
    assert abs(np.abs(np.fft.rfft(audio[0] * np.hanning(8000))).argmax() * 2 - hz) < 0.04 * hz + 10
    assert 0.3 < audio[0, 2000:6000].std() / float(sine.std()) < 3


# ---- noise2music.py: augmentation and training inputs, Sec. 4.1 ----


def kernel_of(std, offsets):
    k = np.exp(-0.5 * (np.asarray(offsets) / std) ** 2)
    return k / k.sum()


@reference
def test_blur_of_10_taps_against_scipy():
    """Taps at -5..4, edges repeated, another kernel for each clip, along the asked axis only."""
    ndimage = pytest.importorskip("scipy.ndimage", reason="the blur is compared with scipy's")
    x, stds = np.asarray(normal(3, 23, 14)), np.array([0.3, 1.7, 5.0])
    for axis in (1, 2):
        y = n2m.gaussian_blur(jnp.asarray(x), jnp.asarray(stds, jnp.float32), 10, axis)
        expected = [ndimage.correlate1d(clip, kernel_of(s, range(-5, 5)), axis - 1, mode="nearest") for clip, s in zip(x, stds)]
        close(y, expected, atol=1e-5)


@reference
def test_blur_of_5_by_5_is_a_2d_gaussian():
    ndimage = pytest.importorskip("scipy.ndimage", reason="the blur is compared with scipy's")
    x, stds = np.asarray(normal(2, 9, 11)), np.array([0.4, 1.0])
    y = jnp.asarray(x)
    for axis in (1, 2):
        y = n2m.gaussian_blur(y, jnp.asarray(stds, jnp.float32), 5, axis)
    kernels = [np.outer(kernel_of(s, range(-2, 3)), kernel_of(s, range(-2, 3))) for s in stds]
    close(y, [ndimage.correlate(clip, k, mode="nearest") for clip, k in zip(x, kernels)], atol=1e-5)


@pytest.mark.parametrize("taps", [5, 10])
def test_a_small_blur_is_the_identity_and_no_blur_changes_a_constant(taps):
    x = normal(2, 23, 3)
    close(n2m.gaussian_blur(x, jnp.full(2, 0.1), taps, 1), x, atol=1e-6)
    close(n2m.gaussian_blur(jnp.full((2, 23, 3), -1.0), jnp.full(2, 4.0), taps, 1), -1, rtol=1e-5)


@pytest.mark.parametrize("name", ["cosine", "cosine_quiet", "linear"])
@pytest.mark.parametrize("t_max", [0.0, 0.5, 1.0])
def test_noise_augmentation_is_diffusion_at_a_uniform_time(name, t_max):
    """Eq. 2 with t ~ U[0, t_max], drawn for each clip: mean E[alpha], variance about it E[sigma^2], at every clip its own."""
    y = np.asarray(n2m.noise_augment(jax.random.key(2), jnp.ones((4000, 200, 1)), t_max, n2m.SCHEDULES[name]), np.float64)
    alpha, sigma = alpha_sigma64(name, (np.arange(10_000) + 0.5) / 10_000 * t_max)
    clip_alpha, clip_sigma = y.mean((1, 2)), y.std((1, 2))
    close(clip_alpha.mean(), alpha.mean(), atol=0.02), close(clip_sigma.mean(), sigma.mean(), rtol=0.03)
    close(np.quantile(clip_sigma, [0.1, 0.5, 0.9]), np.quantile(sigma, [0.1, 0.5, 0.9]), rtol=0.1, atol=0.02)
    close(clip_alpha**2 + clip_sigma**2, 1, atol=0.6)


@pytest.mark.parametrize("name, t_max, taps, lowest, highest, axes", [
    ("waveform_cascader", 0.5, 10, 0.1, 5.0, (1,)), ("spectrogram_vocoder", 1.0, 5, 0.2, 1.0, (1, 2)), ("superresolution_cascader", 1.0, 0, 0, 0, ())])
def test_augmentations_of_section_4_1(monkeypatch, name, t_max, taps, lowest, highest, axes):
    """What each of the three conditioned models asks for, and in this order: blur, then noise, each clip its own."""
    calls = []
    monkeypatch.setattr(n2m, "gaussian_blur", lambda x, std, taps, axis: calls.append((std, taps, axis)) or x + 1)
    monkeypatch.setattr(n2m, "noise_augment", lambda key, x, t_max, schedule: calls.append((t_max, schedule)) or 2 * x)
    model = n2m.MODELS[name]
    _, low_fi, aligned = n2m.training_inputs(model, jax.random.key(0), jnp.zeros((2000, 480)))
    *blurs, noise = calls
    assert noise == (t_max, n2m.linear) and tuple(b[2] for b in blurs) == axes and all(b[1] == taps for b in blurs)
    for std, _, _ in blurs:
        assert std.shape == (2000,) and lowest <= float(std.min()) and float(std.max()) <= highest
        close([std.min(), std.mean(), std.max()], [lowest, (lowest + highest) / 2, highest], atol=0.04 * highest)
        assert (std == blurs[0][0]).all()
    close((low_fi if aligned is None else aligned)[:, :3], 2 * (len(blurs) - (aligned is not None)))


@pytest.mark.parametrize("name", n2m.NAMES)
def test_training_inputs(name):
    """Shapes, padding with silence, and with the augmentation neutralised the conditions are the audio, in place."""
    model = replace(n2m.tiny(n2m.MODELS[name]), training=replace(n2m.MODELS[name].training, t_max=0.0, blur_taps=0))
    samples, cfg = 4800, model.unet
    t = np.arange(samples)
    low, high = (np.sin(2 * np.pi * cycles * t / samples + 1) for cycles in (51, round(0.45 * samples)))
    audio = jnp.asarray(0.5 * np.stack([low + 0.5 * high, high]) * (np.arange(2) + 1)[:, None], jnp.float32)
    x, low_fi, aligned = n2m.training_inputs(model, jax.random.key(0), audio)
    length = samples // 160 if n2m.writes_log_mel(model) else samples
    assert x.shape == (2, n2m.padded_length(cfg, length), cfg.out_channels) and x.shape[1] % math.prod(cfg.strides) == 0
    close(x[:, :length], n2m.log_mel(audio) if n2m.writes_log_mel(model) else audio[:, :, None])
    assert (x[:, length:] == (-1 if n2m.writes_log_mel(model) else 0)).all() and x.shape[1] > length or name == "spectrogram_vocoder"
    assert (low_fi is not None) == (model.low_rate is not None) and (aligned is not None) == (cfg.aligned_channels > 0)
    if low_fi is not None:  # the high tone is above the Nyquist frequency of the low rate; sigma_0 = 0.01 of noise remains
        assert low_fi.shape == (2, x.shape[1], 1) and not low_fi[:, samples:].any()
        close(low_fi[:, :samples, 0], 0.5 * np.stack([low, 0 * high]), atol=0.06)
        assert 0.009 < float((low_fi[1, :samples]).std()) < 0.011
    if aligned is not None:
        assert aligned.shape == (2, x.shape[1] // 160, 80)
        close(aligned, n2m.log_mel(audio), atol=0.06)


def test_vocoder_snippets_that_are_not_whole_frames_are_padded_with_silence():
    model = replace(n2m.MODELS["spectrogram_vocoder"], training=replace(n2m.MODELS["spectrogram_vocoder"].training, t_max=0.0, blur_taps=0))
    audio = normal(1, 1650)
    x, _, aligned = n2m.training_inputs(model, jax.random.key(0), audio)
    assert x.shape == (1, 1760, 1) and aligned.shape == (1, 11, 80) and (aligned[:, 10] == -1).all() and not x[:, 1650:].any()
    condition = n2m.sampling_condition(model, n2m.log_mel(audio), 1650 / 16_000)  # "pad alike in training and sampling"
    close(condition.aligned, aligned, atol=0.06)


@pytest.mark.parametrize("name", ["waveform_cascader", "superresolution_cascader"])
def test_sampling_corrupts_nothing_and_pads_as_in_training(name):
    model = n2m.MODELS[name]
    n = round(0.1 * model.low_rate)
    previous = np.sin(2 * np.pi * 7 * np.arange(n) / n)[None]
    condition = n2m.sampling_condition(model, jnp.asarray(previous, jnp.float32), 0.1)
    m = round(0.1 * model.rate)
    assert condition.low_fi.shape[1] == n2m.padded_length(model.unet, m) > m and not condition.low_fi[:, m:].any()
    close(condition.low_fi[0, :m, 0], np.sin(2 * np.pi * 7 * np.arange(m) / m), atol=1e-5)


# ---- noise2music.py: the loss, Eq. 1 ----


def loss_of(name, clips, stub, monkeypatch, key=0, **training):
    """diffusion_loss on clips of a constant 0.25, with the network replaced by `stub` where one is given."""
    model = n2m.MODELS[name]
    model = replace(model, unet=small_unet(**NO_TEXT) if stub is None else model.unet, training=replace(model.training, **training))
    params = None
    if stub:
        monkeypatch.setattr(n2m, "unet", lambda params, cfg, *args: stub(*args))
    else:
        monkeypatch.setattr(n2m, "unet", jit_unet)
        params = jax.jit(n2m.init_params, static_argnums=1)(jax.random.key(7), model.unet)
    c = random_condition(small_unet(), 1)
    text, mask = (jnp.repeat(a, clips, 0) for a in (c.text, c.text_mask))
    return n2m.diffusion_loss(params, model, jax.random.key(key), jnp.full((clips, 240), 0.25), text, mask)


def test_an_untrained_network_has_a_loss_of_1(monkeypatch):
    """Its exit is zero, so eps_hat = 0 and the loss is E[eps^2] = 1: the number to expect at step 0."""
    loss, t = loss_of("superresolution_cascader", 40, None, monkeypatch)
    assert loss.shape == t.shape == (40,)
    close(loss.mean(), 1, atol=0.05)


def test_the_true_noise_has_no_loss(monkeypatch):
    def stub(x_t, t, condition, text_on, dtype, remat):
        alpha, sigma = alpha_sigma64("linear", t)
        x = jnp.where(jnp.arange(x_t.shape[1]) < 240, 0.25, 0)[:, None]  # padded with silence
        assert condition.low_fi.shape == x_t.shape and condition.text.shape == (64, L, 7)
        return (x_t - alpha[:, None, None] * x) / sigma[:, None, None]

    loss, _ = loss_of("waveform_cascader", 64, stub, monkeypatch)
    close(loss, 0, atol=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_sigma_weight_is_sigma_squared(monkeypatch, schedule):
    stub = lambda x_t, *_: jnp.zeros_like(x_t)
    run = lambda weight: loss_of("waveform_cascader", 64, stub, monkeypatch, loss_weight=weight, noise_schedule=schedule)
    (plain, t), (weighted, t_again) = run("simplified"), run("sigma")
    assert (t == t_again).all()
    close(weighted, plain * alpha_sigma64(schedule, t)[1] ** 2, rtol=2e-3)


def test_velocity_weight_is_the_loss_in_v_up_to_its_bound():
    rng = np.random.default_rng(0)
    x, eps, eps_hat, logsnr = *rng.standard_normal((3, 200)), rng.uniform(-5, 20, 200)  # float64
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))
    x0_hat = (alpha * x + sigma * eps - sigma * eps_hat) / alpha
    v, v_hat = alpha * eps - sigma * x, alpha * eps_hat - sigma * x0_hat
    weight = n2m.LOSS_WEIGHTS["velocity"]
    close(weight(jnp.float32(logsnr)) * (eps_hat - eps) ** 2, (v_hat - v) ** 2, rtol=1e-4)
    close(weight(jnp.float32([-20.0, -10.0])), 1 + math.exp(5), rtol=1e-5)


def test_time_is_uniform_text_is_hidden_for_a_tenth_and_noise_is_normal(monkeypatch):
    seen = []
    loss, t = loss_of("superresolution_cascader", 6000, lambda x_t, t, c, on, *_: seen.extend((x_t, t, on)) or jnp.zeros_like(x_t), monkeypatch)
    x_t, t_seen, text_on = seen
    assert (t == t_seen).all() and 0 <= t.min() and t.max() < 1
    close(np.quantile(t, [0.1, 0.25, 0.5, 0.75, 0.9]), [0.1, 0.25, 0.5, 0.75, 0.9], atol=0.025)
    assert abs(float(jnp.mean(text_on)) - 0.9) < 0.02 and set(np.unique(text_on)) == {0, 1}
    close(loss.mean(), 1, atol=0.01)
    assert abs(np.corrcoef(t, text_on)[0, 1]) < 0.06 and abs(np.corrcoef(t, loss)[0, 1]) < 0.06
    other, _ = loss_of("superresolution_cascader", 6000, lambda x_t, *_: jnp.zeros_like(x_t), monkeypatch, key=1)
    assert (np.asarray(loss) != np.asarray(other)).mean() > 0.99


# ---- noise2music.py: both routes ----

SHORT_STRIDES = dict(zip(n2m.NAMES, [(4, 8), (4, 4), (2, 3), (16, 10), (4, 4)]))


@functools.cache
def small_weights(blocks=(1, 1)):
    """All five models, two depths each, random parameters, three steps."""
    weights = {}
    for seed, name in enumerate(n2m.NAMES):
        model = n2m.MODELS[name]
        text = dict(self_attention=(False, True), cross_attention=(False, True)) if n2m.uses_text(model) else NO_TEXT
        fields = ("in_channels", "out_channels", "aligned_channels")
        unet = small_unet(strides=SHORT_STRIDES[name], blocks=blocks, **text, **{f: getattr(model.unet, f) for f in fields})
        weights[name] = replace(model, unet=unet, inference=replace(model.inference, steps=3)), random_params(unet, seed)
    return weights


def encode_text(prompts, token_length):
    embed = lambda p: rng(sum(map(ord, p))).normal(size=(token_length, 7))
    return np.float32([embed(p) for p in prompts]), np.array([np.arange(token_length) < len(p) for p in prompts])


@pytest.mark.parametrize("route", n2m.ROUTES)
def test_clip_i_of_a_seed_is_the_same_whatever_the_batch(route):
    """Clips 0, 1 and clips 1, 2 agree on clip 1, at every stage."""
    prompts, done = ["slow piano", "fast drums", "harp"], []
    run = functools.partial(n2m.generate, weights=small_weights(), encode_text=encode_text, route=route, seconds=0.37)
    first = run(prompts[:2], seed=4, progress=lambda *a: done.append(a))
    second = run(prompts[1:], seed=4, first_clip=1)
    assert tuple(first) == n2m.ROUTES[route] and done == [(name, 3, 3) for name in first]
    assert [x.shape for x in first.values()] == [(2, 1184) if route == "waveform" else (2, 37, 80), (2, 5920), (2, 8880)]
    for name, x in first.items():
        close(second[name][0], x[1], atol=1e-3, err_msg=name)
        assert np.isfinite(x).all() and 0 < np.abs(x).max() <= 1 and np.abs(x[0] - x[1]).max() > 0.1
    other_seed = run(prompts[:2], seed=5, superres=False)
    assert tuple(other_seed) == n2m.ROUTES[route][:2]
    assert all(np.abs(other_seed[name] - first[name]).max() > 0.1 for name in other_seed)


@pytest.mark.parametrize("route", n2m.ROUTES)
@pytest.mark.parametrize("seconds", [1.0, 0.07, 1.1, 0.37002, 30.0])
def test_every_duration_reaches_every_stage(monkeypatch, route, seconds):
    """Lengths only: each stage is replaced by one that checks what it is given. 1.1 * 100 is 110.00000000000001."""
    seen = []

    def stage(params, model, condition, keys, length, dtype, progress):
        multiple = math.prod(model.unet.strides)
        assert length == n2m.padded_length(model.unet, length) and keys.shape == (2,)
        assert condition.low_fi is None or condition.low_fi.shape == (2, length, 1)
        assert condition.aligned is None or condition.aligned.shape == (2, length // multiple, 80)
        assert (condition.text is None) == (model.training.token_length == 0)
        assert condition.text is None or condition.text.shape == (2, model.training.token_length, 7)
        seen.append((model.name, *np.asarray(jax.vmap(jax.random.key_data)(keys)).ravel().tolist()))
        return jnp.full((2, length, model.unet.out_channels), 0.25 * len(seen))

    monkeypatch.setattr(n2m, "sample", stage)
    weights = {name: (n2m.MODELS[name], None) for name in n2m.NAMES}
    out = n2m.generate(["a", "b"], weights, encode_text, route, seconds)
    assert tuple(out) == tuple(s[0] for s in seen) == n2m.ROUTES[route] and len({s[1:] for s in seen}) == 3  # own noise
    samples = [round(seconds * rate) for rate in (3_200, 16_000, 24_000)]
    first = (2, samples[0]) if route == "waveform" else (2, -(-samples[1] // 160), 80)
    assert [x.shape for x in out.values()] == [first, (2, samples[1]), (2, samples[2])]


# ---- t5_encoder.py: cases ----

CAPTIONS = [
    "A slow, melancholic piano ballad with warm strings and a soft female voice.",
    "Energetic techno at 140 BPM: distorted kick, acid bass, sparse hi-hats",
    "Musique électronique française, très douce; ça va bien — à l'été, naïve & cœur",
    "ρεμπέτικο με μπουζούκι", "Русская народная песня с балалайкой", "一首节奏明快的电子舞曲",
    "音楽は静かで美しいピアノ曲です", "موسيقى عربية هادئة مع العود", "느린 피아노 음악",
    "धीमा भारतीय शास्त्रीय संगीत सितार के साथ",
    "</s> <pad> <unk> <extra_id_0> are words, and/or not <s> 1234567890 #$%^*()[]{}|\\"]
ORDINARY = CAPTIONS[:-1] + [
    "", " ", "      ", "a", "  leading and trailing   ", "many    spaces     between",
    "tabs\tand\nnewlines\r\n here\t", "nbsp\u00a0thin\u2009ideographic\u3000space",
    "zero\u200bwidth\u200djoiner\ufeff", "soft\u00adhyphen", "🎵 emoji 🎹🎹 family 👨‍👩‍👧 flag 🇫🇷",
    "e\u0301 combining a\u030a\u0323 z\u0335\u0321", "ｆｕｌｌ　ｗｉｄｔｈ１２３！", "ﬁne ½ ² ™ Å",
    "Ω ẞ ß İ ı ǅ", "العربيةEnglishमिला", "ไทย ພາສາລາວ ქართული ሙዚቃ", "𝔅𝔩𝔞𝔠𝔨 𝕄𝕖𝕥𝕒𝕝",
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

is_encoder = lambda name: name.startswith(("shared", "encoder"))
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
            if not any(map(is_encoder, read_safetensors(path)[0])):
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


def test_bfloat16_computation_is_close(t5, t5_folder):
    half = load_t5(t5_folder, jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}
    (exact, mask), (rounded, _) = encode(t5, CAPTIONS, 64), encode(half, CAPTIONS, 64)
    error = np.sqrt(np.mean((rounded - exact)[mask]**2))  # embeddings have mean square 1
    assert rounded.dtype == np.float32 and 1e-4 < error < 0.05


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
        assert theirs("a</s>b").input_ids.count(1) == 2  # departs: in ours it stays text, see below


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
    counts = [count_tokens(without_bytes, text) for text in ("ሙዚቃ", "ሙዚቃ ሙዚቃ", "ሙዚቃ bass")]
    assert counts[:2] == [0, 0] and counts[2] == 2 + count_tokens(without_bytes, "bass")


def test_text_encoder_is_all_that_others_know(t5, t5_folder):
    text = t5_encoder.load_text_encoder(t5_folder)
    assert text.width == 64 and text.count_tokens("jazz bass") == count_tokens(t5, "jazz bass") > 0
    for ours, theirs in zip(text.encode(CAPTIONS, 64), encode(t5, CAPTIONS, 64)):
        np.testing.assert_array_equal(ours, theirs)
    others = [t5, random_t5(CAPTIONS, 1), random_t5([], 0),
              t5._replace(params=t5.params | {"final_norm": 2 * t5.params["final_norm"]})]
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
    ("config.json", lambda f: (f / "config.json").write_text("{")),
    ("config.json", lambda f: (f / "config.json").write_text("[" * 100000)),
    ("config.json", lambda f: (f / "config.json").write_text("[]")),
    ("spiece.model: not of this T5", edit_config(vocab_size=200)),
    ("spiece.model", lambda f: (f / "spiece.model").write_bytes(b"not a model")),
    ("spiece.model: not of this T5", lambda f: (f / "spiece.model").write_bytes(b"")),
    ("no model.safetensors", lambda f: (f / "model.safetensors").unlink()),
    ("no shared.weight of floats", edit_config(vocab_size=1001)),
    ("no .*relative_attention_bias.weight", edit_config(num_heads=-4, d_kv=-16)),
    ("no .*DenseReluDense.wi_0.weight", edit_config(d_ff=True)),
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


def test_absent_things(tmp_path, t5_folder):
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

@pytest.mark.parametrize("captions", [[], [""], ["音楽"], ["x" * 10000], ["a\nb\0c\td"], CAPTIONS])
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
    assert not np.array_equal(random_t5(CAPTIONS, 1).params["embed"], t5.params["embed"])


# ---- t5_encoder.py: safetensors ----

def some_tensors():
    values = rng().standard_normal((3, 5)) * 9
    return {name: values.astype(name) for name in t5_encoder.DTYPES.values()} | {
        "scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 3), np.int16),
        "é/名\n": np.ones(1), "jax": jnp.arange(7, dtype=jnp.bfloat16),
        "strided": np.arange(12.0).reshape(3, 4).T[::2]}


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape
        np.testing.assert_array_equal(a[name], np.asarray(b[name]))


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
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, step, lambda *_: signal.raise_signal(signal.SIGINT))
            write_safetensors(path, {"x": np.ones(9)}, {})
        assert os.listdir(tmp_path) == ["a"]  # the old file, whole
        same(read_safetensors(path)[0], {"x": np.arange(4)})
    with pytest.raises(OSError, match="nowhere"):
        write_safetensors(tmp_path / "nowhere" / "a", {}, {})
    with pytest.raises(OSError, match="absent"):
        read_safetensors(tmp_path / "absent")


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
    for kind in np.arange(1000) % 3:  # runs of noise, zeros, and pieces in another place
        at, source, length = g.integers(len(good)), g.integers(len(good)), g.integers(1, 64)
        run = (g.bytes(length), bytes(length), good[source:source + length])[kind]
        bad = good[:at] + run + good[at + len(run):]
        if bad != good:
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
    soundfile.write(path, tone[:, None].repeat(channels, 1), rate)
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
    assert train.text_batch(track, 100, count)[2:] == ["a b, c, d e f, g"]


def test_examples_are_a_pure_function_of_seed_and_index(tmp_path):
    """What makes a resumed run see the data that it would have seen."""
    tracks = [train.Track(write_tone(tmp_path / f"{k}.wav", 8, hz=100 * k), (f"{k}",))
              for k in range(1, 8)]
    clips = train.find_clips(tracks)
    first = [maker(clips, seed=5)(i) for i in range(14)]
    loader = train.batches(maker(clips, seed=5), [0, 2], 3, 6)
    again = next(loader) + next(loader)
    loader.close()
    for a, b in zip((first[i] for i in (6, 8, 9, 11)), again, strict=True):
        np.testing.assert_array_equal(a.audio, b.audio)
        assert a.text == b.text
    texts = [e.text for e in first]
    assert sorted(texts[:7]) == sorted(texts[7:]) == list("1234567") and texts[:7] != texts[7:]
    assert [maker(clips, seed=6)(i).text for i in range(7)] != texts[:7]
    assert any((maker(clips, seed=s)(0).audio[:99] != first[0].audio[:99]).any() for s in (6, 7))


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
    assert err.count('"start"') == 6 and err.count("\n") == 15
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
    assert err.count("\n") == 2 and "no audio at 50 s" in err and "no audio at 99 s" in err
    example = train.example_maker(clips[:1], n2m.MODELS["waveform_generator"], 0)(0)
    seconds = example.audio[: 30 * 3_200].reshape(30, 3_200)  # a bin is a Hz
    peaks = np.abs(np.fft.rfft(seconds))[:, 1:].argmax(axis=1) + 1
    assert peaks.tolist() == [200] * 10 + [300] * 10 + [400] * 10 and example.text == ""


def test_txt_captions(tmp_path, capfd):
    write_tone(tmp_path / "a.wav"), write_tone(tmp_path / "b.wav")
    (tmp_path / "a.TXT").write_text("first caption\n\nsecond caption\n")
    (track,) = train.read_tracks(tmp_path, needs_text=True)
    assert track == (tmp_path / "a.wav", ("first caption", "second caption"), (), None)
    assert "b.wav: no caption" in capfd.readouterr().err
    assert len(train.read_tracks(tmp_path, needs_text=False)) == 2  # the vocoder needs no captions


# ---- train.py: optimiser, checkpoints, the run ----

tiny = n2m.tiny  # before a test replaces it
ROOT = Path(__file__).parent


def small(name, **training):
    """A model on the code path of all the others, small enough to compile and train in a test."""
    model = tiny(n2m.MODELS[name])
    unet = replace(model.unet, base_dimension=8, head_width=4, text_width=64,
                   attention_heads=2 * (model.unet.attention_heads > 0))
    return replace(model, unet=unet, inference=replace(model.inference, steps=3),
                   training=replace(model.training, **training))


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


def run_train(*argv):
    train.main([str(a) for a in argv])


def last_tensors(folder):
    return t5_encoder.read_safetensors(train.checkpoints(folder)[-1])[0]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def exits(capfd, main, *argv, status=2):
    """Runs a script's main, which must end with a line on stderr and no traceback; returns it."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    err = capfd.readouterr().err
    assert stop.value.code == status and "Traceback" not in err and err.endswith("\n")
    return err


def test_learning_rate_of_section_4_1():
    tx = train.optimizer(n2m.MODELS["waveform_generator"].training)
    adam, schedule = tx.init(jnp.zeros(1))
    adam = adam._replace(mu=jnp.ones(1), nu=jnp.ones(1), count=jnp.int32(1_000_000))
    for step, rate in [(0, 0.0), (5_000, 0.5e-4), (10_000, 1e-4), (1_255_000, 0.5e-4),
                       (2_500_000, 0.0)]:
        update, _ = tx.update(jnp.ones(1), (adam, schedule._replace(count=jnp.int32(step))))
        assert abs(-float(update[0]) - rate) < 1e-9


def test_accumulation_averages_gradients_and_the_ema_warms_up(monkeypatch):
    """Parts of a batch with the loss of the whole: the same update."""
    model = small("superresolution_cascader")
    monkeypatch.setattr(train, "gradients", lambda params, model, key, batch: (
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
    a, b = last_tensors(whole), last_tensors(parts)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert [e["step"] for e in log_of(parts)] == [1, 2, 3, 4, 5]
    assert [e["loss"] for e in log_of(parts)] == [e["loss"] for e in log_of(whole)]


def test_a_run_begins_with_the_averages_of_another(tmp_path, data, small_models, capfd):
    """--init takes the model, with what the command line changes of it; bf16 and rematerialisation
    reach the network, and are stored."""
    name = "waveform_generator"
    common = [name, "--data", data, "--batch-size", 2, "--learning-rate"]
    run_train(*common, 1e-2, "--tiny", "--out", tmp_path / "a", "--steps", 2, "--seconds", 1.28,
              "--bf16", "--remat")
    init = ["--init", train.checkpoints(tmp_path / "a" / name)[-1]]
    run_train(*common, 1e-30, "--out", tmp_path / "b", "--steps", 1, "--seed", 9, *init)
    (model, params, metadata), (old, averages, _) = (
        train.load_model(tmp_path / "b", name, raw=True), train.load_model(tmp_path / "a", name))
    jax.tree.map(np.testing.assert_array_equal, params, averages)
    assert model == replace(old, training=replace(old.training, steps=1, learning_rate=1e-30))
    assert metadata["seed"] == 9 and metadata["index"] == 2 and "hertz" in metadata["words"]
    assert metadata["t5"] == str(tmp_path / "a" / "t5") and not (tmp_path / "b" / "t5").exists()
    assert (old.training.seconds, old.unet.dtype, old.unet.remat) == (1.28, "bfloat16", True)
    text = n2m.Condition(text=np.zeros((2, 64, 64)), text_mask=np.ones((2, 64), bool))
    batch = n2m.Batch(np.zeros((2, 4096), np.float32), text)
    program = str(jax.make_jaxpr(train.gradients, static_argnums=1)(
        params, model, jax.random.key(0), batch))
    assert "bf16[" in program and ("remat" in program or "checkpoint" in program)
    assert "of waveform_generator" in exits(capfd, train.main, "waveform_cascader", *common[1:], 1,
                                            "--out", tmp_path / "c", *init)


def test_what_a_checkpoint_refuses(tmp_path):
    model = small("superresolution_cascader")
    folder = tmp_path / model.name
    folder.mkdir()
    metadata = {"seed": 3, "index": 12, "t5": None, "t5_fingerprint": None}
    state = train.init_state(model, 3)
    for step in (1, 2, 3):
        path = train.save_checkpoint(folder, state._replace(step=jnp.int32(step)), model, metadata)
    assert [p.name[-13] for p in train.checkpoints(folder)] == ["2", "3"]  # the last two are kept
    loaded, params, meta = train.load_model(tmp_path, model.name)
    assert loaded == model and meta == metadata
    jax.tree.map(np.testing.assert_array_equal, params, state.ema)
    raw = path.read_bytes()
    for broken in (raw[:-1], raw[: len(raw) // 2], b"", raw.replace(b'"seed"', b'"need"', 1),
                   raw[:40_000] + bytes([raw[40_000] ^ 4]) + raw[40_001:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=path.name) as error:
            train.load_model(tmp_path, model.name)
        assert "\n" not in str(error.value)
    write = partial(train.write_checkpoint, path, {"ema/entry/w": np.zeros(3)})
    for meta, words in [({"seed": 0}, "not a checkpoint"), (metadata, "lacks ema/")]:
        write(model, meta)
        with pytest.raises(ValueError, match=words):
            train.load_model(tmp_path, model.name)
    with pytest.raises(ValueError, match="of superresolution_cascader, not of another"):
        train.load_checkpoint(path, "another")


def test_configurations_of_older_checkpoints():
    model = small("spectrogram_vocoder")
    old = dataclasses.asdict(model)
    old["unet"] |= {"segments": 1}
    del old["unet"]["dtype"], old["unet"]["remat"], old["inference"]["sampler"]
    for gamma, sampler in ((None, "renoise"), (0.5, "ddpm")):
        old["inference"]["gamma"] = gamma
        inference = replace(model.inference, gamma=gamma or 0, sampler=sampler)
        assert train.model_from_json(json.dumps(old)) == replace(model, inference=inference)


REFUSALS = [  # script, command line, words of the line in which it refuses it with status 2
    *((train, f"waveform_generator --tiny --out {{tmp}}/out {argv}", words) for argv, words in [
        ("--data {tmp}/absent", "absent: no such folder"),
        ("--data {tmp}/empty", "no audio with a caption"),
        ("--data {tmp}/broken", "unusable"),
        ("--overfit {tmp}/absent.wav", "absent.wav: no such file"),
        ("--overfit {tmp}/broken/a.wav", "a.wav"),
        ("", "--data"),
        ("--data {data} --overfit {data}/0.wav", "not allowed with"),
        ("--data {data} --init {data}/0.wav", "not allowed with"),
        ("--data {data} --batch-size 0", "--batch-size"),
        ("--data {data} --accumulate 3", "--accumulate"),
        ("--data {data} --learning-rate nan", "--learning-rate"),
        ("--data {data} --learning-rate inf", "--learning-rate"),
        ("--data {data} --occlusion 1.5", "--occlusion"),
        ("--data {data} --seconds 30.1", "--seconds"),
        ("--data {data} --decay-steps 100", "--warmup-steps"),
        ("--data {data} --noise-schedule x", "--noise-schedule"),
        ("--data {data} --loss-weight x", "--loss-weight"),
        ("--data {data} --seed -1", "--seed"),
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
    *((sample, f"slow --models {{runs}} -o {{tmp}}/out/x.wav {argv}", words) for argv, words in [
        ("--prompts {tmp}/odd.jsonl", "give a prompt"),
        *((f"--seconds {seconds}", "--seconds") for seconds in ("x", 0, -1, "nan", 1e9)),
        ("--num -1", "--num"), ("--steps 0", "--steps"), ("--steps 1,2", "--steps"),
        ("--cfg-scale -1", "--cfg-scale"), ("--gamma 1.5", "--gamma"), ("--seed 1e3", "--seed"),
        ("--route sideways", "'spectrogram'"), ("--schedule sideways", "Table 8"),
        ("--model-parallel 99", "is more than the"), ("--t5 {tmp}/t5", "not the T5 encoder")]),
    *((sample, f"--models {{runs}} {argv}", words) for argv, words in [
        ("", "give a prompt"), ("'  ' -o {tmp}/out/x.wav", "the prompt is empty"),
        ("slow -o {tmp}/a.wav", "is a folder"), ("slow -o {tmp}/out/x.mp3", ".wav"),
        ("slow -o {tmp}/file/x.wav", "file/x.wav: cannot be written"),
        ("--prompts {tmp}/absent", "absent"), ("--prompts {tmp}/file", "no prompt"),
        ("--prompts {tmp}/bad.jsonl", "bad.jsonl:2"), ("--prompts {tmp}/odd.jsonl", "odd.jsonl:1"),
        ("--prompts {tmp}/long.jsonl", "long.jsonl:1"),
        ("--prompts {tmp}/blank.jsonl", "prompt 1: the prompt is empty")]),
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
    for name, text in [("bad", 'good\n{"prompt": \n'), ("odd", '{"prompt": "x", "sed": 1}'),
                       ("long", '{"prompt": "x", "seconds": 601}'), ("blank", '{"prompt": " "}')]:
        (tmp / f"{name}.jsonl").write_text(text)
    save_t5(tmp / "t5", random_t5(["another vocabulary"], 1))
    return {"tmp": tmp, "data": data, "runs": runs}


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
    t = np.arange(round(1.28 * 3_200)) / 3_200
    hz = np.array([220, 330, 262, 440])[(t / 0.32).astype(int)]
    notes = 0.3 * np.sin(2 * np.pi * hz * t) * np.exp(-4 * (t % 0.32))
    soundfile.write(tmp_path / "clip.wav", notes, 3_200, "FLOAT")
    options = ("waveform_generator --tiny --seconds 1.28 --steps 160 --decay-steps 200 "
               "--warmup-steps 20 --learning-rate 2e-3 --save-every 40").split()
    command = [sys.executable, "train.py", *options, "--overfit", tmp_path / "clip.wav",
               "--out", tmp_path]
    folder, silent = tmp_path / "waveform_generator", dict(stdout=subprocess.DEVNULL)
    with subprocess.Popen(command, **silent, stderr=subprocess.DEVNULL, cwd=ROOT) as run:
        while run.poll() is None and len(train.checkpoints(folder)) < 2:
            time.sleep(0.05)
        run.kill()
    assert run.returncode == -signal.SIGKILL and train.checkpoints(folder)[-1].stem[-3:] < "160"
    subprocess.run([*command, "--resume"], check=True, cwd=ROOT, **silent)

    model, params, _ = train.load_model(tmp_path, "waveform_generator")
    encoder = t5_encoder.load_text_encoder(tmp_path / "t5")
    text, text_mask = encoder.encode(["clip"], model.training.token_length)
    condition = n2m.Condition(text=text, text_mask=text_mask)
    for seed in (1, 2):
        keys = jax.random.key(seed)[None]
        clip = n2m.sample(params, model, condition, keys, len(t))[0, :, 0]
        assert np.corrcoef(clip, notes)[0, 1] > 0.9
    wav, rate = soundfile.read(folder / "sample-00000160.wav")
    assert rate == 3_200 and np.corrcoef(wav, notes)[0, 1] > 0.9


TRAIN_SMALL = """
import sys, test_noise2music as test, train
test.n2m.tiny = lambda model: test.small(model.name)
train.main(sys.argv[1:])"""


def start(options, *more, env=None):
    """train.py in a process of its own, on small models."""
    command = [sys.executable, "-c", TRAIN_SMALL, *options.split(), "--tiny", *map(str, more)]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for(words, run):
    while words not in run.stdout.readline():
        assert run.poll() is None, run.stderr.read()


def test_sigterm_saves_first(tmp_path, data):
    with start("superresolution_cascader --log-every 1 --batch-size 2", "--data", data, "--out",
               tmp_path) as run:
        wait_for("step 3/", run)
        run.terminate()
        _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in err and "Traceback" not in err
    assert len(train.checkpoints(tmp_path / "superresolution_cascader")) == 1


# ---- what a fork does, from outside the modules ----


def trains_and_samples(out, data, name, route, *options):
    """Two steps of a model, and a clip of the route that it is alone in."""
    run_train(name, "--data", data, "--out", out, "--steps", 2, "--batch-size", 2, *options)
    model, params, _ = train.load_model(out, name)
    encoder = t5_encoder.load_text_encoder(out / "t5")

    def encode(prompts, model):
        text, mask = encoder.encode(prompts, model.training.token_length)
        return n2m.Condition(text=text, text_mask=mask)

    audio = n2m.generate(["a tone"], {name: (model, params)}, encode, route, seconds=0.5)[name]
    assert audio.shape == (1, model.rate // 2) and np.isfinite(audio).all() and audio.std() > 0
    return model


def test_another_noise_schedule_is_one_place_to_touch(tmp_path, data, small_models, monkeypatch):
    monkeypatch.setitem(n2m.SCHEDULES, "straight", lambda t, xp=jnp: 10 - 20 * t)
    monkeypatch.setitem(n2m.ROUTES, "alone", ("waveform_generator",))
    model = trains_and_samples(tmp_path, data, "waveform_generator", "alone", "--tiny",
                               "--noise-schedule", "straight")
    assert model.training.noise_schedule == "straight"


def test_a_sixth_model_is_two_places_to_touch(tmp_path, data, monkeypatch, capfd):
    like = small("waveform_generator", seconds=0.4)
    unet = replace(like.unet, depth=2, strides=(3, 5), channels=(2, 3), blocks=(1, 1),
                   self_attention=(False, True), cross_attention=(True, True))
    sixth = replace(like, name="sixth", unet=unet, rate=2_000, audio_rate=2_000)
    sixth = replace(sixth, inference=n2m.InferenceConfig("uniform", 1.0, 3.0, steps=4))
    monkeypatch.setitem(n2m.MODELS, "sixth", sixth)
    monkeypatch.setitem(n2m.ROUTES, "short", ("sixth",))
    assert trains_and_samples(tmp_path, data, "sixth", "short").unet.strides == (3, 5)
    argv = ["sixth", "--tiny", "--data", data, "--out", tmp_path]
    assert "no small variant of sixth" in exits(capfd, train.main, *argv)


# ---- sample.py ----


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All five models, small and untrained, as train.py leaves them."""
    out = tmp_path_factory.mktemp("runs")
    t5_encoder.save_t5(out / "t5", t5_encoder.random_t5(["slow piano", "fast drums and bass"], 0))
    mark = t5_encoder.load_text_encoder(out / "t5").fingerprint
    for name in n2m.MODELS:
        (out / name).mkdir()
        metadata = {"seed": 0, "index": 0, "t5": None, "t5_fingerprint": mark}
        train.save_checkpoint(out / name, train.init_state(small(name), 0), small(name), metadata)
    return out


def run_sample(*argv):
    sample.main([str(a) for a in argv])


def settings_in(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def test_a_prompt_becomes_a_wav_by_each_route(tmp_path, runs):
    for route, names in n2m.ROUTES.items():
        out = tmp_path / route / "music.wav"
        run_sample("slow piano", "-o", out, "--models", runs, "--route", route, "--seconds", 0.7,
                   "--num", 2, "--keep-stages", "--seed", 5)
        for i, settings in enumerate(settings_in(out.parent)):
            audio, rate = soundfile.read(out.with_name(f"music-{i}.wav"))
            assert rate == 24_000 and audio.shape == (16_800,) and audio.std() > 0
            assert (settings["prompt"], settings["seed"], settings["clip"]) == ("slow piano", 5, i)
            assert [*settings["stages"]] == list(names)
            stage = soundfile.info(out.with_name(f"music-{i}.{names[1]}.wav"))
            assert (stage.samplerate, stage.frames) == (16_000, 11_200)
        assert i == 1 and not list(out.parent.glob("*.part"))
    mel = np.load(tmp_path / "spectrogram/music-1.spectrogram_generator.npy")
    assert mel.shape == (70, 80)


def test_clip_i_of_a_seed_is_the_same_whatever_num_is(tmp_path, runs):
    """And another seed, or another clip, is another one."""
    for name, num, seed in [("one", 1, 3), ("two", 2, 3), ("other", 1, 4)]:
        run_sample("slow piano", "-o", tmp_path / f"{name}.wav", "--models", runs, "--seconds", 0.5,
                   "--num", num, "--seed", seed, "--no-superres")
    one, first, second, other = (soundfile.read(tmp_path / f"{name}.wav")[0]
                                 for name in ("one", "two-0", "two-1", "other"))
    close(one, first, atol=2e-4)
    for different in (second, other):
        assert abs(np.corrcoef(one, different)[0, 1]) < 0.5


def test_a_file_of_prompts_continues_where_it_was_interrupted(tmp_path, runs):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('slow piano\n\n{"prompt": "fast drums", "seed": 9, "seconds": 0.4}\n')
    argv = ["--prompts", prompts, "-o", tmp_path / "out", "--models", runs, "--seconds", 0.5]
    run_sample(*argv, "--no-superres")
    wavs = sorted((tmp_path / "out").glob("*.wav"))
    assert [soundfile.info(wav).frames for wav in wavs] == [8_000, 6_400]
    assert [s["seed"] for s in settings_in(tmp_path / "out")] == [0, 9]
    before = [wav.stat().st_mtime_ns for wav in wavs]
    wavs[1].with_suffix(".json").unlink()  # as if stopped while the second was written
    run_sample(*argv, "--no-superres")
    after = [wav.stat().st_mtime_ns for wav in wavs]
    assert after[0] == before[0] and after[1] != before[1]


def test_captions_are_prompts_and_line_n_has_seed_plus_n(tmp_path, runs):
    """Sec. 4.3.3: the first long caption of a line of captions.jsonl, or else all its tags."""
    folder = manifest(
        tmp_path, {"audio": "a.wav", "long": ["slow piano", "fast"], "short": ["bass"]},
        {"audio": "a.wav", "tags": ["drums", "fast"], "title": "slow", "start": 1})
    write_tone(folder / "a.wav")
    run_sample("--prompts", folder / "captions.jsonl", "-o", tmp_path / "out", "--models", runs,
               "--seconds", 0.5, "--no-superres", "--seed", 7)
    assert [(s["prompt"], s["seed"]) for s in settings_in(tmp_path / "out")] == [
        ("slow piano", 7), ("slow, drums, fast", 8)]


def test_hard_prompts_are_music_too(tmp_path, runs, capfd):
    """10,000 words are cut, with a remark; any script is encodable."""
    prompts = tmp_path / "prompts.txt"
    hard = "спокойное фортепиано 静かなピアノ 🎹 </s> <extra_id_0>"
    prompts.write_text("word " * 10_000 + f"\n{hard}\n", "utf-8")
    run_sample("--prompts", prompts, "-o", tmp_path / "out", "--models", runs, "--seconds", 0.3,
               "--no-superres", "--steps", 1)
    assert len(list((tmp_path / "out").glob("*.wav"))) == 2
    assert "the model reads the first 63" in capfd.readouterr().err


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


def test_another_text_encoder_is_one_place_to_touch(tmp_path, data, monkeypatch):
    """Letters, each an embedding of five numbers."""
    read = []

    def encode(texts, length):
        read.extend(texts)
        letters = np.array([[*text.ljust(length)[:length]] for text in texts]).view(np.uint32)
        letters = letters.reshape(len(texts), length)
        return np.float32(letters[..., None] % np.arange(2, 7)), letters != ord(" ")

    mine = t5_encoder.TextEncoder(5, encode, len, "letters")
    monkeypatch.setattr(t5_encoder, "load_text_encoder", lambda folder: mine)
    unet = small_unet(in_channels=1)
    monkeypatch.setattr(n2m, "tiny", lambda model: replace(small(model.name), unet=unet))
    monkeypatch.setitem(n2m.ROUTES, "short", ("waveform_generator",))
    run_train("waveform_generator", "--tiny", "--data", data, "--t5", tmp_path, "--out", tmp_path,
              "--batch-size", 2, "--seconds", 0.64, "--steps", 2)
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
    for name, full in n2m.MODELS.items():
        model, params, metadata = train.load_model(sample.DEMO, name)
        unet = replace(n2m.tiny(full).unet, text_width=model.unet.text_width)
        assert (model.unet, model.inference) == (unet, n2m.tiny(full).inference)
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


# ---- sharding and several processes ----

SHARDED = {  # every width, head and group divides by 8
    "waveform_cascader": small_unet(base_dimension=16, attention_heads=8, groups=8, blocks=(1, 1)),
    "spectrogram_vocoder": small_unet(base_dimension=16, groups=8, blocks=(1, 1), strides=(8, 20), in_channels=1, aligned_channels=80, **NO_TEXT),
}


def check_every_split(name):
    """Run on 8 devices: the loss, the gradients and a clip of every mesh equal those of one device."""
    model = replace(n2m.MODELS[name], unet=SHARDED[name], inference=replace(n2m.MODELS[name].inference, steps=3))
    params, key = random_params(model.unet), jax.random.key(3)
    audio, condition = 0.3 * np.asarray(normal(8, 960)), random_condition(model.unet, b=5, t=960)
    condition = jax.tree.map(lambda a: np.resize(np.asarray(a), (8, *a.shape[1:])), condition)
    batch = n2m.Batch(audio, n2m.Condition(text=condition.text, text_mask=condition.text_mask))

    def results(params, model=model):
        grads, (losses, _) = train.gradients(params, model, key, batch)
        clip = n2m.sample(params, model, condition, jax.random.split(key, 8), 960)
        return losses, clip, grads

    expected = results(params)
    for n in (1, 2, 4, 8):
        mesh = n2m.make_mesh(n)
        with jax.set_mesh(mesh):
            losses, clip, grads = results(train.place(params, n2m.shardings(model.unet, mesh)))
        close(losses, expected[0], rtol=1e-5)
        close(clip, expected[1], atol=2e-5)
        for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[2])):
            close(a, b, rtol=1e-3, atol=1e-5 * max(1, np.abs(b).max()))


@pytest.mark.parametrize("name", SHARDED)
def test_every_split_of_eight_devices_gives_the_same_numbers(name):
    code = f"import test_noise2music; test_noise2music.check_every_split({name!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env=devices(8), cwd=Path(__file__).parent)


def devices(n):
    """The environment of a process of n devices, which on few cores may wait for each other longer than XLA's 40 s.

    Collectives that wait hold threads of XLA's pool, which by default has one a core or a device: all of them can wait for one that
    then finds no thread, for ever. NPROC is the size of that pool.
    """
    flags = f"--xla_force_host_platform_device_count={n} --xla_cpu_collective_call_terminate_timeout_seconds=600"
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
    assert now["cross_attention"]["q"]["w"] == (None, "model") and now["cross_attention"]["out"]["w"] == ("model", None)
    assert now["skip"] == {"w": (None, None), "b": (None,)}
    assert rest["conv1"]["w"] == (None, "data", "model") and rest["skip"]["w"] == ("data", None)
    assert block(state.opt[0].mu) == block(state.opt[0].nu) == rest
    assert n2m.partition(mesh, (3, 2, 16), ("taps", "channels", "channels"), 1) == jax.P(None, None, "data")  # 2 does not divide


@pytest.mark.parametrize("rows, length, segments", [(1, 720_000, 8), (2, 720_000, 4), (16, 720_000, 1), (1, 256 * 4 * 3, 4), (1, 300, 1)])
def test_pieces_make_eight_rows_and_are_not_shorter_than_a_kernel_reaches(rows, length, segments):
    model = n2m.in_pieces(n2m.MODELS["superresolution_cascader"], rows, length)
    assert model.unet.segments == segments


def test_the_rows_of_all_processes_are_the_batch(monkeypatch):
    """Each reads its share of every part."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    rows = []
    for i in range(3):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        rows.append(train.process_rows(24, 2))
    assert rows[1] == [4, 5, 6, 7, 16, 17, 18, 19] and sorted(sum(rows, [])) == list(range(24))


def test_two_processes_train_as_one_and_resume_on_another_number(tmp_path, data):
    """The losses of 2 processes of 4 devices are those of 1 of 8; a killed one ends the other; one
    process goes on."""
    options = ("spectrogram_vocoder --batch-size 16 --seconds 0.32 --accumulate 2 --log-every 1 "
               "--save-every 3 --model-parallel 2 --seed 5")
    folders = {name: tmp_path / name / "spectrogram_vocoder" for name in ("one", "two")}
    run = lambda n, name, *more: start(options, "--data", data, "--out", folders[name].parent,
                                       *more, env=devices(n))
    logged = lambda name, key: [entry[key] for entry in log_of(folders[name])]

    def pair(*more):
        host = f"localhost:{free_port()}"
        return [run(4, "two", *more, "--processes", 2, "--process", i, "--coordinator", host)
                for i in (0, 1)]

    one = run(8, "one", "--steps", 6)
    assert one.wait(200) == 0, one.stderr.read()
    two = pair("--steps", 3)
    assert [p.wait(200) for p in two] == [0, 0] and "step" not in two[1].stdout.read()
    close(logged("two", "loss"), logged("one", "loss")[:3], rtol=1e-4)
    close(logged("two", "grad_norm"), logged("one", "grad_norm")[:3], rtol=1e-3)

    two = pair("--steps", 100_000, "--resume")
    wait_for("step 5/", two[0])
    two[1].kill()
    assert two[0].wait(60) != 0 and "another" in two[0].stderr.read()

    saved = int(train.checkpoints(folders["two"])[-1].stem[-8:])
    assert saved % 3 == 0
    assert run(2, "two", "--steps", saved + 1, "--resume").wait(200) == 0
    by_step = dict(zip(logged("two", "step"), logged("two", "loss")))
    for step, loss in zip(logged("one", "step"), logged("one", "loss")):
        assert step > saved + 1 or abs(by_step[step] - loss) < 1e-3 * loss


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_a_batch_that_does_not_divide_among_devices_is_refused_in_one_line(tmp_path, data):
    run = start("spectrogram_vocoder --batch-size 6", "--data", data, "--out", tmp_path,
                env=devices(4))
    assert run.wait(100) == 2
    err = run.stderr.read()
    assert "--batch-size" in err and err.count("\n") == 1


# ---- noise2music.py: pseudo-labels and metrics, Secs. 3.5 and 4.3.2 ----


def test_top_captions_by_hand():
    """Cosines, not products; of equals the lower index; blocks of captions merged."""
    captions = np.array([[0, 5], [1, 0], [2, 0], [1, 1], [-1, 0], [0, 0]], np.float32)
    clips = np.array([[3, 0], [0, 0.1], [-1, 1]], np.float32)
    assert n2m.top_captions(captions, clips, 3).tolist() == [[1, 2, 3], [0, 3, 1], [0, 4, 3]]


@pytest.mark.parametrize("m", [37, 16_384, 40_001])
def test_top_captions_against_a_sort(m):
    captions, clips = np.float32(rng().normal(size=(m, 8))), np.float32(rng(1).normal(size=(5, 8)))
    captions[m // 2] = captions[m // 3]  # an exact tie
    cosine = (clips.astype(np.float64) / np.linalg.norm(clips, axis=1)[:, None]) @ (captions.astype(np.float64) / np.linalg.norm(captions, axis=1)[:, None]).T
    expected = np.sort(cosine, axis=1)[:, ::-1][:, :10]
    top = n2m.top_captions(captions, clips)
    close(np.take_along_axis(cosine, top, axis=1), expected, atol=1e-6)
    assert all(len(set(row)) == 10 for row in top.tolist())


def test_captions_are_drawn_with_probabilities_inverse_to_their_counts():
    """Three of four, one after the other, by the first draw's and the left-out one's distribution (chi-squared, 3 degrees)."""
    counts, n = np.array([1, 2, 4, 9]), 4000
    top = np.tile([0, 1, 2, 3], (n, 1))
    padding = np.repeat(np.arange(4), n * counts).reshape(-1, 4)  # other clips, whose captions are counted too
    everything = np.concatenate([top, padding])
    weight = 1 / np.bincount(everything.ravel())
    weight /= weight.sum()
    drawn = n2m.draw_captions(everything, 1, seed=7)[:n, 0]
    expected = n * weight
    assert np.sum((np.bincount(drawn, minlength=4) - expected) ** 2 / expected) < 16.3  # the 99.9 % point
    three = n2m.draw_captions(everything, 3, seed=8)[:n]
    assert (np.diff(three, axis=1) > 0).all()  # no caption twice, the closest first
    left_out = 6 - three.sum(axis=1)
    last = np.zeros(4)
    for order in itertools.permutations(range(4)):  # the probability that each is the one left
        p, rest = 1.0, 1.0
        for c in order[:3]:
            p, rest = p * weight[c] / rest, rest - weight[c]
        last[order[3]] += p
    assert np.sum((np.bincount(left_out, minlength=4) - n * last) ** 2 / (n * last)) < 16.3
    assert (n2m.draw_captions(everything, 3, seed=8) == n2m.draw_captions(everything, 3, seed=8)).all()


def test_fad_of_a_set_with_itself_and_of_shifted_gaussians():
    a = n2m.gaussian(rng().normal(size=(500, 6)))
    assert n2m.frechet_distance(a, a) < 1e-9
    shift = np.arange(6.0)
    close(n2m.frechet_distance(a, a._replace(mean=a.mean + shift)), shift @ shift, rtol=1e-9)
    one, three = n2m.Gaussian(np.zeros(4), np.eye(4)), n2m.Gaussian(np.zeros(4), 3 * np.eye(4))
    close(n2m.frechet_distance(one, three), 4 * (3 - 1) ** 2)  # per dimension (s_a - s_b)^2


def test_fad_of_fewer_clips_than_dimensions_is_finite_and_not_negative():
    a, b = (n2m.gaussian(rng(k).normal(size=(5, 40))) for k in (0, 1))
    assert np.isfinite(n2m.frechet_distance(a, b)) and n2m.frechet_distance(a, b) > 0 and 0 <= n2m.frechet_distance(a, a) < 1e-9


@reference
def test_fad_against_the_square_root_of_scipy():
    linalg = pytest.importorskip("scipy.linalg", reason="FAD is compared with scipy's matrix square root")
    x, y = rng().normal(size=(400, 12)), rng(1).normal(size=(300, 12)) @ np.diag(np.linspace(0.5, 2, 12)) + 0.3
    root = linalg.sqrtm(np.cov(x.T) @ np.cov(y.T)).real
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * root)
    close(n2m.frechet_distance(n2m.gaussian(x), n2m.gaussian(y)), expected, rtol=1e-6)


def test_fad_infinity_of_the_same_distribution_is_closer_to_zero():
    reference_set = n2m.Gaussian(np.zeros(16), np.eye(16))
    x = rng(3).normal(size=(300, 16))
    plain = n2m.frechet_distance(n2m.gaussian(x), reference_set)
    assert plain > 0.1 and abs(n2m.fad_infinity(x, reference_set)) < plain / 3


def test_table_6_ranks_the_truth_above_the_shuffled():
    text = rng().normal(size=(50, 8))
    audio = text + 0.3 * rng(1).normal(size=text.shape)
    rows = n2m.table_6(audio + 0.3 * rng(2).normal(size=text.shape), audio, text)
    truth, shuffled, generated = rows["ground truth audio"], rows["randomly shuffled audio"], rows["generated audio"]
    close(truth["gt-audio"], 1)
    assert truth["gt-text"] > generated["gt-text"] > 0.7 and abs(shuffled["gt-text"]) < 0.3 and abs(shuffled["gt-audio"]) < 0.3
    assert "gt-text" not in n2m.table_6(audio, audio)["generated audio"]


def test_log_mel_statistics_are_a_vector_a_second():
    audio = 0.1 * normal(2, 40_000)
    x = n2m.log_mel_statistics(audio)
    assert x.shape == (2, 2, 160)
    close(x[1, 1, :80], n2m.log_mel(audio)[1, 100:200].mean(axis=0), atol=1e-5)


@pytest.mark.parametrize("seconds, n", [(0.3, 1), (4, 1), (10, 1), (14.9, 1), (15, 2), (29, 3), (30, 3)])
def test_windows_of_ten_seconds(seconds, n):
    """A rest of 5 s or more is filled up with silence, a shorter one is left out; but there is always a window."""
    audio = rng().uniform(0.1, 1, round(seconds * 16_000))  # nowhere silent
    pieces = n2m.windows(audio)
    assert pieces.shape == (n, 160_000)
    line = pieces.ravel()
    kept = min(len(audio), len(line))
    assert (line[:kept] == audio[:kept]).all() and not line[kept:].any()


# ---- README.md ----

FOLDER = Path(__file__).parent
README = (FOLDER / "README.md").read_text()


def table_after(heading):
    """The rows of the first table below a heading of the README, as lists of cells."""
    lines = README.split(f"## {heading}")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")][1:]


def top_level(file):
    """(line, name) of every top-level statement of a file that names something, by its last line."""
    for node in ast.parse((FOLDER / file).read_text()).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else node
        target = target.elts[0] if isinstance(target, ast.Tuple) else target
        if name := getattr(target, "name", None) or getattr(target, "id", None):
            yield node.end_lineno, name


def cited(text):
    """{"Sec. 3.1", "Eq. 4", ...} in a text with "Eqs. 2 to 4" written out, "Secs. 4.4, 4.5" and "Tables 5 and 6"."""
    found = set()
    for kind, numbers in re.findall(r"(Sec|Eq|Table|Fig|App)s?\.? ([A-D\d](?:[\d., ]|and |[A-D]\b)*)", text):
        found |= {f"{kind} {number.rstrip('.')}" for number in re.findall(r"[A-D\d][\d.]*", numbers)}
    return found


def test_the_map_of_the_readme_is_complete_and_every_name_in_it_is_there():
    rows, found = table_after("Read it beside the paper"), set()
    for paper, here in rows:
        found |= cited(paper)
        words = re.findall(r"`([^`]+)`", here)
        files = [word.split()[0] for word in words if word.split()[0].endswith(".py")]
        assert all((FOLDER / file).is_file() for file in files) and (words or here.startswith("not here: ")), here
        names = {name for file in ("noise2music.py", *files) for _, name in top_level(file)}
        for word in words:
            name = re.match(r"\w+", word)[0]
            assert word.split()[0] in files or name in names, f"{word} of the row {paper!r} is nowhere"
            assert "[" not in word or eval(f"n2m.{word}")
    wanted = {f"Eq {n}" for n in range(1, 7)} | {f"Table {n}" for n in range(1, 10)} | {f"Fig {n}" for n in range(1, 6)}
    wanted |= {f"Sec 3.{n}" for n in range(1, 7)} | {f"Sec 4.{n}" for n in range(1, 7)} | {f"App {x}" for x in "ABCD"}
    covered = found | {re.match(r"\w+ (\d\.\d|[A-D])", ref)[0] for ref in found if re.match(r"Sec|App", ref)}
    assert not wanted - covered, f"the map lacks {sorted(wanted - covered)}"


def test_the_table_of_choices_is_what_grep_finds():
    """`grep -nE "choice:|departs:"` by the top-level name around the line, or below it; a docstring's is the file's."""
    tagged, listed = set(), set()
    for file in ("noise2music.py", "t5_encoder.py", "train.py", "sample.py", *(f"tools/{n}.py" for n in ("evaluate", "label", "plan"))):
        ends = [(ast.parse((FOLDER / file).read_text()).body[0].end_lineno, file), *top_level(file)]
        for number, line in enumerate((FOLDER / file).read_text().splitlines(), 1):
            if re.search(r"(?<!`)(choice|departs):", line):
                tagged.add((file, next(name for end, name in ends if number <= end)))
    for where, *_ in table_after("Where the paper is silent or disagrees with itself"):
        file = (re.findall(r"\((.+\.py)\)", where) or ["noise2music.py"])[0]
        listed |= {(file, name) for name in re.findall(r"`([^`]+)`", where)}
    assert tagged == listed, f"without a row: {tagged - listed}; without a tag: {listed - tagged}"


def test_every_command_of_the_readme_is_understood_and_it_has_200_lines():
    sys.path.insert(0, str(FOLDER / "tools"))
    blocks, seen = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S)).replace("\\\n", " "), set()
    for script, rest in re.findall(r"python (\S+\.py)(.*)", blocks):
        words = ["waveform_generator" if w == "MODEL" else w for w in shlex.split(rest, comments=True)]
        parse = __import__(Path(script).stem).parse_args if (FOLDER / script).is_file() else pytest.fail(script)
        parse(words)
        seen.add(script)
    assert seen >= {"sample.py", "train.py", "tools/label.py", "tools/evaluate.py"}
    assert len(README.splitlines()) <= 200
