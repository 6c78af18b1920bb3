"""The figures of health against brute force, and each warning against vectors that deserve it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from llmemb_ray.reporting.health import Health, dead, effective_dimensions, mean_cosine
from llmemb_ray.shards.precision import Calibration
from tests.reporting.conftest import facts_of, made_run

WELL = np.random.default_rng(1).standard_normal((55, 16)).astype(np.float32)


def health_of(directory: Path, vectors_ND: np.ndarray, **changes: object) -> Health:
    return facts_of(made_run(directory / "run", vectors_ND, **changes), with_text=False).health  # type: ignore[arg-type]


def warned(health: Health) -> set[str]:
    return {finding.name for finding in health.warnings}


def test_norms_cosine_and_deviations_are_those_of_brute_force(tmp_path: Path) -> None:
    health = health_of(tmp_path, WELL)
    norms = [float(np.sqrt(sum(float(value) ** 2 for value in vector))) for vector in WELL]
    assert (health.norm_least, health.norm_largest) == (pytest.approx(min(norms), rel=1e-6), pytest.approx(max(norms), rel=1e-6))
    assert health.norm_median == pytest.approx(sorted(norms)[27], rel=1e-6)
    cosines = [float(a @ b) / (float(np.linalg.norm(a)) * float(np.linalg.norm(b))) for a, b in combinations(WELL.astype(np.float64), 2)]
    assert health.mean_cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-7)
    assert sum(health.cosines.counts) == len(cosines) == 55 * 54 // 2
    assert (health.cosines.edges[0], health.cosines.edges[-1]) == (pytest.approx(min(cosines), abs=1e-6), pytest.approx(max(cosines), abs=1e-6))
    assert health.deviations == pytest.approx(sorted((float(np.std(column)) for column in WELL.T.astype(np.float64)), reverse=True), rel=1e-6)
    assert (health.sampled, health.of) == (55, 55)
    assert warned(health) == set()


def test_effective_dimensions_are_those_of_the_eigenvalues() -> None:
    spread = WELL * np.linspace(0.1, 3, 16, dtype=np.float32)
    for rows in (spread, spread[:9]):  # more rows than dimensions, and fewer
        eigenvalues = np.linalg.eigvalsh(np.cov(rows.astype(np.float64).T))
        assert effective_dimensions(rows) == pytest.approx(eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-4)
    assert effective_dimensions(np.ones((5, 4), np.float32)) == 0
    assert effective_dimensions(np.outer(np.arange(9), np.ones(4)).astype(np.float32)) == pytest.approx(1)


def test_the_mean_cosine_of_few_vectors() -> None:
    assert mean_cosine(np.zeros((0, 3), np.float32)) == mean_cosine(np.ones((1, 3), np.float32)) == 0
    assert mean_cosine(np.array([[1, 0], [0, 1]], np.float32)) == 0
    assert mean_cosine(np.array([[1, 0], [-1, 0]], np.float32)) == -1


def test_dimensions_that_hardly_vary_are_dead() -> None:
    assert dead(np.array([1.0, 0.0, 0.5, 1e-4, 2.0])).tolist() == [1, 3]
    assert dead(np.zeros(3)).tolist() == [0, 1, 2]
    assert dead(np.array([1.0, 1.0, 500.0])).tolist() == [], "one large dimension does not make the others dead"


def test_planted_dead_dimensions_are_found(tmp_path: Path) -> None:
    vectors = WELL.copy()
    vectors[:, 3], vectors[:, 11] = 0.25, 0.0
    health = health_of(tmp_path, vectors)
    assert health.dead_dimensions == [3, 11]
    assert warned(health) == {"Dead dimensions"}
    assert "Dimensions 3, 11 are the same" in health.warnings[0].says


def test_planted_vectors_that_are_not_finite_or_zero_are_found_and_left_out_of_the_rest(tmp_path: Path) -> None:
    vectors = WELL.copy()
    vectors[4, 2], vectors[50, 0], vectors[7] = np.nan, np.inf, 0
    health = health_of(tmp_path, vectors)
    assert (health.not_finite, health.zero) == (2, 1)
    assert warned(health) == {"Not finite", "Zero vectors"}
    rest = np.delete(WELL, [4, 50, 7], axis=0)
    assert health.norm_largest == pytest.approx(float(np.linalg.norm(rest, axis=1).max()), rel=1e-6)
    assert np.isfinite(health.mean_cosine)


def test_collapsed_vectors_are_called_so(tmp_path: Path) -> None:
    health = health_of(tmp_path, np.ones(16, np.float32) + 0.01 * WELL)
    assert health.mean_cosine > 0.999
    assert warned(health) == {"Mean cosine of pairs"}
    assert "weights were loaded" in health.warnings[0].says


def test_vectors_in_one_direction_have_few_effective_dimensions(tmp_path: Path) -> None:
    vectors = 0.01 * WELL
    vectors[:, 0] += np.where(np.arange(55) % 2, 1, -1)
    assert warned(health_of(tmp_path, vectors)) == {"Effective dimensions"}


def test_equal_vectors_of_one_prompt_are_usual_and_of_different_prompts_are_not(tmp_path: Path) -> None:
    vectors = WELL.copy()
    vectors[10:14] = vectors[9]
    same = health_of(tmp_path / "same", vectors, prompts=[9 if 9 <= row < 14 else row for row in range(55)])
    assert (same.same_prompt, same.same_vector, warned(same)) == (4, 0, set())
    different = health_of(tmp_path / "different", vectors)
    assert (different.same_prompt, different.same_vector) == (0, 4)
    assert warned(different) == {"Vectors of different prompts that are equal"}


def test_norms_are_judged_by_what_the_run_promises(tmp_path: Path) -> None:
    unit = WELL / np.linalg.norm(WELL, axis=1, keepdims=True)
    assert warned(health_of(tmp_path / "a", unit, normalize=True)) == set()
    unit[5] *= 1.5
    assert warned(health_of(tmp_path / "b", unit, normalize=True)) == {"Norms"}
    unit[5] *= 100
    assert warned(health_of(tmp_path / "c", unit, normalize=False)) == {"Norms"}


def test_a_dead_bit_is_found_and_codes_that_never_change_too(tmp_path: Path) -> None:
    bits = WELL.copy()
    bits[:, 5] = 1.0
    packed = np.packbits(bits > 0, axis=1)
    health = health_of_codes(tmp_path / "bits", packed, "ubinary")
    assert health.dead_dimensions == [5]
    scale = Calibration(
        **dict.fromkeys(("low", "mean", "below"), np.full(16, -1, np.float32)), high=np.ones(16, np.float32), above=np.ones(16, np.float32), rows=9, space="s"
    )
    codes = np.clip(WELL * 40, -128, 127).astype(np.int8)
    codes[:, 6] = 17
    health = health_of_codes(tmp_path / "codes", codes, "int8", scale)
    assert health.dead_dimensions == [6]
    assert health.clipped_share == 0


def health_of_codes(directory: Path, codes: np.ndarray, dtype: str, calibration: Calibration | None = None) -> Health:
    """Of 16 dimensions, as codes of 16 bytes or bits in 2."""
    run = made_run(directory, codes, dtype=dtype, dimension=16)
    if calibration is not None:
        calibration.save(run.storage)
    return facts_of(run, with_text=False).health


def test_too_few_vectors_are_not_judged_by_their_dimensions(tmp_path: Path) -> None:
    run = made_run(tmp_path, np.ones((55, 8), np.float32))
    health = facts_of(run, sample_size=5, with_text=False).health
    undecided = {finding.name: finding.says for finding in health.findings if finding.well is None}
    assert set(undecided) == {"Dead dimensions", "Effective dimensions"}
    assert all("5 vectors are too few" in says for says in undecided.values())
