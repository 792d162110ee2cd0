"""ThreadSanitizer over the ops' own kernels: silent as they are, loud without a barrier."""

from __future__ import annotations

import shutil

import pytest

from tests.emulator import programs

# File, what stands right before a barrier, and the function whose accesses it orders.
BARRIERS = [
    ("adaptor.cuh", "[vs::warp_index() * kWeighQueries + vs::lane_index()] = value;\n", "combine_rows"),
    ("adaptor.cuh", "vs::copy_wait<kScoreStages - 2>();\n", "multiply_scores"),
    ("adaptor.cuh", "vs::copy_wait<kSumStages - 2>();\n", "multiply_sums"),
    ("build_tree.cuh", "    node_of[c] = node;\n  }\n", "build_tree_rows"),
    ("accept.cuh", "  shares[thread] = sum;\n", "accept_choose"),
    ("accept_list.cuh", "(vs::atomic_add(&work.listed[row], uint64_t{listed}));\n  }\n", "accept_list"),
    ("accept_filter.cuh", "ascending[below] = row.list[thread];\n  }\n", "cut_listed"),
    ("accept_filter.cuh", "state[0] = state[1] = state[2] = 0;\n", "gather"),
    ("int8_linear.cuh", "  sums.store(parts + warp * kInt8Part<kGroups>);\n", "int8_linear_rows"),
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
    files = ("accept.cu", "adaptor.cu", "build_tree.cu", "int8_linear.cu", "tree_attention.cu")
    altered = {name: source / name for name in files}
    program = programs.build("ops", "thread", folder, kernels=programs.KERNELS, altered=altered)
    done = programs.call(program, seed=1)
    assert done.returncode == 66, done.stderr
    for file, _, function in BARRIERS:
        assert f"{file}:" in done.stderr and function in done.stderr, (file, function, done.stderr)


# What orders the last block of grow_level behind the others, and its own threads among themselves: the text, what is
# put in its place, and functions whose accesses must be reported.
ORDER = {
    "whole": ("", "", ()),
    "unfenced": (
        "vs::arrive_last(arrivals, blocks)",
        "vs::atomic_add(arrivals, 1u) == blocks - 1",
        ("finish_level", "merge_sums"),
    ),
    "early": ("scratch, listed);\n  vs::sync_block();", "scratch, listed);", ("finish_level",)),
    "unranked": ("log_sums, ranks);\n    vs::sync_block();", "log_sums, ranks);", ("score_children",)),
}


@pytest.mark.parametrize("name", ORDER)
def test_the_last_block_sees_what_the_others_did(folder, tmp_path, name):
    """In blocks of one warp: ThreadSanitizer tells no more than 255 threads apart, and lets races of others pass."""
    text, other, functions = ORDER[name]
    source = tmp_path / name / "csrc"
    shutil.copytree(programs.ROOT / "csrc", source)
    changes = [("grow_scan.cuh", "kGrowThreads = 512;", "kGrowThreads = 32;")]
    changes += [("grow_scan.cuh", "kGrowGroups = 128;", "kGrowGroups = 8;")]
    for file, before, after in [*changes, ("grow_level.cuh", text, other)]:
        whole = (source / file).read_text()
        assert before == "" or whole.count(before) == 1, f"{before} is not where it was"
        (source / file).write_text(whole.replace(before, after) if before else whole)
    altered = {"grow_level.cu": source / "grow_level.cu"}
    program = programs.build("ops", "thread", folder, kernels=programs.KERNELS, altered=altered, name=name)
    done = programs.call(program, "grow", seed=1)
    assert (done.returncode == 0) == (name == "whole"), done.stderr
    assert ("data race" in done.stderr) == bool(functions), done.stderr
    for function in functions:
        assert f"SUMMARY: ThreadSanitizer: data race {source}/grow_level.cuh" in done.stderr and function in done.stderr
