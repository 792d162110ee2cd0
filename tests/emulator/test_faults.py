"""What the emulator must report, it reports; what is sound, runs."""

from __future__ import annotations

import re

import pytest

from tests.emulator import programs

SEEDS = (0, 1, 2)

# Fault and what the report must say, under any build.
FAULTS = {
    "carve_too_much": "more shared memory carved than the launch asks for in .*faults.cu",
    "carve_differently": "threads carve shared memory differently",
    "split_collective": ("divergence: thread [0-9]+ waits at the shuffle in .*faults.cu:[0-9]+, thread [0-9]+ "),
    "vote_against_shuffle": "divergence: .* at the (vote|shuffle) in .* at the (vote|shuffle) in",
    "half_warp_shuffles": (
        r"deadlock in block \(0, 0, 0\)[^\0]*threads 0-15 wait at the shuffle in .*faults.cu:[0-9]+"
        r"\n *threads 16-31 have exited"
    ),
    "two_barriers": "divergence: .* at the block barrier in",
    "early_exit": r"threads 0-31 wait at the block barrier in .*\n *threads 32-63 have exited",
    "vector_at_4": "is not a multiple of 16 in .*faults.cu",
    "copy_at_4": "is not a multiple of 16 in .*faults.cu",
    "copy_not_waited": "wrong result",
    "counter_not_clear": "the counter of arrivals did not start at zero in .*faults.cu",
    "too_many_threads": "launch refused: .*1056 threads",
    "partial_warp": "launch refused: .*48 threads",
}
SOUND = ["barrier", "warp_barrier", "loop_barriers", "own_places", "ordered_counter", "inside"]
SOUND += ["counter_used_again", "fenced_blocks", "carve_all", "unset_shared", "vector_at_0", "copy_waited"]
RACES = {
    "no_barrier": "barrier",
    "no_warp_barrier": "warp_barrier",
    "no_loop_barrier": "loop_barriers",
    "same_place": "own_places",
    "relaxed_counter": "ordered_counter",
    "unfenced_blocks": "fenced_blocks",
}


def expect_report(done, pattern: str) -> None:
    assert done.returncode != 0
    assert re.search(pattern, done.stderr), done.stderr


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_reported(folder, name):
    program = programs.build("faults", "plain", folder)
    for seed in SEEDS:
        expect_report(programs.call(program, name, seed=seed), FAULTS[name])


@pytest.mark.parametrize("name", ["one_beyond", "one_before"])
def test_overflow_is_reported_without_sanitizers(folder, name):
    done = programs.call(programs.build("faults", "plain", folder), name)
    expect_report(done, "shared memory overflow between arrays")


@pytest.mark.parametrize("name", ["one_beyond", "one_before", "read_beyond"])
def test_overflow_is_reported_by_address_sanitizer(folder, name):
    done = programs.call(programs.build("faults", "address", folder), name)
    expect_report(done, r"AddressSanitizer: use-after-poison[^\0]*faults.cu")


@pytest.mark.parametrize("flavour", programs.FLAVOURS)
def test_sound_kernels_run(folder, flavour):
    program = programs.build("faults", flavour, folder)
    for name in SOUND:
        for seed in SEEDS:
            done = programs.call(program, name, seed=seed)
            assert (done.returncode, done.stdout, done.stderr) == (0, "ran\n", ""), (name, seed)


@pytest.mark.parametrize("name", RACES)
def test_races_are_reported_by_thread_sanitizer(folder, name):
    program = programs.build("faults", "thread", folder)
    for seed in SEEDS:
        done = programs.call(program, name, seed=seed)
        expect_report(done, r"ThreadSanitizer: data race[^\0]*faults.cu")
