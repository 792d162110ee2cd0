"""ThreadSanitizer over the ops' own kernels: silent as they are, loud without a barrier."""

from __future__ import annotations

import shutil

from tests.emulator import programs

# File, what stands right before a barrier, and the function whose accesses it orders.
BARRIERS = [
    ("grow_level.cuh", "entries, bases, log_sums, ranks);\n", "choose_frontier"),
    ("grow_level.cuh", "groups, keys, scratch, listed);\n", "finish_level"),
    ("adaptor.cuh", "[vs::warp_index() * kWeighQueries + vs::lane_index()] = value;\n", "combine_rows"),
    ("adaptor.cuh", "vs::copy_wait<kScoreStages - 2>();\n", "multiply_scores"),
    ("adaptor.cuh", "vs::copy_wait<kSumStages - 2>();\n", "multiply_sums"),
    ("build_tree.cuh", "    node_of[c] = node;\n  }\n", "build_tree_rows"),
    ("accept.cuh", "  shares[thread] = sum;\n", "accept_choose"),
    ("accept_list.cuh", "(vs::atomic_add(&work.listed[row], uint64_t{listed}));\n  }\n", "accept_list"),
    ("accept_filter.cuh", "ascending[below] = row.list[thread];\n  }\n", "cut_listed"),
    ("accept_filter.cuh", "state[0] = state[1] = state[2] = 0;\n", "gather"),
    ("tree_attention.cuh", "    vs::copy_wait<1>();\n", "attention_splits"),
    ("tree_attention.cuh", "words, W, at, first);\n", "clear_unseen"),
    ("tree_attention.cuh", "half * 8, sums, half, maximum[half], total[half]);\n", "store_parts"),
]


def test_no_races_in_the_ops(folder):
    done = programs.call(programs.build("ops", "thread", folder, kernels=programs.KERNELS), seed=1)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0 failures\n", "")


def test_removed_barriers_are_races(folder, tmp_path):
    source = tmp_path / "without" / "csrc"
    shutil.copytree(programs.ROOT / "csrc", source)
    for file, before, function in BARRIERS:
        text = (source / file).read_text()
        assert text.count(before) == 1, f"{function}: the place of its barrier has changed"
        start = text.index(before) + len(before)
        barrier = text.index("vs::sync_block();", start)
        assert not text[start:barrier].strip(), f"{function}: the place of its barrier has changed"
        (source / file).write_text(text[:barrier] + text[barrier + len("vs::sync_block();") :])
    files = ("accept.cu", "adaptor.cu", "build_tree.cu", "grow_level.cu", "tree_attention.cu")
    altered = {name: source / name for name in files}
    program = programs.build("ops", "thread", folder, kernels=programs.KERNELS, altered=altered)
    done = programs.call(program, seed=1)
    assert done.returncode == 66, done.stderr
    for file, _, function in BARRIERS:
        assert f"{file}:" in done.stderr and function in done.stderr, (file, function, done.stderr)


def test_a_removed_fence_is_a_race(folder, tmp_path):
    """Arrivals that are only counted do not order what the other blocks left for the last one."""
    source = tmp_path / "without" / "csrc"
    shutil.copytree(programs.ROOT / "csrc", source)
    text, arrival = (source / "grow_level.cuh").read_text(), "vs::arrive_last(arrivals, blocks)"
    assert text.count(arrival) == 1, "the place of the arrival has changed"
    counted = text.replace(arrival, "vs::atomic_add(arrivals, 1u) == blocks - 1")
    (source / "grow_level.cuh").write_text(counted)
    altered = {"grow_level.cu": source / "grow_level.cu"}
    program = programs.build("ops", "thread", folder, kernels=programs.KERNELS, altered=altered, name="unordered")
    done = programs.call(program, seed=1)
    assert done.returncode == 66, done.stderr
    for function in ("finish_level", "merge_sums"):
        assert "grow_level.cuh:" in done.stderr and function in done.stderr, (function, done.stderr)
